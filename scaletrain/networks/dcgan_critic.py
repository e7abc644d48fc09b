"""The DCGAN discriminator: pictures to one logit by strided convolutions (Radford et al., 2016, section 3)."""

from __future__ import annotations

from typing import Literal, final

import torch
from pydantic import Field
from torch import nn

from scaletrain.config import Strict
from scaletrain.networks.dcgan_generator import halvings, initialise, normalise


class Config(Strict):
    """Options for `type: dcgan_critic`. The shape of a picture is that of the data."""

    channels: int = Field(1, ge=1)
    height: int = Field(28, ge=8)
    width: int = Field(28, ge=8)
    features: int = Field(64, ge=8, multiple_of=8)
    """Channels of the first layer; each next layer has twice as many."""
    norm: Literal["batch", "group", "none"] = "batch"
    """Between the first layer and the logit: BatchNorm, whose statistics are the micro-batch's; GroupNorm; nothing."""


@final
class Critic(nn.Module):
    """Pictures (B, C, H, W) to logits (B,): positive for real."""

    def __init__(self, config: Config):
        super().__init__()
        count = halvings(config.height, config.width)
        layers: list[nn.Module] = [nn.Conv2d(config.channels, config.features, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, count):
            inputs, outputs = config.features << (i - 1), config.features << i
            conv = nn.Conv2d(inputs, outputs, 4, 2, 1, bias=config.norm == "none")
            layers += [conv, normalise(config.norm, outputs), nn.LeakyReLU(0.2)]
        last = (config.features << (count - 1)) * (config.height >> count) * (config.width >> count)
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(last, 1))
        self.apply(initialise)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map pictures (B, C, H, W) to logits (B,)."""
        return self.layers(x).squeeze(1)


def build(config: Config) -> nn.Module:
    """Build the critic."""
    return Critic(config)
