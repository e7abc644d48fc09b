"""Low-rank adapters by peft: LoRA (Hu et al., 2021), rsLoRA (Kalajdzievski, 2023), DoRA (Liu et al., 2024).

An adapter's folder has peft's own layout; `PeftModel.from_pretrained(base, folder)` reads it as it is.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from scaletrain.config import AdapterSpec
from scaletrain.errors import UserError, did_you_mean


def add_adapter(module: nn.Module, spec: AdapterSpec) -> nn.Module:
    """Put a new adapter over a network: only it requires gradients, with the modules of `train_also`.

    The matrices A are drawn from torch's generator and B is 0, so that the network's output is at first unchanged. A
    classification head is always trained. Raises UserError for targets that match no module.
    """
    from peft import LoraConfig, get_peft_model

    _check_names(module, spec)
    config: Any = LoraConfig(
        task_type=_task(module),
        r=spec.r,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # peft divides it by r: any number will do
        lora_dropout=spec.dropout,
        use_rslora=spec.type == "rslora",
        use_dora=spec.type == "dora",
        target_modules=spec.targets,
        modules_to_save=spec.train_also or None,
        ensure_weight_tying=_names_tied(module, spec),
        # peft leaves the heads of whole texts out of `all-linear` by itself, but not those of tokens.
        exclude_modules=["classifier", "score"] if _task(module) == "TOKEN_CLS" else None,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft sets it right, for GPT-2's Conv1D
        warnings.filterwarnings(
            "ignore", message="You have requested `ensure_weight_tying`"
        )  # and nothing tied is named
        return get_peft_model(module, config)


def load_adapter(base: nn.Module, folder: Path) -> nn.Module:
    """Put a saved adapter over its base network, to be trained on. Raises UserError when it does not fit."""
    from peft import PeftModel

    try:
        adapted = PeftModel.from_pretrained(base, str(folder), is_trainable=True)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the adapter in {folder} does not fit this network: {error}") from error
    _check_keys(adapted, folder)
    return adapted


def read_adapter(module: nn.Module, folder: Path) -> None:
    """Read a saved adapter into a network that has one. Raises UserError when it does not fit."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    _check_keys(module, folder)
    set_peft_model_state_dict(module, load_file(folder / "adapter_model.safetensors"))


def _check_keys(module: nn.Module, folder: Path) -> None:
    """Raise UserError when a saved adapter's weights are not those of a network: peft only warns."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        odd = set(file.keys()) ^ set(get_peft_model_state_dict(module))
    if odd:
        raise UserError(f"the adapter in {folder} does not fit this network: {len(odd)} weights differ, as {min(odd)}")


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
    words = [*spec.train_also, *([] if isinstance(spec.targets, str) else spec.targets)]
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
    lists = {"targets": [] if isinstance(spec.targets, str) else spec.targets, "train_also": spec.train_also}
    for key, words in lists.items():
        for word in words:
            if not any(_ends(name, word) for name in names):
                fail(key, word)
    if spec.targets == []:
        raise UserError("adapter.targets is an empty list: name modules, or `all-linear`.")
