"""BatchNorm's running statistics, which are neither parameters nor the same on all processes by themselves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def statistics(networks: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Return BatchNorm's running statistics by `network/buffer` name: they belong to the weights, and to an average."""
    return {
        f"{network}/{name}.{key}": buffer
        for network, module in networks.items()
        for name, part in module.named_modules()
        if isinstance(part, _NormBase)
        for key, buffer in (("running_mean", part.running_mean), ("running_var", part.running_var))
        if buffer is not None
    }
