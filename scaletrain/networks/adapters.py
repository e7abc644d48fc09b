"""Adapters by peft: what is trained over a network that stays as it is.

lora (Hu et al., 2021, LoRA), rslora (Kalajdzievski, 2023, rsLoRA), dora (Liu et al., 2024, DoRA), pissa (Meng et al.,
2024, PiSSA), olora (Büyükakyüz, 2024, OLoRA), loftq (Li et al., 2023, LoftQ, one iteration), vera (Kopiczko et al.,
2024, VeRA), ia3 (Liu et al., 2022, (IA)³), prompt (Lester et al., 2021, prompt tuning).

An adapter's folder has peft's own layout; `PeftModel.from_pretrained(base, folder)` reads it as it is. pissa and olora
begin with a part B₀A₀ of each weight W: they train B and A over W - s·B₀A₀. They are stored as what they change of W,
s·(BA - B₀A₀): a LoRA of rank 2r over W itself. Its second half is B₀A₀, which a resume takes out of W again.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scaletrain.config import AdapterSpec
from scaletrain.errors import UserError, did_you_mean
from scaletrain.networks._positions import virtual_tokens

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PARTS = ("pissa", "olora")
_LIKE_LORA = ("lora", "rslora", "dora", "loftq", *_PARTS)


def add_adapter(
    module: nn.Module,
    spec: AdapterSpec,
    new_tokens: range = range(0),
    original: Callable[[], nn.Module] | None = None,
) -> nn.Module:
    """Put a new adapter over a network: only it requires gradients, with the modules of `train_also`.

    What is random is drawn from torch's generator. The network's output is at first unchanged, but for loftq, which
    brings it nearer to that of the network before quantisation, and prompt. A classification head is always trained.
    new_tokens: rows of the embeddings, and of the head, that are trained, too. original: gives the network as it was
    before quantisation, for loftq; an outline needs none. Raises UserError for targets that match no module, and what a
    type cannot do.
    """
    from peft import get_peft_model

    if spec.path:
        return _go_on(module, Path(spec.path))
    _check_names(module, spec)
    with _quiet():
        try:
            adapted = get_peft_model(module, _config(module, spec, new_tokens))
        except ValueError as error:
            raise UserError(f"adapter: {' '.join(str(error).split())}") from error
    _cut_prompt(adapted)
    if spec.type in _PARTS:
        for name, layer in _layers(adapted):
            _begin_with_part(name, layer, spec)
    if spec.type == "loftq" and original is not None:
        before = original()
        for name, layer in _layers(adapted):
            _begin_with_loss(layer, before.get_submodule(name))
    return adapted


def load_adapter(base: nn.Module, folder: Path, spec: AdapterSpec | None = None) -> nn.Module:
    """Put a saved adapter over its base network, to be trained on. Raises UserError when it does not fit.

    spec: what it was made by, where it is one of ours.
    """
    from peft import PeftConfig, get_peft_model

    _saved(folder)
    config: Any = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    parts = spec is not None and spec.type in _PARTS
    if parts:
        config.r, config.lora_alpha = config.r // 2, config.lora_alpha / 2
    try:
        with _quiet():
            adapted = get_peft_model(base, config)
        read_adapter(adapted, folder, parts)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the adapter in {folder} does not fit this network: {error}") from error
    _cut_prompt(adapted)
    return adapted


def read_adapter(module: nn.Module, folder: Path, parts: bool = False) -> None:
    """Read a saved adapter into a network that has one. Raises UserError when it does not fit.

    parts: it began with parts of the weights, which are in the weights still.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    _check_keys(module, folder)
    tensors = load_file(folder / _WEIGHTS)
    if parts or _starts(module):
        for name, layer in _layers(module):
            a, b = f"base_model.model.{name}.lora_A.weight", f"base_model.model.{name}.lora_B.weight"
            rank = tensors[a].shape[0] // 2
            if parts:
                _take_out(layer, tensors[a][rank:], -tensors[b][:, rank:])
            tensors[a], tensors[b] = tensors[a][:rank].contiguous(), tensors[b][:, :rank].contiguous()
    set_peft_model_state_dict(module, tensors)


