"""From a `NetworkSpec` to a module, and from a module to its folder and back."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from scaletrain.config import NetworkSpec
from scaletrain.errors import UserError, did_you_mean
from scaletrain.explain import decode
from scaletrain.networks._transformers import TransformersConfig, new_tokens
from scaletrain.networks.quantised import dequantised, is_quantised


def network_module(type_: str, key: str) -> ModuleType:
    """Import the module that a network's `type` names. Raises UserError with the known types."""
    files = Path(__file__).parent.glob("[!_]*.py")
    known = {p.stem for p in files if re.search(r"^class Config\(", p.read_text("utf-8"), re.MULTILINE)}
    if type_ not in known:
        raise UserError(f"{key}.type: no network is called `{type_}`.{did_you_mean(type_, known)}")
    return importlib.import_module(f"scaletrain.networks.{type_}")


def build(name: str, spec: NetworkSpec, base: nn.Module | None = None, saved: Path | None = None) -> nn.Module:
    """Build one network on the CPU.

    base: the network that it continues from (`from`), if any; used up. saved: its own folder in a checkpoint, if it is
    being resumed. Weights that come from neither, nor from `path`, are drawn from torch's global generator.
    """
    if spec.adapter is None:
        module = grown(name, _merged(base), spec) if base is not None and saved is None else _whole(name, spec, saved)
    elif base is not None and hasattr(base, "peft_config"):
        module = base  # goes on training the adapter that is there
        if saved:
            adapters().read_adapter(module, saved)
    else:
        if base is not None and spec.adapter.merge:
            raise UserError(f"networks.{name}.adapter.merge is for a network that comes from `path`.")
        whole = base_of(name, spec) if base is None else grown(name, unrounded(base), spec)
        if saved:
            module = adapters().load_adapter(whole, saved, spec.adapter)
        else:
            plain = spec.model_copy(update={"quantize": None})
            tokens = _new_tokens(name, spec) if base is None else range(0)
            module = adapters().add_adapter(whole, spec.adapter, tokens, lambda: base_of(name, plain))
    return _finished(name, module, spec)


def grown(name: str, base: nn.Module, spec: NetworkSpec) -> nn.Module:
    """Return a network that is told what its `config` adds to what `base`, which it goes on from, is told.

    It answers as `base` does until the new parts are trained: these begin at 0. Raises UserError for a config that
    makes another network; the first tensor that does not fit is named.
    """
    settings = getattr(base, "settings", None)
    if not spec.config or settings is None:
        return base
    factory = importlib.import_module(type(base).__module__)
    wanted = {**settings.model_dump(), **spec.config}
    if wanted == settings.model_dump():
        return base
    module: nn.Module = factory.build(decode(factory.Config, wanted, f"networks.{name}.config"))
    module.to(next(base.parameters()).dtype)
    state, own = base.state_dict(), module.state_dict()
    for key in [*state, *own]:
        here, there = (str(tuple(s[key].shape)) if key in s else "not there" for s in (own, state))
        # A part that `base` has not must begin at 0. Of an outline, whose values are not there, that is not known yet.
        if here != there and (key in state or (not own[key].is_meta and own[key].any())):
            raise UserError(
                f"networks.{name}.config makes another network than the one that it goes on from: `{key}` is {here}, "
                f"there it is {there}. Leave `config` out, or `from`."
            )
    told = {"classes", "guidance", "target", "text"}
    if other := [k for k, v in spec.config.items() if k not in told and getattr(settings, k, v) != v]:
        raise UserError(
            f"networks.{name}.config.{other[0]} is {spec.config[other[0]]!r}, and the network that it goes on from has "
            f"{getattr(settings, other[0])!r}: leave it out."
        )
    module.load_state_dict(state, strict=False)
    return module


def base_of(name: str, spec: NetworkSpec) -> nn.Module:
    """Build the network that an adapter goes over, with the adapters folded in that it names. Raises UserError."""
    module = _whole(name, spec, None)
    for folder in spec.adapter.merge if spec.adapter else ():
        module = adapters().merge_adapter(module, Path(folder))
    return module


