"""A multilayer perceptron, for points and tables."""

from __future__ import annotations

from itertools import pairwise

from pydantic import Field
from torch import nn

from scaletrain.config import Strict


class Config(Strict):
    """Options of `networks.<name>.config` for `type: mlp`."""

    inputs: int = Field(ge=1)
    outputs: int = Field(ge=1)
    hidden: list[int] = Field([64, 64])
    """Width of each hidden layer."""


def build(config: Config) -> nn.Module:
    """Build linear layers with SiLU between them: (B, inputs) to (B, outputs)."""
    widths = [config.inputs, *config.hidden, config.outputs]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.SiLU()]
    return nn.Sequential(*layers[:-1])