def save_adapter(module: Any, held: Mapping[str, Any], folder: Path) -> None:
    """Write an adapter in peft's layout. module: a stand-in, which may be changed. held: the weights to write."""
    config = module.peft_config["default"]
    held = dict(held)
    if config.is_prompt_learning:
        module.get_prompt_embedding_to_save = lambda name: held[f"prompt_encoder.{name}.embedding.weight"]
    starts = _starts(module)
    if starts:
        for name, layer in starts.items():
            a, b = (f"base_model.model.{name}.lora_{part}.default.weight" for part in "AB")
            held[a] = torch.cat([held[a], layer.start_A.to(held[a])])
            held[b] = torch.cat([held[b], -layer.start_B.to(held[b])], dim=1)
    module.state_dict = lambda *args, **kwargs: dict(held)
    module.save_pretrained(folder, save_embedding_layers=_embeddings(config))
    if starts:  # in the file alone: peft keeps its configuration in the network itself
        written = json.loads((folder / _CONFIG).read_text())
        written |= {key: 2 * written[key] for key in ("r", "lora_alpha")}
        (folder / _CONFIG).write_text(json.dumps(written, indent=2, sort_keys=True))


def merge_adapter(module: nn.Module, folder: Path) -> nn.Module:
    """Fold a saved adapter into the weights of a network. Raises UserError when it does not fit, or cannot be."""
    adapted: Any = _go_on(module, folder)
    try:
        whole: nn.Module = adapted.merge_and_unload()
    except AttributeError as error:
        raise UserError(f"the adapter in {folder} cannot be folded into weights: it has none that are.") from error
    return whole


# --- new adapters -----------------------------------------------------------------------------------------------------


def _config(module: nn.Module, spec: AdapterSpec, new_tokens: range) -> Any:
    """Return peft's configuration of a new adapter."""
    import peft

    common: dict[str, Any] = {"task_type": _task(module), "modules_to_save": [*spec.train_also] or None}
    targets: Any = "all-linear" if spec.targets is None else spec.targets
    if new_tokens and spec.type not in _LIKE_LORA:
        raise UserError(f"adapter.type: {spec.type} cannot train the embeddings of new tokens: take lora.")
    if spec.type == "vera":
        rank, dropout, first = spec.r or 256, spec.dropout or 0.0, spec.d_initial or 0.1
        return peft.VeraConfig(**common, r=rank, vera_dropout=dropout, d_initial=first, target_modules=targets)
    if spec.type == "ia3":
        if spec.targets is None and spec.feedforward is None:  # peft knows the paper's, of the usual architectures
            return peft.IA3Config(**common)
        return peft.IA3Config(**common, target_modules=targets, feedforward_modules=spec.feedforward or [])
    if spec.type == "prompt":
        if common["task_type"] is None:
            raise UserError(f"adapter.type: prompt is not for a {type(module).__name__}: take lora.")
        return peft.PromptTuningConfig(
            task_type=common["task_type"],
            num_virtual_tokens=virtual_tokens(spec),
            prompt_tuning_init="SAMPLE_VOCAB",
        )
    return peft.LoraConfig(
        **common,
        r=spec.r or 16,
        lora_alpha=spec.alpha or 32,  # type: ignore[arg-type]  # peft divides it by r: any number will do
        lora_dropout=spec.dropout or 0.0,
        use_rslora=spec.type == "rslora",
        use_dora=spec.type == "dora",
        target_modules=targets,
        # peft leaves the heads of whole texts out of `all-linear` by itself, but not those of tokens.
        exclude_modules=["classifier", "score"] if common["task_type"] == "TOKEN_CLS" else None,
        trainable_token_indices=_rows(module, spec, new_tokens) or None,
        ensure_weight_tying=_names_tied(module, spec),
    )


def _rows(module: Any, spec: AdapterSpec, new_tokens: range) -> dict[str, list[int]]:
    """Return which rows of the embeddings, and of a head with a matrix of its own, are trained, by module name."""
    if not new_tokens:
        return {}
    inputs, outputs = module.get_input_embeddings(), module.get_output_embeddings()
    ends = [inputs] if outputs is None or outputs.weight is inputs.weight else [inputs, outputs]
    names = [name for end in ends for name, part in module.named_modules() if part is end]
    return {name: list(new_tokens) for name in names if not any(_ends(name, word) for word in spec.train_also)}


def _layers(adapted: Any) -> Iterator[tuple[str, Any]]:
    """Yield the layers of a LoRA, by their name in the base network."""
    from peft.tuners.lora import LoraLayer

    for name, layer in adapted.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            yield name, layer


