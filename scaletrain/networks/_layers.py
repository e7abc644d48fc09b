"""Some layers of a pretrained network, as a smaller one to begin from (Sanh et al., 2019, take every second)."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from scaletrain.errors import UserError


def keep_settings(settings: Any, layers: Sequence[int], where: str) -> Any:
    """Return a transformers configuration with these layers only. Raises UserError where there are fewer."""
    count = settings.num_hidden_layers
    if layers[-1] >= count:
        raise UserError(f"config.layers: `{where}` has {count} layers, 0 to {count - 1}; there is no {layers[-1]}.")
    kept = copy.deepcopy(settings)
    for name, value in settings.to_dict().items():
        if isinstance(value, list) and len(value) == count and name in ("layer_types", "mlp_layer_types"):
            setattr(kept, name, [value[i] for i in layers])
    kept.num_hidden_layers = len(layers)
    return kept


def keep_layers(module: nn.Module, smaller: nn.Module, layers: Sequence[int]) -> nn.Module:
    """Give a network the weights of a larger one of its kind: of these layers, and of all that is no layer.

    smaller: a network of `keep_settings`; returned. Raises UserError when the network keeps its layers in no one list.
    """
    count = module.config.num_hidden_layers  # type: ignore[union-attr]
    lists = [name for name, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(lists) != 1:
        raise UserError(f"config.layers: a {type(module).__name__} has no one list of its layers to choose from.")
    own = re.compile(rf"({re.escape(lists[0])}\.)(\d+)(\..*)")
    new = {old: number for number, old in enumerate(layers)}

    def renamed(key: str) -> str | None:
        match = own.fullmatch(key)
        if match is None:
            return key
        number = new.get(int(match[2]))
        return None if number is None else f"{match[1]}{number}{match[3]}"

    state: dict[str, torch.Tensor] = module.state_dict()
    smaller.load_state_dict({name: value for key, value in state.items() if (name := renamed(key)) is not None})
    return smaller
