"""What distillation takes from causal language models beside a reduction of their logits: see `heads`.

Shapes: B sequences, T positions, K learned places of all B · T, C of them at a time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from scaletrain.networks.heads import Reduction, _plain, _shape, _wide, reduce, takes_reduction

States = dict[str, tuple[Tensor, ...]]
"""By name (`heads.STATES`), a tensor for each layer: hidden_states (B, T, H), from the embeddings on; attentions
(B, heads, T, T), from the first block on."""


def reduce_with(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    learned: Tensor,
    reduction: Reduction,
    others: Sequence[Tensor] = (),
    states: Sequence[str] = (),
) -> tuple[Tensor, States]:
    """Return what `heads.reduce` does, and the states that are asked for, of the same call of the network."""
    if not states:
        return reduce(model, inputs, learned, reduction, others), {}
    asked: dict[str, Any] = {"use_cache": False, **{f"output_{name}": True for name in states}}
    if takes_reduction(model, inputs):
        found: tuple[Tensor, States] = model(**inputs, **asked, learned=learned, reduction=reduction, others=others)
        return found
    output = model(**inputs, **asked)
    logits = output.logits.flatten(0, 1).index_select(0, learned)
    return reduction(_wide(logits), *others), {name: output[name] for name in states}


def before_head(
    model: nn.Module, inputs: Mapping[str, Tensor], learned: Tensor, states: Sequence[str] = ()
) -> tuple[Tensor, Callable[[Tensor], Tensor], States]:
    """Return what the logits of a frozen network are made of, so that they need not exist whole.

    Values (K, ...), such as may be one of the `others` in a reduction of another network's logits; a function of some
    of them, (C, ...), that gives their logits (C, V); and the states that are asked for. The values are last hidden
    states; where the network takes no reduction, or holds its matrix in parts (FSDP2, ZeRO-3), the logits themselves.
    """
    asked = {f"output_{name}": True for name in states}
    head = _plain(model.get_output_embeddings()) if takes_reduction(model, inputs) else None  # type: ignore[operator]
    if head is None or type(head.weight) is not nn.Parameter or not head.weight.numel():
        output = model(**inputs, use_cache=False, **asked)
        logits = output.logits.flatten(0, 1).index_select(0, learned)
        return logits, _wide, {name: output[name] for name in states}
    output = model.get_decoder()(**inputs, use_cache=False, **asked)  # type: ignore[operator]
    hidden = output.last_hidden_state.flatten(0, 1).index_select(0, learned)
    weight, bias = head.weight.to(hidden.dtype), None if head.bias is None else head.bias.to(hidden.dtype)
    shape = _shape(model.config.get_text_config()) or _wide  # type: ignore[union-attr, operator]
    return hidden, lambda some: shape(_wide(F.linear(some, weight, bias))), {name: output[name] for name in states}