def _begin_with_part(name: str, layer: Any, spec: AdapterSpec) -> None:
    """Have an adapter begin with the main part of a weight, which is taken out of the weight."""
    linear = layer.get_base_layer()
    if "default" not in layer.lora_A or (spec.type == "olora" and not isinstance(linear, nn.Linear)):
        raise UserError(f"adapter.type: {spec.type} cannot take a part of `{name}`, a {type(linear).__name__}.")
    if not linear.weight.is_floating_point():
        raise UserError(f"adapter.type: {spec.type} changes weights, which are quantised here: take loftq.")
    if linear.weight.is_meta:
        starts = (torch.zeros(layer.lora_A["default"].weight.shape), torch.zeros(layer.lora_B["default"].weight.shape))
        _remember(layer, *starts)
        return
    whole = linear.weight.data.clone()
    if spec.type == "olora":
        layer.olora_init("default")
    else:
        layer.pissa_init("default", f"pissa_niter_{spec.niter}" if spec.niter else "pissa")
    linear.weight.data = whole  # so that it is taken out in one way, at a start and at a resume
    start = (layer.lora_A["default"].weight.data.float(), layer.lora_B["default"].weight.data.float())
    _take_out(layer, *start)


@torch.no_grad()
def _take_out(layer: Any, a: Tensor, b: Tensor) -> None:
    """Take s · B A out of a weight, and begin with it."""
    for place, value in ((layer.lora_A, a), (layer.lora_B, b)):
        place["default"].weight.data = value.contiguous().clone()
    weight = layer.get_base_layer().weight
    weight.data = (weight.data.float() - layer.get_delta_weight("default").float()).to(weight.dtype)
    _remember(layer, a.contiguous().clone(), b.contiguous().clone())


def _remember(layer: Any, a: Tensor, b: Tensor) -> None:
    """Keep what an adapter began with: it does not change, and its file has it."""
    layer.register_buffer("start_A", a, persistent=False)
    layer.register_buffer("start_B", b, persistent=False)


def _starts(adapted: Any) -> dict[str, Any]:
    """Return the layers that began with a part of their weight, by name."""
    if adapted.peft_config["default"].peft_type != "LORA":
        return {}
    return {name: layer for name, layer in _layers(adapted) if hasattr(layer, "start_A")}


@torch.no_grad()
def _begin_with_loss(layer: Any, original: Any) -> None:
    """Have an adapter begin with the main part of what quantisation took from a weight (LoftQ, equation 7)."""
    from peft.utils.integrations import dequantize_module_weight

    if "default" not in layer.lora_A:
        raise UserError(f"adapter.type: loftq is for linear modules, not a {type(layer.get_base_layer()).__name__}.")
    weight = original.weight if isinstance(original, nn.Linear) else original.weight.T  # GPT-2's Conv1D
    lost = weight.float() - dequantize_module_weight(layer.get_base_layer()).float()
    u, s, v = torch.linalg.svd(lost, full_matrices=False)
    rank, root = layer.r["default"], s.sqrt()
    layer.lora_A["default"].weight.copy_(root[:rank, None] * v[:rank])
    layer.lora_B["default"].weight.copy_(u[:, :rank] * root[:rank] / layer.scaling["default"])


def _cut_prompt(adapted: Any) -> None:
    """Have a network give the logits of the real tokens only, where virtual ones stand before them."""
    config = adapted.peft_config["default"]
    if config.is_prompt_learning and config.task_type in ("CAUSAL_LM", "TOKEN_CLS"):

        def cut(module: nn.Module, args: Any, output: Any) -> Any:
            output.logits = output.logits[:, config.num_virtual_tokens :].clone()  # FSDP2 warns of views
            return output

        adapted.register_forward_hook(cut)


# --- adapters that are there ------------------------------------------------------------------------------------------


