"""The DCGAN generator: noise to pictures by strided transposed convolutions (Radford et al., 2016, section 3)."""

from __future__ import annotations

from typing import Literal, final

import torch
from pydantic import Field
from torch import nn

from scaletrain.config import Strict
from scaletrain.errors import UserError


class Config(Strict):
    """Options for `type: dcgan_generator`. The shape of a picture is that of the data."""

    channels: int = Field(1, ge=1)
    height: int = Field(28, ge=8)
    width: int = Field(28, ge=8)
    latent: int = Field(100, ge=1)
    """Length of the noise vector."""
    features: int = Field(64, ge=8, multiple_of=8)
    """Channels of the layer before the picture; each layer before has twice as many."""
    norm: Literal["batch", "group", "none"] = "batch"
    """BatchNorm, whose statistics are the micro-batch's, as in the paper; GroupNorm in 8 groups; or nothing."""


def halvings(height: int, width: int) -> int:
    """Return how often a picture is halved: to a side of 4 or the first odd side, at least twice.

    64, 32: to 4; 28: to 7; 8: to 2. Raises UserError for sides that 4 does not divide.
    """
    if height % 4 or width % 4:
        raise UserError(f"DCGAN needs sides that 4 divides, these are {height}x{width}: set `objective.size`")
    count = 2
    while not (height >> count) % 2 and not (width >> count) % 2 and min(height, width) >> count > 4:
        count += 1
    return count


def normalise(norm: str, channels: int) -> nn.Module:
    """Return a normalisation layer by its name in the config."""
    kinds = {"batch": lambda: nn.BatchNorm2d(channels), "group": lambda: nn.GroupNorm(8, channels), "none": nn.Identity}
    return kinds[norm]()


def initialise(module: nn.Module) -> None:
    """Draw weights from N(0, 0.02) and scales from N(1, 0.02) (Radford et al., 2016, section 4)."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)


@final
class Generator(nn.Module):
    """Noise (B, latent) to pictures (B, C, H, W) in [-1, 1]."""

    def __init__(self, config: Config):
        super().__init__()
        count = halvings(config.height, config.width)
        self.start = (config.features << (count - 1), config.height >> count, config.width >> count)
        self.project = nn.Linear(config.latent, self.start[0] * self.start[1] * self.start[2])
        self.norm = normalise(config.norm, self.start[0])
        layers: list[nn.Module] = []
        for i in reversed(range(1, count)):
            inputs, outputs = config.features << i, config.features << (i - 1)
            conv = nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=config.norm == "none")
            layers += [conv, normalise(config.norm, outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.ConvTranspose2d(config.features, config.channels, 4, 2, 1), nn.Tanh())
        self.apply(initialise)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Map noise (B, latent) to pictures (B, C, H, W)."""
        return self.layers(torch.relu(self.norm(self.project(z).unflatten(1, self.start))))


def build(config: Config) -> nn.Module:
    """Build the generator."""
    return Generator(config)
