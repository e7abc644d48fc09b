"""What denoisers and critics are told beside z: the time, and perhaps a class, a text, the strength of guidance, or a
time to go to.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from scaletrain.config import Strict


class Conditioned(Strict):
    """Options of networks that are told more than the time. What a network is told is the objective's matter."""

    classes: int = Field(0, ge=0)
    """Of the labels that it is told; one more stands for none. 0: it is told no label."""
    guidance: bool = False
    """Whether it is told the scale of guidance that it is to answer with."""
    target: bool = False
    """Whether it is told the time to go to."""
    fastest: float = Field(100.0, ge=2)
    """Of the waves that tell it numbers, in radians per unit. Slower ones have smoother derivatives in time."""


class Waves(nn.Module):
    """Numbers (B,) to sines and cosines (B, 2 waves) of 1 to `fastest` radians per unit."""

    frequencies: Tensor

    def __init__(self, fastest: float, waves: int = 32):
        super().__init__()
        frequencies = torch.exp(torch.linspace(0, math.log(fastest), waves))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """Map (B,) to (B, 2 waves)."""
        angles = t[:, None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], 1)


class Conditions(nn.Module):
    """label (B,), guidance (B,), target (B,), text (B, E) -> features (B, size), to add to those of the time; 0 at the
    start.

    So a network that goes on from one that is told less answers as that one does.
    """

    def __init__(self, config: Conditioned, size: int, text: int = 0):
        super().__init__()
        self.waves = Waves(config.fastest)
        self.label = nn.Embedding(config.classes + 1, size) if config.classes else None
        wide = 2 * len(self.waves.frequencies)
        self.text = nn.Linear(text, size, bias=False) if text else None
        self.guidance = nn.Linear(wide, size, bias=False) if config.guidance else None
        self.target = nn.Linear(wide, size, bias=False) if config.target else None
        for module in (self.label, self.text, self.guidance, self.target):
            if module is not None:
                nn.init.zeros_(module.weight)

    def forward(
        self,
        features: Tensor,
        label: Tensor | None = None,
        guidance: Tensor | None = None,
        target: Tensor | None = None,
        text: Tensor | None = None,
    ) -> Tensor:
        """Add what is told to features (B, size). A label that is not given is none; a guidance, 1; a target, 0. A
        text's vector is brought to mean 0 and variance 1: encoders differ in scale.
        """
        if self.label is not None:
            none = self.label.num_embeddings - 1
            label = torch.full((len(features),), none, device=features.device) if label is None else label
            features = features + self.label(label)
        if self.text is not None and text is not None:
            features = features + self.text(F.layer_norm(text, text.shape[-1:]).to(features.dtype))
        for layer, value, default in ((self.guidance, guidance, 1.0), (self.target, target, 0.0)):
            if layer is not None:
                value = torch.full((len(features),), default, device=features.device) if value is None else value
                scaled = value.log() / 4 if layer is self.guidance else value
                features = features + layer(self.waves(scaled).to(features.dtype))
        return features
