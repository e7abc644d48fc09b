"""What makes a step need less memory or time without changing what it computes: recompute, offload, compile.

All three work on the blocks of a network (`blocks`), by its `forward`, so that hooks of engines stay outside: the
weights of a block are gathered once for the whole of it. A block computes offloaded(compiled(recomputed(forward))).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from scaletrain.config import TrainSpec
from scaletrain.engine.blocks import blocks
from scaletrain.errors import UserError

Forward = Callable[..., Any]

_aten = torch.ops.aten
_PRODUCTS = frozenset(
    (_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default, _aten.convolution.default)
)
_ATTENTION = frozenset(
    (
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
    )
)
_UNCACHED = {"use_cache": False, "past_key_values": None, "layer_past": None}
"""Arguments of transformers' blocks that a second forward pass would write to again."""
_VARIANTS = 64
"""Forms that torch may compile blocks of one class in, over all networks: with a mask or without, of a fixed length or
of any. What comes after them would not be compiled at all."""
_WORTH_MOVING = 1 << 20
"""Bytes from which a tensor is moved off the GPU."""


def save(spec: TrainSpec, networks: Mapping[str, nn.Module], device: torch.device) -> None:
    """Apply what a recipe asks for to the trained networks, in place, before an engine wraps them. Raises UserError."""
    if spec.compile != "off":
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    for name, network in networks.items():
        found = blocks(network)
        for module in network.modules() if spec.compile != "off" else ():
            if hasattr(module, "packs"):  # into shapes that differ from batch to batch: each would be compiled anew
                module.packs = False  # type: ignore[assignment]
        if spec.recompute != "off" and not found:
            raise UserError(f"train.recompute: network `{name}` has no list of blocks to recompute; set it to off.")
        for block in found.values():
            if spec.recompute != "off":
                block.forward = recomputed(block, block.forward, spec.recompute == "selective")
            if spec.compile == "blocks":
                block.forward = torch.compile(block.forward)
        if spec.compile == "network" or (spec.compile == "blocks" and not found):
            network.compile()
        if spec.offload_activations and device.type != "cpu":
            for block in list(found.values()) or [network]:
                block.forward = offloaded(block, block.forward)


def recomputed(block: nn.Module, forward: Forward, selective: bool) -> Forward:
    """Keep the inputs only, and compute again in the backward pass what it needs (Chen et al., 2016).

    selective: keep what is dear to compute, too: the results of attention and of every second matrix product and
    convolution (Korthikanti et al., 2022, section 5; torchtitan's choice). Dropout draws the same mask again, and
    BatchNorm's statistics move once.
    """
    norms = [m for m in block.modules() if isinstance(m, _NormBase) and m.track_running_stats]

    def contexts() -> tuple[Any, Any]:
        first, again = _choice() if selective else (nullcontext(), nullcontext())
        return first, _without_statistics(norms, again)

    @wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        kwargs |= {name: value for name, value in _UNCACHED.items() if name in kwargs}
        how: dict[str, Any] = {"context_fn": _choice} if selective else {}
        if norms and not torch.compiler.is_compiling():  # a compiled graph moves them in its forward part alone
            how = {"context_fn": contexts}
        return checkpoint(forward, *args, use_reentrant=False, **how, **kwargs)

    return call


def _choice() -> tuple[Any, Any]:
    """Return the contexts of a forward pass and of its repetition, which choose alike what is kept."""
    products = {False: 0, True: 0}

    def policy(context: Any, function: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if function in _PRODUCTS:
            products[context.is_recompute] += 1
            keep = products[context.is_recompute] % 2 == 1
        else:  # what draws random numbers is repeated, always: else what comes after would draw others
            keep = function in _ATTENTION and not _dropout(function, args, kwargs)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


@contextmanager
def _without_statistics(norms: Sequence[_NormBase], context: AbstractContextManager[Any]) -> Iterator[None]:
    """Have BatchNorm leave its running statistics as they are, inside a context."""
    momenta = [norm.momentum for norm in norms]
    counts = [(n, n.clone()) for norm in norms if (n := norm.num_batches_tracked) is not None]
    for norm in norms:
        norm.momentum = 0.0
    try:
        with context:
            yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for count, before in counts:
            count.copy_(before)


def _dropout(attention: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    place = [argument.name for argument in attention._schema.arguments].index("dropout_p")
    return float(args[place] if place < len(args) else kwargs.get("dropout_p", 0.0))


def offloaded(block: nn.Module, forward: Forward) -> Forward:
    """Keep in host memory what the backward pass of a block needs, but for its weights and what is under a MiB.

    Copies are in the order of the GPU's other work, from and to pinned memory; the host waits for none.
    """

    @wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with _host(block):
            return forward(*args, **kwargs)

    return call


def _is_weight(address: int, block: nn.Module) -> bool:
    """Whether a parameter stands at an address; now, since engines gather them only when a module is called."""
    return any(p.untyped_storage().data_ptr() == address for p in block.parameters() if not p.is_meta)


@contextmanager
def _host(block: nn.Module) -> Iterator[None]:
    """Move the memory of what is saved inside: once, whatever parts and forms of it are saved."""
    moved: dict[Any, tuple[Tensor, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        storage = tensor.untyped_storage()
        if storage.nbytes() < _WORTH_MOVING or _is_weight(storage.data_ptr(), block):
            return tensor
        key = (storage.data_ptr(), tensor.dtype, tensor._version)
        if key not in moved:
            flat = tensor.detach().as_strided((storage.nbytes() // tensor.element_size(),), (1,), 0)
            copy = torch.empty_like(flat, device="cpu", pin_memory=flat.is_cuda)
            moved[key] = (flat, copy.copy_(flat, non_blocking=True))  # holding it keeps its address its own
        copy, device = moved[key][1], tensor.device
        form = (tensor.shape, tensor.stride(), tensor.storage_offset())
        return lambda: copy.to(device, non_blocking=True).as_strided(*form)

    def unpack(packed: Tensor | Callable[[], Tensor]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed()

    try:
        with saved_tensors_hooks(pack, unpack):
            yield
    finally:
        moved.clear()
