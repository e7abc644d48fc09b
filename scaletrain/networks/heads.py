"""Losses of a language model from its last hidden states, a part of the places at a time: the logits never exist whole.

A causal language model of transformers made `reducing` takes three more arguments: `learned`, the places at which
something is learned; `reduction`, what is made of their logits; and `others`, what the reduction needs beside them. It
then returns what the reduction gives in place of its output. The call goes through the network's own `forward`, and
through that of its head, so that every wrapper that gathers weights sees it.

Shapes: B sequences, T positions, K learned places of all B · T, C of them at a time, H hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

Reduction = Callable[..., Tensor]
"""(logits (C, V) float32, *others (C, ...)) -> sums (S,), of which the first is trained on and the others are figures;
or, with `per_token`, values (C, ...), all of which are trained on."""

ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Logits that exist at a time."""


STATES = ("hidden_states", "attentions")
"""What a network returns of every layer where `output_hidden_states` or `output_attentions` asks for it."""


def reducing(model: nn.Module) -> nn.Module:
    """Have a causal language model of transformers take a reduction; one whose head is no plain matrix stays as it is."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if type(head) is nn.Linear:
        head.__class__ = Head
        model.__class__ = _reducing_class(type(model))
    return model


def reduce(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    learned: Tensor,
    reduction: Reduction,
    others: Sequence[Tensor] = (),
    per_token: bool = False,
) -> Tensor:
    """Return what a reduction makes of a network's logits at the learned places.

    inputs: of the network's `forward`: input_ids (B, T), perhaps position_ids or attention_mask (B, T). learned: (K,)
    places in the flattened (B · T). others: each (K, ...). Where the network takes no reduction, the logits of all
    places exist at a time.
    """
    if takes_reduction(model):
        found: Tensor = model(
            **inputs, use_cache=False, learned=learned, reduction=reduction, others=others, per_token=per_token
        )
        return found
    logits = model(**inputs, use_cache=False).logits
    width = next(iter(inputs.values())).shape[1]
    logits = logits[:, -width:].flatten(0, 1).index_select(0, learned)  # without places that a prompt's adapter adds
    return reduction(_wide(logits), *others)


def takes_reduction(model: nn.Module) -> bool:
    """Say whether a network, wrapped or not, was made `reducing` and has its plain head still."""
    for part in model.modules():
        if isinstance(part, Reducing):
            configs: Mapping[str, Any] = getattr(model, "peft_config", {})
            prompts = any(getattr(config, "is_prompt_learning", False) for config in configs.values())
            return not prompts and _plain(part.get_output_embeddings()) is not None
    return False


class Head(nn.Linear):
    """An output matrix that can hand its logits to a reduction."""

    def forward(
        self,
        input: Tensor,
        reduction: Reduction | None = None,
        others: Sequence[Tensor] = (),
        per_token: bool = False,
        shape: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return logits, or, of hidden states (K, H), what the reduction makes of them. shape: what follows the matrix."""
        if reduction is None:
            return super().forward(input)
        whole = reduction if shape is None else functools.partial(_shaped, reduction, shape)
        return (_per_token if per_token else _summed)(input, self.weight, self.bias, whole, others)


class Reducing:
    """What comes before a transformers class to have it take a reduction."""

    def forward(
        self,
        *args: Any,
        learned: Tensor | None = None,
        reduction: Reduction | None = None,
        others: Sequence[Tensor] = (),
        per_token: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return the output of the network, or what the reduction makes of its logits, with the states asked for."""
        if reduction is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        model: Any = self
        found = model.get_decoder()(*args, **kwargs)
        assert learned is not None
        places = found.last_hidden_state.flatten(0, 1).index_select(0, learned)
        reduced = model.get_output_embeddings()(
            places,
            reduction=reduction,
            others=others,
            per_token=per_token,
            shape=_shape(model.config.get_text_config()),
        )
        states = {name: found[name] for name in STATES if kwargs.get(f"output_{name}")}
        return (reduced, states) if states else reduced


@functools.cache
def _reducing_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of the same name and signature."""

    class Found(Reducing, cls):  # type: ignore[misc, valid-type]
        @functools.wraps(cls.forward)  # `generate` looks at the signature
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    Found.__name__, Found.__qualname__, Found.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    return Found


def _plain(head: Any) -> Head | None:
    """Return the head that computes, where it is a plain matrix; peft may hold it among those that it trains whole."""
    if hasattr(head, "modules_to_save"):
        head = head.modules_to_save[head.active_adapters[0]]
    return head if isinstance(head, Head) else None


def _shape(config: Any) -> Callable[[Tensor], Tensor] | None:
    """Return what an architecture does to the product of hidden states and matrix, by its configuration."""
    cap = getattr(config, "final_logit_softcapping", None)
    factor = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)
    if cap is None and factor == 1.0:
        return None

    def shape(logits: Tensor) -> Tensor:
        logits = logits * factor
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return shape


