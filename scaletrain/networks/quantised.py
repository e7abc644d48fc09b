"""Weights in 4 or 8 bits by bitsandbytes, under transformers' own loader; what is trained over them stays fp32."""

from __future__ import annotations

import logging
import warnings
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaletrain.config import NetworkSpec, QuantizeSpec
from scaletrain.errors import UserError, did_you_mean

_BLOCK = 64
"""Weights that share a scale."""
_SCALES = 256
"""Scales that share one, when they are quantised, too."""


def check(spec: NetworkSpec, key: str) -> None:
    """Raise UserError when a network's weights cannot be quantised as its spec says. key: dotted, of the spec."""
    if spec.quantize is None:
        if spec.adapter is not None and spec.adapter.type == "loftq":
            raise UserError(f"{key}.adapter.type: loftq makes up for quantisation: set {key}.quantize, or take lora.")
        return
    kind = spec.quantize.type
    if not spec.frozen and spec.adapter is None:
        raise UserError(
            f"{key}.quantize: weights in {kind} cannot be trained, which full finetuning does: give the network an "
            "`adapter`, or leave `quantize` out."
        )
    if spec.source is not None:
        raise UserError(
            f"{key}.quantize: what comes by `from` is held as it was there. To hold it in {kind}, export that network, "
            "with --merge if it has an adapter, and give the folder as `path`; or leave `quantize` out."
        )
    if spec.path is None:
        raise UserError(f"{key}.quantize is for pretrained weights: give `path`.")
    if spec.adapter is not None and spec.adapter.merge:
        raise UserError(f"{key}.adapter.merge: adapters cannot be folded into weights in {kind}: leave `quantize` out.")
    if spec.adapter is not None and spec.adapter.type in ("pissa", "olora"):
        raise UserError(f"{key}.adapter.type: {spec.adapter.type} changes weights, which are quantised: take loftq.")
    if spec.adapter is not None and spec.adapter.type == "dora" and kind == "int8":
        raise UserError(
            f"{key}.adapter.type: dora needs the norms of weights, which peft cannot take of int8: take nf4."
        )
    if spec.dtype != "float32":
        raise UserError(f"{key}.dtype: what is not quantised is float32; say {key}.quantize.compute=bfloat16 instead.")
    if spec.shard:
        raise UserError(f"{key}.shard: weights in {kind} are held whole: leave it out.")
    if find_spec("bitsandbytes") is None:
        raise UserError(f"{key}.quantize needs bitsandbytes: pip install 'scaletrain[quant]'.")


def settings_of(spec: QuantizeSpec, module: nn.Module) -> Any:
    """Return what tells transformers to quantise a network while it reads it. module: one like it, without weights."""
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_no_cast)
    if spec.type == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=_kept(spec, module))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.type,
        bnb_4bit_use_double_quant=spec.double,
        bnb_4bit_compute_dtype=getattr(torch, spec.compute or "float32"),
        llm_int8_skip_modules=_kept(spec, module),
    )


