"""Small convolutional classifiers of the textbooks: LeNet-5, and ResNet-18 for small pictures."""

from __future__ import annotations

from typing import Literal, final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from scaletrain.config import Strict
from scaletrain.errors import UserError


class Config(Strict):
    """Options of `networks.<name>.config` for `type: cnn`. The shape and the classes are those of the data."""

    architecture: Literal["lenet5", "resnet18"] = "lenet5"
    channels: int = Field(1, ge=1)
    height: int = Field(28, ge=1)
    width: int = Field(28, ge=1)
    classes: int = Field(10, ge=2)
    features: int = Field(64, ge=8, multiple_of=8)
    """resnet18: channels of the first block; the last has eight times as many."""
    norm: Literal["batch", "group"] = "batch"
    """resnet18: BatchNorm, whose statistics are the micro-batch's, or GroupNorm in 8 groups (Wu and He, 2018)."""


def build(config: Config) -> nn.Module:
    """Build the network: (B, C, H, W) to logits (B, classes)."""
    return LeNet5(config) if config.architecture == "lenet5" else ResNet18(config)


@final
class LeNet5(nn.Module):
    """Two convolutions and three linear layers (LeCun et al., 1998, figure 2), with ReLU and maximum pooling.

    Pictures under 32 pixels get a border of 2, as the 28-pixel digits of the paper do. Raises UserError for pictures
    under 12 pixels, which the second convolution does not fit in.
    """

    def __init__(self, config: Config):
        super().__init__()
        smallest = min(config.height, config.width)
        if smallest < 12:
            raise UserError(
                f"LeNet-5 needs pictures of at least 12x12 pixels, these are {config.height}x{config.width}: "
                f"scale them up by `objective.size`, such as 28"
            )
        pad = 0 if smallest >= 32 else 2
        height, width = (((side + 2 * pad - 4) // 2 - 4) // 2 for side in (config.height, config.width))
        self.conv1 = nn.Conv2d(config.channels, 6, 5, padding=pad)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.linear1 = nn.Linear(16 * height * width, 120)
        self.linear2 = nn.Linear(120, 84)
        self.linear3 = nn.Linear(84, config.classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map pictures (B, C, H, W) to logits (B, classes)."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.linear1(x.flatten(1)))
        return self.linear3(F.relu(self.linear2(x)))


def _norm(config: Config, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if config.norm == "batch" else nn.GroupNorm(8, channels)


@final
class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al., 2016, figure 2)."""

    def __init__(self, config: Config, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = _norm(config, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = _norm(config, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), _norm(config, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H/stride, W/stride)."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


@final
class ResNet18(nn.Module):
    """Four groups of two blocks (He et al., 2016, table 1) after a 3x3 stem without stride or pooling (section 4.2)."""

    def __init__(self, config: Config):
        super().__init__()
        widths = [config.features * 2**i for i in range(4)]
        self.stem = nn.Conv2d(config.channels, config.features, 3, padding=1, bias=False)
        self.norm = _norm(config, config.features)
        self.blocks = nn.ModuleList()
        for i, (inputs, outputs) in enumerate(zip([config.features, *widths], widths, strict=False)):
            self.blocks += [Block(config, inputs, outputs, 1 if i == 0 else 2), Block(config, outputs, outputs, 1)]
        self.head = nn.Linear(widths[-1], config.classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # He et al., 2015
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map pictures (B, C, H, W) to logits (B, classes)."""
        x = F.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))
