"""A multilayer perceptron that is told the time: tells real points from made ones, both noised."""

from __future__ import annotations

from typing import final

from pydantic import Field
from torch import Tensor, nn

from scaletrain.networks import point_denoiser


class Config(point_denoiser.Config):
    """Options for `type: point_critic`."""

    text: int = Field(0, ge=0)
    """Numbers of the vector that it is told of a text; 0: it is told none."""


@final
class PointCritic(point_denoiser.TimedPerceptron):
    """z (B, D), t (B,) about 0 to 1 -> logits (B,): positive for real."""

    def __init__(self, config: Config):
        super().__init__(config, 1, config.text)

    def forward(self, z: Tensor, t: Tensor, **told: Tensor | None) -> Tensor:  # type: ignore[override]
        """Apply the network."""
        return super().forward(z, t, **told).squeeze(1)


def build(config: Config) -> nn.Module:
    """Build the network."""
    return PointCritic(config)
