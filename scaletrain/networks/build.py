"""From a `NetworkSpec` to a module, and from a module to its folder and back."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from scaletrain.config import NetworkSpec
from scaletrain.errors import UserError, did_you_mean
from scaletrain.explain import decode


def network_module(type_: str, key: str) -> ModuleType:
    """Import the module that a network's `type` names. Raises UserError with the known types."""
    known = {p.stem for p in Path(__file__).parent.glob("[!_]*.py")} - {"build", "adapters"}
    if type_ not in known:
        raise UserError(f"{key}.type: no network is called `{type_}`.{did_you_mean(type_, known)}")
    return importlib.import_module(f"scaletrain.networks.{type_}")


def build(name: str, spec: NetworkSpec, base: nn.Module | None = None, saved: Path | None = None) -> nn.Module:
    """Build one network on the CPU.

    base: the network that it continues from (`from`), if any; used up. saved: its own folder in a checkpoint, if it is
    being resumed. Weights that come from neither, nor from `path`, are drawn from torch's global generator.
    """
    if spec.adapter is None:
        module = _merged(base) if base is not None and saved is None else _whole(name, spec, saved)
    elif base is not None and hasattr(base, "peft_config"):
        module = base  # goes on training the adapter that is there
        if saved:
            module.load_adapter(str(saved), "default", is_trainable=True)  # type: ignore[operator]
    else:
        whole = _whole(name, spec, None) if base is None else base
        module = _adapters().load_adapter(whole, saved) if saved else _adapters().add_adapter(whole, spec.adapter)
    if spec.frozen:
        module.requires_grad_(False)
    return module


def _adapters() -> ModuleType:
    """Import peft only for those who name an adapter."""
    return importlib.import_module("scaletrain.networks.adapters")


def _merged(module: nn.Module) -> nn.Module:
    """Fold an adapter into the weights, where there is one."""
    if not hasattr(module, "peft_config"):
        return module.requires_grad_(True)
    whole: nn.Module = module.merge_and_unload()  # type: ignore[operator]
    return whole.requires_grad_(True)


def _whole(name: str, spec: NetworkSpec, folder: Path | None) -> nn.Module:
    """Build a network without an adapter, with weights from a folder, from `path`, or new."""
    key = f"networks.{name}"
    if spec.type is None:
        raise UserError(f"{key}.type is missing: say which network it is.")
    factory = network_module(spec.type, key)
    config = decode(factory.Config, spec.config, f"{key}.config")
    dtype: torch.dtype = getattr(torch, spec.dtype)
    path = str(folder) if folder else spec.path
    if path is not None and hasattr(factory, "load"):
        loaded: nn.Module = factory.load(path, config, dtype)
        return loaded
    module: nn.Module = factory.build(config).to(dtype)
    if path is not None:
        read_weights(module, Path(path), key)
    return module


def read_weights(module: nn.Module, folder: Path, key: str) -> None:
    """Read `model.safetensors` into a module. Raises UserError when names or shapes do not agree."""
    from safetensors.torch import load_file

    try:
        module.load_state_dict(load_file(folder / "model.safetensors"))
    except FileNotFoundError:
        raise UserError(f"{key}: there is no model.safetensors in {folder}.") from None
    except RuntimeError as error:
        raise UserError(f"{key}: the weights in {folder} do not fit this network: {error}") from None


def save(module: nn.Module, spec: NetworkSpec, folder: Path, state: Mapping[str, Any] | None = None) -> None:
    """Write a network in its library's own layout, or as `config.json` and `model.safetensors`.

    state: the weights to write, by default those that it has; with a copy of them it may be trained on meanwhile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = module.state_dict() if state is None else dict(state)
    if hasattr(module, "save_pretrained"):
        # The libraries ask the network for its weights and its class: have a stand-in answer with these, and without
        # the class that FSDP2 puts before the network's own.
        kind = next(c for c in type(module).__mro__ if not c.__name__.startswith("FSDP"))
        still: nn.Module = object.__new__(kind)
        still.__dict__.update(module.__dict__)
        still.state_dict = lambda *args, **kwargs: dict(held)  # type: ignore[assignment]
        still.save_pretrained(folder)  # type: ignore[operator]
        return
    from safetensors.torch import save_file

    tensors = {k: v.detach().cpu().contiguous() for k, v in held.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"type": spec.type, "config": spec.config}, indent=2) + "\n")
