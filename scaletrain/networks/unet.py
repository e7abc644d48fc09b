"""A U-Net of residual blocks that are told the time: a denoiser for small pictures (Ho et al., 2020, appendix B).

Differences from there: the time scales and shifts the second norm (Dhariwal & Nichol, 2021, section 3), no attention,
one skip connection to a level, and resizing without convolutions of its own, for speed. With `patch` it works on
squares of pixels (Luhman & Luhman, 2022), which is quicker still.
"""

from __future__ import annotations

from itertools import pairwise
from typing import final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from scaletrain.errors import UserError
from scaletrain.networks._conditions import Conditioned, Conditions, Waves


class Config(Conditioned):
    """Options for `type: unet`. The shape of a picture is that of the data."""

    channels: int = Field(1, ge=1)
    height: int = Field(28, ge=1)
    width: int = Field(28, ge=1)
    patch: int = Field(1, ge=1)
    """Pixels of a side of the squares that become one pixel of more channels; the cost falls by its square."""
    features: list[int] = Field([32, 64], min_length=1)
    """Feature maps of each level, multiples of 8; each level after the first has half the height and width."""
    blocks: int = Field(1, ge=1)
    """Residual blocks of each level on the way down, and as many on the way up."""
    middle: int = Field(2, ge=0)
    """Residual blocks at the lowest level, between the ways."""
    time_features: int = Field(128, ge=8, multiple_of=2)


class Times(nn.Module):
    """Times (B,), about 0 to 1, and what else is told, to features (B, size), by a small MLP."""

    def __init__(self, config: Conditioned, size: int, text: int = 0):
        super().__init__()
        self.waves = Waves(config.fastest)
        self.first = nn.Linear(2 * len(self.waves.frequencies), size)
        self.conditions = Conditions(config, size, text)
        self.second = nn.Linear(size, size)

    def forward(self, t: Tensor, **told: Tensor | None) -> Tensor:
        """Map (B,) to (B, size)."""
        first = self.conditions(self.first(self.waves(t)), **told)
        return F.silu(self.second(F.silu(first)))


class Block(nn.Module):
    """x (B, I, H, W), time features -> (B, O, H, W): two 3x3 convolutions beside a skip; at the start, the skip."""

    def __init__(self, inputs: int, outputs: int, times: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulate = nn.Linear(times, 2 * outputs)
        self.norm2 = nn.GroupNorm(8, outputs, affine=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        for parameter in (*self.modulate.parameters(), *self.conv2.parameters()):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        """Apply the block."""
        scale, shift = self.modulate(times)[:, :, None, None].chunk(2, 1)
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale)))


@final
class UNet(nn.Module):
    """z (B, C, H, W), t (B,) about 0 to 1 -> a prediction (B, C, H, W); 0 at the start.

    Raises UserError for features that are no multiples of 8 and for sides that cannot be halved often enough.
    """

    def __init__(self, config: Config):
        super().__init__()
        features, times = config.features, config.time_features
        if any(f < 8 or f % 8 for f in features):
            raise UserError(f"unet: features must be multiples of 8, not {features}")
        divisor = config.patch * 2 ** (len(features) - 1)
        if config.height % divisor or config.width % divisor:
            raise UserError(
                f"unet: {len(features)} levels with `patch` {config.patch} need sides that {divisor} divides, pictures "
                f"are {config.height}x{config.width}: give fewer `features`, or set `objective.size`"
            )
        self.settings = config
        self.times = Times(config, times)
        channels = config.channels * config.patch**2
        self.first = nn.Conv2d(channels, features[0], 3, padding=1)
        self.halve = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(features))
        self.down = nn.ModuleList(Level(f, f, times, config.blocks) for f in features)
        self.middle = Level(features[-1], features[-1], times, config.middle)
        below = [*features[1:], features[-1]]
        self.up = nn.ModuleList(Level(f + b, f, times, config.blocks) for f, b in zip(features, below, strict=True))
        self.norm = nn.GroupNorm(8, features[0])
        self.last = nn.Conv2d(features[0], channels, 3, padding=1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        guidance: Tensor | None = None,
        target: Tensor | None = None,
    ) -> Tensor:
        """Apply the network. Inside, tensors are channels-last, which convolutions are faster on."""
        times = self.times(t, label=label, guidance=guidance, target=target)
        z = F.pixel_unshuffle(z, self.settings.patch)
        h = self.first(z.contiguous(memory_format=torch.channels_last))
        levels = []
        for i, level in enumerate(self.down):
            h = level(self.halve[i - 1](h) if i else h, times)
            levels.append(h)
        h = self.middle(h, times)
        for i in reversed(range(len(levels))):
            h = self.up[i](torch.cat([h, levels[i]], 1), times)
            h = F.interpolate(h, scale_factor=2.0) if i else h
        return F.pixel_shuffle(self.last(F.silu(self.norm(h))), self.settings.patch).contiguous()


class Level(nn.Module):
    """Residual blocks one after the other, at one resolution."""

    def __init__(self, inputs: int, outputs: int, times: int, count: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block(outputs if i else inputs, outputs, times) for i in range(count))

    def forward(self, h: Tensor, times: Tensor) -> Tensor:
        """Apply the blocks."""
        for block in self.blocks:
            h = block(h, times)
        return h


def build(config: Config) -> nn.Module:
    """Build the network. Raises UserError when the shape of the pictures does not fit."""
    return UNet(config)