def own_base(name: str, spec: NetworkSpec) -> bool:
    """Whether an adapter's base is not what its `path` holds, so that it must be exported with it."""
    if spec.adapter is None or spec.path is None:
        return False
    return bool(spec.adapter.merge) or bool(_new_tokens(name, spec))


def _train_only(module: nn.Module, expressions: str | list[str], key: str) -> None:
    """Have only parameters require gradients in whose name a regular expression is found. Raises UserError."""
    words = [expressions] if isinstance(expressions, str) else expressions
    names = [name for name, _ in module.named_parameters()]
    for word in words:
        try:
            found = any(re.search(word, name) for name in names)
        except re.error as error:
            raise UserError(f"{key}: `{word}` is no regular expression: {error}.") from error
        if not found:
            ends = dict.fromkeys(".".join(name.split(".")[-2:]) for name in names)
            there = ", ".join(f"`{end}`" for end in ends)
            raise UserError(f"{key}: `{word}` is in no parameter's name. There are {there}.")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(any(re.search(word, name) for word in words))


def outline(name: str, spec: NetworkSpec, base: nn.Module | None = None, saved: Path | None = None) -> nn.Module:
    """Build one network without its weights: as `build` does, but parameters are on the meta device.

    Only configurations are read. Names, shapes, types, ties and requires_grad are those that `build` gives. Buffers
    are on the CPU with the values that they begin with. base: the outline of the network that it continues from; used
    up. saved: as for `build`. Raises UserError.
    """
    with _without_weights():
        if base is not None and (saved is None or spec.adapter is not None):
            module = grown(name, _merged(base) if spec.adapter is None else unrounded(base), spec)
        else:
            module = _whole(name, spec, None if spec.adapter else saved, empty=True)
        if spec.adapter is not None and not hasattr(module, "peft_config"):
            tokens = _new_tokens(name, spec) if base is None else range(0)
            module = adapters().add_adapter(module, spec.adapter, tokens)
    return _finished(name, module, spec)


@contextmanager
def _without_weights() -> Iterator[None]:
    """Have parameters go to the meta device as modules register them; accelerate's context would untie tied ones."""
    register = nn.Module.register_parameter

    def empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = empty  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _finished(name: str, module: nn.Module, spec: NetworkSpec) -> nn.Module:
    """Do what does not depend on where a network came from."""
    if spec.qat:
        qat().prepare(module, spec.qat, f"networks.{name}.qat")
    if spec.adapter is None and spec.trainable is not None:
        _train_only(module, spec.trainable, f"networks.{name}.trainable")
    if spec.frozen:
        module.requires_grad_(False)
    return module


def qat() -> ModuleType:
    """Import what rounds weights in training, with torchao, for those who ask for it."""
    return importlib.import_module("scaletrain.networks._qat")


def adapters() -> ModuleType:
    """Import what puts adapters over networks, with peft, for those who name one."""
    return importlib.import_module("scaletrain.networks.adapters")


def unrounded(module: nn.Module) -> nn.Module:
    """Have a network that was trained for being quantised compute in float again."""
    return qat().revert(module) if hasattr(module, "quantisation") else module


def _merged(module: nn.Module) -> nn.Module:
    """Fold an adapter into the weights, where there is one; all are then such as can be trained."""
    if is_quantised(module):
        module = dequantised(module)
    if not hasattr(module, "peft_config"):
        return unrounded(module).requires_grad_(True)
    whole: nn.Module = module.merge_and_unload()  # type: ignore[operator]
    return whole.requires_grad_(True)


