"""Linear maps between the hidden states of two networks, one for each pair of layers that is compared."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor, nn

from scaletrain.config import Strict


class Config(Strict):
    """Options of `networks.<name>.config` for `type: projection`."""

    inputs: int = Field(ge=1)
    outputs: int = Field(ge=1)
    count: int = Field(1, ge=1)
    """How many maps."""


class Projection(nn.Module):
    """Maps the n-th of `count` states (..., inputs) by the n-th map to (..., outputs); none has a bias."""

    def __init__(self, config: Config):
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(config.inputs, config.outputs, bias=False) for _ in range(config.count))

    def forward(self, states: Sequence[Tensor]) -> list[Tensor]:
        """Return one for each."""
        return [project(state) for project, state in zip(self.maps, states, strict=True)]


def build(config: Config) -> nn.Module:
    """Build the maps (Jiao et al., 2020, "TinyBERT", eq. 8: W_h)."""
    return Projection(config)
