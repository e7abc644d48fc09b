"""Quantised networks of transformers, by torchao and bitsandbytes: as its `from_pretrained` makes and loads them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scaletrain.config import QuantizeMethod
from scaletrain.errors import UserError

GROUP = 32


def require_torchao(key: str) -> None:
    """Raise UserError where torchao is not installed."""
    if find_spec("torchao") is None:
        raise UserError(f"{key} needs torchao: pip install -c constraints.txt -e '.[quant]'.")


def linear_layers(module: Any, group: int | None, key: str) -> set[str]:
    """Return the names of the linear layers in a network's body: heads, which may be tied, are left as they are.

    group: how many weights of a row are to share a scale, if not all. Raises UserError when rows do not divide, or
    there is no such layer.
    """
    prefix = getattr(module, "base_model_prefix", "")
    found = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and (name.startswith(f"{prefix}.") or not hasattr(module, prefix))
    }
    if not found:
        raise UserError(f"{key}: {type(module).__name__} has no linear layers that can be quantised.")
    for name, layer in found.items():
        if group and layer.in_features % group:
            raise UserError(
                f"{key}: groups of {group} do not divide the {layer.in_features} inputs of `{name}`: take another."
            )
    return set(found)


def qat_config(method: str, group: int | None) -> Any:
    """Return torchao's description of how weights are rounded: symmetrically, a scale for a row or a group of it."""
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup

    if method == "int4":
        # The packed formats of torchao 0.18 are for GPUs; this one keeps a byte for a weight, and runs everywhere.
        int4 = torch.int4  # type: ignore[attr-defined]
        return IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerGroup(group or GROUP))
    return IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))


def _library_config(module: Any, method: QuantizeMethod, group: int | None) -> Any:
    """Return transformers' description of a method for a network of this shape."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    chosen = linear_layers(module, (group or GROUP) if method == "int4" else None, f"--quantize {method}")
    left = [n for n, layer in module.named_modules() if isinstance(layer, nn.Linear) and n not in chosen]
    if method == "bnb-int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=left)
    if method == "bnb-nf4":
        for name in sorted(chosen):
            layer = module.get_submodule(name)
            if layer.out_features % 32 or layer.in_features % 64:
                raise UserError(
                    f"--quantize {method}: on a CPU bitsandbytes takes 32 outputs and 64 inputs together, and `{name}` "
                    f"has {layer.out_features} and {layer.in_features}: take int4."
                )
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=next(module.parameters()).dtype,
            llm_int8_skip_modules=left,
        )
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    kinds = {"int8": Int8WeightOnlyConfig, "int8-dynamic": Int8DynamicActivationInt8WeightConfig}
    return TorchAoConfig(kinds[method]() if method in kinds else qat_config(method, group), modules_to_not_convert=left)


def reloaded(
    module: Any, folder: Path, dtype: str | None = None, method: QuantizeMethod | None = None, group: int | None = None
) -> nn.Module:
    """Load a folder of transformers in another type, or quantised. module: the network in it.

    Raises UserError when it cannot be quantised by this method.
    """
    config = None
    if method:
        library = "bitsandbytes" if method.startswith("bnb") else "torchao"
        if find_spec(library) is None:
            raise UserError(f"--quantize {method} needs {library}: pip install -c constraints.txt -e '.[quant]'.")
        config = _library_config(module, method, group)
    how = {"dtype": dtype or "auto", "quantization_config": config, "device_map": "cpu"}
    found: nn.Module = type(module).from_pretrained(folder, **how)
    return found.eval()