def settle(module: nn.Module) -> None:
    """Have bitsandbytes leave 4-bit weights as they are.

    On CPUs that know bf16 it would change them at the first evaluation, to a form that no gradient goes through.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for part in module.modules():
        if isinstance(part, Linear4bit):
            part.support_avx512bf16_for_cpu = False


def _no_cast(record: logging.LogRecord) -> bool:
    return "inputs will be cast" not in record.msg  # bitsandbytes says so at every call


def _linear(module: nn.Module) -> dict[str, nn.Module]:
    from transformers.pytorch_utils import Conv1D

    return {name: part for name, part in module.named_modules() if type(part) in (nn.Linear, Conv1D)}


def _kept(spec: QuantizeSpec, module: nn.Module) -> list[str]:
    """Return the linear modules that stay as they are: outside the base network, tied to embeddings, or in `skip`."""
    names, base = _linear(module), f"{getattr(module, 'base_model_prefix', '')}."
    inputs = getattr(module, "get_input_embeddings", lambda: None)()
    tied = {name for name, part in names.items() if inputs is not None and part.weight is inputs.weight}
    for word in spec.skip:
        if not any(f".{word}." in f".{name}." for name in names):
            endings = dict.fromkeys(part for name in names for part in name.split(".") if not part.isdigit())
            hint = did_you_mean(word, list(endings))
            raise UserError(f"quantize.skip: no linear module is in a `{word}`.{hint}")
    return [
        name
        for name in names
        if not name.startswith(base) or name in tied or any(f".{word}." in f".{name}." for word in spec.skip)
    ]


def is_quantised(module: nn.Module) -> bool:
    """Say whether some weights of a network, or of what its adapter is over, are quantised."""
    return any(isinstance(p, Packed) or type(p).__module__.startswith("bitsandbytes.") for p in module.modules())


def dequantised(module: Any) -> nn.Module:
    """Give a network plain linear modules with the weights that its quantised ones stand for, in fp32; used up.

    An adapter goes over the plain modules: those of peft's for quantised ones round again what they merge.
    """
    whole = module.get_base_model() if hasattr(module, "peft_config") else module
    if hasattr(whole, "hf_quantizer"):  # by it, and by these, the libraries would take it for quantised still
        whole.hf_quantizer.remove_quantization_config(whole)
        whole.is_loaded_in_4bit = whole.is_loaded_in_8bit = False
    if whole is not module:
        from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

        config, held = module.peft_config["default"], get_peft_model_state_dict(module, save_embedding_layers=False)
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft sets it right, for GPT-2's Conv1D
            adapted = get_peft_model(dequantised(module.unload()), config)
        set_peft_model_state_dict(adapted, held)
        return adapted
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
    from peft.utils.integrations import dequantize_module_weight
    from transformers.pytorch_utils import Conv1D

    for name, part in list(module.named_modules()):
        if isinstance(part, (Linear4bit, Linear8bitLt, Packed)):
            weight = dequantize_module_weight(part).detach().float()
            with torch.device("meta"):
                turned = getattr(part, "source_cls", nn.Linear) is Conv1D
                plain: Any = (Conv1D if turned else nn.Linear)(*(weight.shape if turned else reversed(weight.shape)))
            plain.weight = nn.Parameter((weight.T if turned else weight).contiguous(), requires_grad=False)
            plain.bias = part.bias
            module.set_submodule(name, plain)
    return module


# --- outlines ---------------------------------------------------------------------------------------------------------


def pack(module: nn.Module, spec: QuantizeSpec) -> None:
    """Give a network without weights, in place, stand-ins for quantised modules, of the size of the real ones."""
    kept = _kept(spec, module)
    for name, part in _linear(module).items():
        if name not in kept:
            weight: Any = part.weight
            inputs, outputs = weight.shape[::-1] if isinstance(part, nn.Linear) else weight.shape  # GPT-2's Conv1D
            packed = Packed(inputs, outputs, part.bias, spec)
            packed.source_cls = type(part)  # type: ignore[assignment]  # as transformers notes it
            module.set_submodule(name, packed)


class Packed(nn.Linear):
    """Takes the memory of a quantised linear module, and computes in the manner of one; its weights mean nothing."""

    def __init__(self, inputs: int, outputs: int, bias: Any, spec: QuantizeSpec):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = inputs, outputs, bias
        self._compute: torch.dtype = getattr(torch, spec.compute or "float32")
        number, scales = inputs * outputs, -(-inputs * outputs // _BLOCK)
        if spec.type == "int8":
            self._compute = torch.float16
            weight, sizes = torch.empty(outputs, inputs, dtype=torch.int8, device="meta"), {torch.float32: outputs}
        else:
            weight, sizes = torch.empty(-(-number // 2), 1, dtype=torch.uint8, device="meta"), {torch.float32: scales}
            if spec.double:
                sizes = {torch.uint8: scales, torch.float32: -(-scales // _SCALES)}
        self.weight = nn.Parameter(weight, requires_grad=False)
        for number, (dtype, size) in enumerate(sizes.items()):
            self.register_buffer(f"scales_{number}", torch.zeros(size, dtype=dtype), persistent=False)

    @property
    def W_q(self) -> Tensor:
        """The weight as it is held; by it peft knows that there is `dequantize`."""
        return self.weight

    def dequantize(self) -> Tensor:
        """Return a weight of the whole size."""
        return torch.zeros(self.out_features, self.in_features, dtype=self._compute, device=self.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the whole weight, which is there for this time only."""
        found: Tensor = _Product.apply(x.to(self._compute), self)
        return (found if self.bias is None else found + self.bias).to(x.dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ that keeps neither for the backward pass."""

    @staticmethod
    def forward(context: Any, x: Tensor, module: Packed) -> Tensor:
        context.module = module
        return F.linear(x, module.dequantize())

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ context.module.dequantize(), None