def _whole(name: str, spec: NetworkSpec, folder: Path | None, empty: bool = False) -> nn.Module:
    """Build a network without an adapter, with weights from a folder, from `path`, or new. empty: read no weights."""
    key = f"networks.{name}"
    if spec.type is None:
        raise UserError(f"{key}.type is missing: say which network it is.")
    factory = network_module(spec.type, key)
    config = _config(factory, name, spec)
    dtype: torch.dtype = getattr(torch, spec.dtype)
    path = str(folder) if folder else spec.path
    if path is not None and hasattr(factory, "load"):
        loaded: nn.Module = (factory.outline if empty else factory.load)(path, config, dtype)
        return loaded
    if spec.quantize is not None:
        raise UserError(f"{key}.quantize is for networks of transformers, which {spec.type} is not: leave it out.")
    module: nn.Module = factory.build(config).to(dtype)
    if path is not None and not empty:
        read_weights(module, Path(path), key)
    return module


def _config(factory: ModuleType, name: str, spec: NetworkSpec) -> Any:
    """Decode a network's `config`. Raises UserError."""
    config = decode(factory.Config, spec.config, f"networks.{name}.config")
    if isinstance(config, TransformersConfig):
        config.read_as(spec)
    return config


def _new_tokens(name: str, spec: NetworkSpec) -> range:
    """Return the rows that a pretrained network's embeddings get beside those in its files."""
    if spec.path is None or "vocab_size" not in spec.config:
        return range(0)
    return new_tokens(spec.path, _config(network_module(str(spec.type), f"networks.{name}"), name, spec))


def read_weights(module: nn.Module, folder: Path, key: str) -> None:
    """Read the safetensors files of a folder into a module. Raises UserError when names or shapes do not agree."""
    from scaletrain.checkpoint.tensors import Tensors

    tensors = Tensors(folder)
    if not tensors:
        raise UserError(f"{key}: there is no model.safetensors in {folder}.")
    try:
        module.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise UserError(f"{key}: the weights in {folder} do not fit this network: {error}") from None


def save(module: nn.Module, spec: NetworkSpec, folder: Path, state: Mapping[str, Any] | None = None) -> None:
    """Write a network in its library's own layout, or as `config.json` and `model.safetensors`.

    state: the weights to write, by default those that it has; with a copy of them it may be trained on meanwhile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = module.state_dict() if state is None else dict(state)
    if hasattr(module, "save_pretrained"):
        # The libraries ask the network for its weights and its class: have a stand-in answer with these.
        still: nn.Module = object.__new__(_kind(module))
        still.__dict__.update(module.__dict__)
        if hasattr(module, "peft_config"):
            adapters().save_adapter(still, held, folder)
            return
        still.state_dict = lambda *args, **kwargs: dict(held)  # type: ignore[assignment]
        still.save_pretrained(folder)  # type: ignore[operator]
        return
    from safetensors.torch import save_file

    tensors = {k: v.detach().cpu().contiguous() for k, v in held.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_config(module, spec, folder)


def save_config(module: nn.Module, spec: NetworkSpec, folder: Path) -> None:
    """Write what a network is, without its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    if not hasattr(module, "save_pretrained"):
        (folder / "config.json").write_text(json.dumps({"type": spec.type, "config": spec.config}, indent=2) + "\n")
        return
    config: Any = copy(module.config)
    config.architectures = [_kind(module).__name__]
    config.dtype = next(module.parameters()).dtype
    config.save_pretrained(folder)
    if getattr(module, "can_generate", bool)():
        module.generation_config.save_pretrained(folder)  # type: ignore[union-attr, operator]


def _kind(module: nn.Module) -> type[nn.Module]:
    """Return a network's class, without the one that FSDP2 puts before it."""
    return next(c for c in type(module).__mro__ if not c.__name__.startswith("FSDP"))


def own_names(module: nn.Module, kinds: Mapping[str, Any]) -> bool:
    """Whether a network's library keeps its weights under the names, and in the shapes, that they have in it.

    kinds: by name, what has a shape and a dtype.
    """
    if not hasattr(module, "save_pretrained"):
        return True
    try:
        from transformers import PreTrainedModel
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # versions that convert nothing
        return True
    if not isinstance(module, PreTrainedModel):
        return False
    meta = {name: torch.empty(kind.shape, dtype=kind.dtype, device="meta") for name, kind in kinds.items()}
    return dict(revert_weight_conversion(module, dict(meta))).keys() == meta.keys()
