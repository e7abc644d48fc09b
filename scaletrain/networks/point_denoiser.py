"""A multilayer perceptron that is told the time: a denoiser for points."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn

from scaletrain.networks._conditions import Conditioned, Conditions, Waves

_ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU}


class Config(Conditioned):
    """Options for `type: point_denoiser`."""

    dim: int = Field(2, ge=1)
    """Coordinates of a point: those of the data."""
    hidden: list[int] = Field([256, 256, 256], min_length=1)
    """Width of each hidden layer."""
    activation: Literal["silu", "gelu", "relu"] = "silu"
    """Of hidden layers. With gelu what jumps from one mode to the next is learnt sooner, with relu the soonest; but
    that has kinks, which methods that differentiate it do not bear."""
    detail: float = Field(1.0, gt=0)
    """Factor of the first layer's weights at the start. With 3 or so, what changes fast with z is learnt sooner."""


class TimedPerceptron(nn.Module):
    """z (B, D), t (B,) about 0 to 1 -> (B, outputs)."""

    def __init__(self, config: Config, outputs: int, text: int = 0):
        super().__init__()
        self.settings = config
        self.activation = _ACTIVATIONS[config.activation]()
        self.waves = Waves(config.fastest)
        self.first = nn.Linear(config.dim, config.hidden[0])
        self.times = nn.Linear(2 * len(self.waves.frequencies), config.hidden[0])
        self.conditions = Conditions(config, config.hidden[0], text)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(config.hidden))
        self.last = nn.Linear(config.hidden[-1], outputs)
        with torch.no_grad():
            for parameter in self.first.parameters():
                parameter.mul_(config.detail)

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        guidance: Tensor | None = None,
        target: Tensor | None = None,
        text: Tensor | None = None,
    ) -> Tensor:
        """Apply the network."""
        features = self.conditions(self.times(self.waves(t)), label, guidance, target, text)
        h = self.activation(self.first(z) + features)
        for layer in self.layers:
            h = self.activation(layer(h))
        return self.last(h)


@final
class PointDenoiser(TimedPerceptron):
    """z (B, D), t (B,) about 0 to 1 -> a prediction (B, D); 0 at the start."""

    def __init__(self, config: Config):
        super().__init__(config, config.dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)


def build(config: Config) -> nn.Module:
    """Build the network."""
    return PointDenoiser(config)
