"""Networks whose weights stay in their files, until each process reads its part: none has them whole in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from scaletrain.checkpoint.tensors import Stored, stored
from scaletrain.config import AdapterSpec, NetworkSpec
from scaletrain.networks.build import adapters, outline, own_base
from scaletrain.parameters import replace_parameters

_WHOLE = "modules_to_save.default."
"""What peft puts into the names of modules that are trained whole, beside an adapter."""


@dataclass(frozen=True)
class Unread:
    """A network with parameters on the meta device, but for those of an adapter, and where they are, by name."""

    module: nn.Module
    weights: dict[str, Stored]


def unread(name: str, spec: NetworkSpec, saved: Path | None = None) -> Unread | None:
    """Return a network as `build` gives it, unread; None where its weights are new, or not in files as they are in it.

    saved: its own folder in a checkpoint, if it is being resumed. An adapter's weights, and buffers, are read, or drawn
    from torch's generator as `build` draws them. Raises UserError.
    """
    folder = saved if saved and not spec.adapter else Path(spec.path) if spec.path else None
    plain = spec.adapter is None or _blind(spec.adapter)
    if spec.source is not None or folder is None or not folder.is_dir() or not plain or spec.quantize:
        return None
    if own_base(name, spec):  # the files have other weights, or fewer rows
        return None
    module = outline(name, spec.model_copy(update={"adapter": None}), None, None if spec.adapter else saved)
    if getattr(module, "rearranged", False):
        return None  # the files have other weights under the same names
    if spec.adapter:
        module = _with_adapter(module, spec.adapter)
        if saved:
            adapters().read_adapter(module, saved)
    files, weights = stored(folder), {}
    own = stored(saved) if saved and spec.adapter else {}
    for key, parameter in module.named_parameters():
        if parameter.is_meta:
            entry = own.get(key.replace(_WHOLE, "")) if _WHOLE in key else None
            entry = entry or files.get(_key_in_file(key))
            if entry is None or entry.shape != parameter.shape:
                return None
            weights[key] = entry
    for key, buffer in module.named_buffers():
        if ".vera_" in f".{key}":
            continue  # fixed, and read with the adapter
        entry = files.get(_key_in_file(key))
        if entry is not None and entry.shape == buffer.shape:
            buffer.copy_(entry.whole())
        elif key in module.state_dict():
            return None
    if not hasattr(module, "save_pretrained") and files.keys() != module.state_dict().keys():
        return None  # `build` tells what does not fit
    if spec.frozen:
        module.requires_grad_(False)
    if getattr(module, "can_generate", bool)() and (folder / "generation_config.json").exists():
        from transformers import GenerationConfig

        base = module.get_base_model() if spec.adapter else module  # type: ignore[operator]
        base.generation_config = GenerationConfig.from_pretrained(folder)
    return Unread(module, weights)


def _blind(spec: AdapterSpec) -> bool:
    """Whether an adapter is made without a look at the weights."""
    return spec.type in ("lora", "rslora", "vera", "ia3") and not spec.path


def _key_in_file(key: str) -> str:
    """Return the name under which a base network's file has a weight that an adapter has been put over."""
    for part in ("base_layer.", "original_module.", _WHOLE):
        key = key.replace(part, "")
    return key.removeprefix("base_model.model.")


def _with_adapter(module: nn.Module, spec: AdapterSpec) -> nn.Module:
    """Put a new adapter, drawn on the CPU, over a network without weights.

    peft makes an adapter where its base is: have the base be one number under many indices for a while.
    """
    one = torch.zeros(())
    replace_parameters(module, lambda p: nn.Parameter(one.to(p.dtype).expand(p.shape), p.requires_grad))
    base = {id(p) for p in module.parameters()}
    module = adapters().add_adapter(module, spec)
    new = {id(p) for name, p in module.named_parameters() if id(p) not in base and _WHOLE not in name}
    replace_parameters(module, lambda p: p if id(p) in new else nn.Parameter(p.to("meta"), p.requires_grad))
    return module
