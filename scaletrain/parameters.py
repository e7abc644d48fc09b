"""Working on a module's parameters whatever device they are on, with those that are shared kept so."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def replace_parameters(module: nn.Module, make: Callable[[nn.Parameter], nn.Parameter]) -> None:
    """Replace each parameter by what is made of it; one that is shared stays so."""
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # the old ones too: their `id` must not be used again
    for part in module.modules():
        for key, old in part._parameters.items():
            if old is not None:
                if id(old) not in made:
                    made[id(old)] = old, make(old)
                part._parameters[key] = made[id(old)][1]


def to_device(module: nn.Module, device: torch.device) -> None:
    """Move what is not on the meta device."""
    module._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))


def align(module: nn.Module) -> None:
    """Put weights on a CPU where torch would put new ones; those in a mapped file begin anywhere.

    The last bits of a product depend on it: a resumed run, whose weights come from other files, would not be the same.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        plain = type(tensor.data) is torch.Tensor and tensor.device.type == "cpu" and tensor.is_floating_point()
        if plain and tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()


_ALIGNMENT = 64
"""Bytes; of what torch allocates on a CPU."""


def in_an_element(parameter: torch.Tensor) -> int:
    """Return how many weights an element of a parameter holds: those of 4 bits are two to a byte."""
    return 2 if parameter.dtype == torch.uint8 else 1