def _shaped(reduction: Reduction, shape: Callable[[Tensor], Tensor], logits: Tensor, *others: Tensor) -> Tensor:
    return reduction(shape(logits), *others)


def _chunks(places: int, vocabulary: int, device: torch.device) -> range:
    """Return where each part of the places begins."""
    size = max(64, ELEMENTS.get(device.type, ELEMENTS["cuda"]) // vocabulary)
    return range(0, places, size)


def _summed(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, reduction: Reduction, others: Sequence[Tensor]
) -> Tensor:
    """Return sums (S,); gradients are made in the forward pass, so that each logit is computed once."""
    dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
    if dtype is not None:
        hidden = hidden.to(dtype)
    found: Tensor = _Summed.apply(hidden, weight, bias, reduction, *others)
    return found


class _Summed(torch.autograd.Function):
    """Sums over places whose logits are made, and used up for their gradients, a part at a time."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, reduction: Reduction, *others: Tensor
    ) -> Tensor:
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        learns = for_hidden or for_weight or for_bias
        own = weight.to(hidden.dtype)
        own_bias = None if bias is None else bias.to(hidden.dtype)
        by_hidden = torch.empty_like(hidden) if for_hidden else None
        by_weight = torch.zeros_like(weight, dtype=_wide(weight[:0]).dtype) if for_weight else None
        by_bias = torch.zeros_like(bias, dtype=_wide(bias[:0]).dtype) if for_bias and bias is not None else None
        totals: Tensor | None = None
        starts = _chunks(len(hidden), len(weight), hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in starts or (0,):
                part = slice(start, start + starts.step)
                logits = _wide(F.linear(hidden[part], own, own_bias)).requires_grad_(learns)
                with torch.set_grad_enabled(learns):
                    sums = reduction(logits, *(other[part] for other in others))
                    trained = sums[0]
                totals = sums.detach() if totals is None else totals + sums.detach()
                if not learns:
                    continue
                (by_logits,) = torch.autograd.grad(trained, logits)
                del logits, sums, trained
                by_logits = by_logits.to(hidden.dtype)
                if by_hidden is not None:
                    torch.mm(by_logits, own, out=by_hidden[part])
                if by_weight is not None:
                    _add_product(by_weight, by_logits.T, hidden[part])
                if by_bias is not None:
                    by_bias += by_logits.sum(0, dtype=by_bias.dtype)
        ctx.save_for_backward(by_hidden, by_weight, by_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.others = len(others)
        assert totals is not None
        return totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_sums: Tensor) -> Any:
        by_hidden, by_weight, by_bias = ctx.saved_tensors
        factor = by_sums[0]
        return (
            None if by_hidden is None else by_hidden * factor.to(by_hidden.dtype),
            None if by_weight is None else (by_weight * factor).to(ctx.dtypes[0]),
            None if by_bias is None else (by_bias * factor).to(ctx.dtypes[1]),
            None,
            *(None for _ in range(ctx.others)),
        )


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor in at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to a sum in float32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _per_token(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, reduction: Reduction, others: Sequence[Tensor]
) -> Tensor:
    """Return values (K, ...); in the backward pass, logits are made again."""

    def values(hidden: Tensor, *others: Tensor) -> Tensor:
        return reduction(_wide(F.linear(hidden, weight, bias)), *others)

    starts = _chunks(len(hidden), len(weight), hidden.device)
    parts = [slice(start, start + starts.step) for start in starts or (0,)]
    return torch.cat(
        [
            checkpoint(values, hidden[part], *(o[part] for o in others), use_reentrant=False, preserve_rng_state=False)
            for part in parts
        ]
    )
