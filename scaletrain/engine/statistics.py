"""BatchNorm's running statistics, which are neither parameters nor the same on all processes by themselves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from scaletrain.engine.world import World


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


class Statistics:
    """Keeps these statistics the same on all processes."""

    def __init__(self, networks: Mapping[str, nn.Module], world: World):
        self._world, self._tensors = world, list(statistics(networks).values())
        self._kept = [tensor.clone() for tensor in self._tensors]

    def settle(self, stepped: bool) -> None:
        """Average them over the processes; where nothing was stepped, take them back."""
        if not self._tensors:
            return
        if stepped:
            self._world.mean_(self._tensors)
            torch._foreach_copy_(self._kept, self._tensors)
        else:
            torch._foreach_copy_(self._tensors, self._kept)
