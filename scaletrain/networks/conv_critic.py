"""Residual blocks that are told the time, on the way down: tells real pictures from made ones, both noised.

The blocks are those of `unet`. A logit is a mean over places, as of a critic of patches (Sauer et al., 2024, LADD).
"""

from __future__ import annotations

from itertools import pairwise
from typing import final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from scaletrain.errors import UserError
from scaletrain.networks._conditions import Conditioned
from scaletrain.networks.unet import Level, Times


class Config(Conditioned):
    """Options for `type: conv_critic`. The shape of a picture is that of the data."""

    channels: int = Field(1, ge=1)
    height: int = Field(28, ge=1)
    width: int = Field(28, ge=1)
    features: list[int] = Field([32, 64], min_length=1)
    """Feature maps of each level, multiples of 8; each level after the first has half the height and width."""
    text: int = Field(0, ge=0)
    """Numbers of the vector that it is told of a text; 0: it is told none."""
    blocks: int = Field(1, ge=1)
    """Residual blocks of each level."""
    time_features: int = Field(128, ge=8, multiple_of=2)


@final
class ConvCritic(nn.Module):
    """z (B, C, H, W), t (B,) about 0 to 1 -> logits (B,): positive for real. Raises UserError for features that are no
    multiples of 8.
    """

    def __init__(self, config: Config):
        super().__init__()
        features, times = config.features, config.time_features
        if any(f < 8 or f % 8 for f in features):
            raise UserError(f"conv_critic: features must be multiples of 8, not {features}")
        self.settings = config
        self.times = Times(config, times, config.text)
        self.first = nn.Conv2d(config.channels, features[0], 3, padding=1)
        self.halve = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(features))
        self.down = nn.ModuleList(Level(f, f, times, config.blocks) for f in features)
        self.norm = nn.GroupNorm(8, features[-1])
        self.last = nn.Linear(features[-1], 1)

    def forward(self, z: Tensor, t: Tensor, **told: Tensor | None) -> Tensor:
        """Apply the network."""
        times = self.times(t, **told)
        h = self.first(z.contiguous(memory_format=torch.channels_last))
        for i, level in enumerate(self.down):
            h = level(self.halve[i - 1](h) if i else h, times)
        return self.last(F.silu(self.norm(h)).mean((2, 3))).squeeze(1)


def build(config: Config) -> nn.Module:
    """Build the network."""
    return ConvCritic(config)