def _saved(folder: Path) -> dict[str, Any]:
    """Return the configuration of a saved adapter. Raises UserError."""
    path = folder / _CONFIG
    if not path.is_file() or not (folder / _WEIGHTS).is_file():
        raise UserError(f"adapter: `{folder}` holds no {_CONFIG} and {_WEIGHTS}: it is no adapter of peft's.")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _go_on(module: nn.Module, folder: Path) -> nn.Module:
    """Put the adapter of some folder over a network. Raises UserError when it was made for another."""
    found = _saved(folder)
    start = found.get("init_lora_weights", True)
    if isinstance(start, str) and start not in ("gaussian", "orthogonal", "eva"):
        raise UserError(
            f"the adapter in `{folder}` began with parts of the weights ({start}), which are not in it. Have peft "
            "save it by `path_initial_model_for_weight_conversion`, as a plain LoRA."
        )
    base = Path(found.get("base_model_name_or_path") or "") / "config.json"
    if base.is_file() and hasattr(module, "config"):
        was, now = json.loads(base.read_text()).get("model_type"), module.config.model_type  # type: ignore[union-attr]
        if was != now:
            raise UserError(f"the adapter in `{folder}` was made for a {was} ({base.parent}); this network is a {now}.")
    return load_adapter(module, folder)


def _embeddings(config: Any) -> Any:
    """Return whether peft is to write embeddings beside an adapter: it would, whole, where new rows are trained."""
    return False if getattr(config, "trainable_token_indices", None) else "auto"


def _check_keys(module: nn.Module, folder: Path) -> None:
    """Raise UserError when a saved adapter's weights are not those of a network: peft only warns."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    config = module.peft_config["default"]  # type: ignore[index]
    with safe_open(folder / _WEIGHTS, "pt") as file:
        odd = set(file.keys()) ^ set(get_peft_model_state_dict(module, save_embedding_layers=_embeddings(config)))
    if odd:
        raise UserError(f"the adapter in {folder} does not fit this network: {len(odd)} weights differ, as {min(odd)}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep out what peft warns of and the user can do nothing about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft sets it right, for GPT-2's Conv1D
        warnings.filterwarnings(
            "ignore", message="You have requested `ensure_weight_tying`"
        )  # and nothing tied is named
        warnings.filterwarnings("ignore", message=".*`base_model_name_or_path`")  # of a folder that was moved
        warnings.filterwarnings("ignore", message="for .*: copying from a non-meta parameter")  # to an outline
        yield


def _task(module: nn.Module) -> str | None:
    """Return peft's name of the task, by which it finds heads and passes inputs on."""
    if type(module).__name__.endswith("ForSequenceClassification"):
        return "SEQ_CLS"
    if type(module).__name__.endswith("ForTokenClassification"):
        return "TOKEN_CLS"
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if getattr(module, "can_generate", bool)() else None


def _ends(name: str, word: str) -> bool:
    return name == word or name.endswith(f".{word}")


def _names_tied(module: nn.Module, spec: AdapterSpec) -> bool:
    """Say whether the adapter names an embedding that shares its weight with the head; peft would untie them."""
    if not hasattr(module, "get_output_embeddings"):
        return False
    ends: list[Any] = [module.get_input_embeddings(), module.get_output_embeddings()]  # type: ignore[operator]
    if ends[1] is None or ends[0].weight is not ends[1].weight:
        return False
    words = [*spec.train_also, *(spec.targets if isinstance(spec.targets, list) else [])]
    return any(_ends(name, w) for name, m in module.named_modules() if m in ends for w in words)


def _check_names(module: nn.Module, spec: AdapterSpec) -> None:
    """Raise UserError for a target, or a module to train also, that names nothing; peft would leave it out."""
    names = [name for name, _ in module.named_modules() if name]

    def fail(key: str, word: str) -> None:
        # Blocks repeat: show each ending once.
        endings = list(
            dict.fromkeys(name.rsplit(".", 1)[-1] for name in names if not name.rsplit(".", 1)[-1].isdigit())
        )
        hint = did_you_mean(word, endings)
        raise UserError(
            f"adapter.{key}: no module is called `{word}`.{hint if 'mean' in hint else ''} "
            f"There are {', '.join(f'`{e}`' for e in endings)}."
        )

    if isinstance(spec.targets, str) and spec.targets != "all-linear":
        try:
            if not any(re.fullmatch(spec.targets, name) for name in names):
                fail("targets", spec.targets)
        except re.error as error:
            raise UserError(f"adapter.targets: `{spec.targets}` is no regular expression: {error}.") from error
    lists = {"targets": spec.targets if isinstance(spec.targets, list) else [], "train_also": spec.train_also}
    lists["feedforward"] = spec.feedforward or []
    for key, words in lists.items():
        for word in words:
            if not any(_ends(name, word) for name in names):
                fail(key, word)
    if spec.targets == []:
        raise UserError("adapter.targets is an empty list: name modules, or `all-linear`.")
