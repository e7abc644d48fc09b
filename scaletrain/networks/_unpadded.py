"""Encoders of BERT's form that classify a text, computed without padding, and in the last layer for first tokens alone.

The real tokens of a batch go through the layers as one long row; only inside attention, where texts must not see one
another, they stand in grids: of a few texts each, of about the same length. Of the last layer, the head reads the first
token of each text, so that its queries and all that follows them are computed for those alone: of L layers, 10 / 12
of the last one's products are left out. Gradients are those of the padded network up to rounding.

A network made `unpadded` is called as before, its inputs by name. It computes as its library does where hidden states
or attentions are asked for, where it has a cache, where its attention is not torch's, where a first comparison of the
two differs, and in `scaletrain plan`, which so counts the memory of padding.

Shapes: B texts, T positions of the longest, N real tokens of all texts, H hidden size, D of a head. Texts are padded at
the right.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

log = logging.getLogger("scaletrain")

FAMILIES = frozenset(f"{name}ForSequenceClassification" for name in ("Bert", "Camembert", "Electra", "Roberta"))
FAMILIES |= {"XLMRobertaForSequenceClassification"}
"""What is known to have these layers, and a head that reads the first token."""
Ints = npt.NDArray[np.int64]

TEXTS = 8
"""Texts of a grid on a CPU. A GPU, which likes few large products better, takes all in one."""
_PROBE = 4
"""Texts on which a network is compared with itself."""


def unpadded(model: Any) -> Any:
    """Have a classifier compute without padding, where it is of a family that this knows; in place."""
    if isinstance(model, Unpadded) or type(model).__name__ not in FAMILIES or model.config.is_decoder:
        return model
    encoder: Any = getattr(model, str(model.base_model_prefix)).encoder
    for layer in encoder.layer:
        layer.__class__ = _derived(Layer, layer.__class__)
    encoder.__class__ = _derived(Encoder, encoder.__class__)
    model.__class__ = _derived(Unpadded, model.__class__)
    model.packs = None
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = Dropout
    return model


@functools.cache
def _derived(first: type, cls: Any) -> Any:
    """Return a subclass of the same name and signature, with `first` before it."""

    class Found(first, cls):
        @functools.wraps(cls.forward)  # peft looks at the signature
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    Found.__name__, Found.__qualname__, Found.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    return Found


class Unpadded:
    """What comes before a classifier's class.

    packs: whether it computes without padding; None before that was compared with how its library computes. What is
    compiled should not: the shapes of each batch are new.
    """

    packs: bool | None = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the network."""
        model: Any = self
        asked = any(kwargs.get(name) or getattr(model.config, name, False) for name in _STATES)
        inputs = [value for value in kwargs.values() if isinstance(value, Tensor)]
        unread = not inputs or inputs[0].untyped_storage().device.type == "meta"  # as `scaletrain plan` has them
        if args or asked or unread or self.packs is False or model.config._attn_implementation != "sdpa":
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        if self.packs is None:
            self.packs = _agrees(model, super().forward, kwargs)  # type: ignore[misc]
        return super().forward(**kwargs, unpadded=self.packs)  # type: ignore[misc]


_STATES = ("output_hidden_states", "output_attentions")


def _agrees(model: nn.Module, forward: Any, kwargs: dict[str, Any]) -> bool:
    """Compare logits with and without padding, on the first texts of a batch and without dropout. A difference is
    said."""
    some = {name: value[:_PROBE] if isinstance(value, Tensor) else value for name, value in kwargs.items()}
    modes = [module.training for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            padded, packed = (forward(**some, unpadded=way).logits for way in (False, True))
    finally:
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode
    half = torch.is_autocast_enabled(packed.device.type) or packed.dtype in (torch.float16, torch.bfloat16)
    same = bool((padded - packed).abs().max() <= (3e-2 if half else 1e-3) * padded.abs().max())
    if not same:
        log.warning("%s computes in a way of its own: texts stay padded, which takes more time", type(model).__name__)
    return same


class Encoder:
    """What comes before an encoder's class."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, unpadded: bool = False, **kwargs: Any
    ) -> Any:
        """Return its output, or, unpadded, that of first tokens: `last_hidden_state` is (B, 1, H).

        attention_mask: (B, 1, T or 1, T) bool, as the library makes it for torch's attention; None: all is real.
        """
        if not unpadded or kwargs.get("past_key_values") is not None:
            return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        count, width, _ = hidden_states.shape
        flat = hidden_states.flatten(0, 1)
        if attention_mask is None:
            lengths = np.full(count, width)
        else:
            real = attention_mask[:, 0, 0].cpu().numpy()
            if not real[:, 0].all() or (real[:, 1:] > real[:, :-1]).any():  # padded at the left, or in between
                return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]
            lengths = real.sum(1)
            flat = Moved.apply(flat, *_places(lengths, width, flat.device))
        layers: Any = cast(Any, self).layer
        grids = Grids.of(lengths, layers[0].attention.self.num_attention_heads, flat)
        for number, layer in enumerate(layers):
            flat = layer(flat[None], (grids, number == len(layers) - 1))[0]
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=flat[:, None])


class Layer:
    """What comes before the class of an encoder's layer."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """Return its output.

        attention_mask: as the library has it; or grids, for hidden states of real tokens, (1, N, H), and whether the
        output is to be that of first tokens, (1, B, H).
        """
        if not isinstance(attention_mask, tuple):
            return cast(Tensor, super().forward(hidden_states, attention_mask, *args, **kwargs))  # type: ignore[misc]
        grids, last = attention_mask
        layer: Any = self
        own = layer.attention.self
        asking = hidden_states.index_select(1, grids.firsts) if last else hidden_states
        query, key, value = own.query(asking)[0], own.key(hidden_states)[0], own.value(hidden_states)[0]
        dropout = own.dropout.p if own.training else 0.0
        seen = grids.attend(query, key, value, dropout, own.scaling, last)
        out: Tensor = layer.feed_forward_chunk(layer.attention.output(seen[None], asking))
        return out


def _places(lengths: Ints, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return, of rows of `width` places that begin with real ones, where the real ones stand; and for each of the
    places, where it stands among the real ones, or, of padding, their number."""
    real = np.arange(width) < lengths[:, None]
    there = np.where(real, real.ravel().cumsum().reshape(real.shape) - 1, real.sum())
    return tuple(torch.from_numpy(a).to(device) for a in (np.flatnonzero(real), there.ravel()))  # type: ignore[return-value]


@dataclass(frozen=True)
class Grids:
    """Where the heads of tokens stand in attention: in grids (texts, heads, width), one after the other, texts by
    length.

    into: (P,) which of all heads of all tokens, (N · heads), is at each place of the grids; N · heads in padding. back:
    (N · heads,) the place of each. order: (B,) the texts in the order of the grids; inverse: (B,) the place of each
    text in it. firsts: (B,) the first token of each text. shapes: (texts, width) of each grid. masks: of each,
    (texts · heads, 1, width), what is added to scores: -inf in padding.
    """

    into: Tensor
    back: Tensor
    order: Tensor
    inverse: Tensor
    firsts: Tensor
    shapes: tuple[tuple[int, int], ...]
    masks: tuple[Tensor, ...]
    heads: int

    @classmethod
    def of(cls, lengths: Ints, heads: int, like: Tensor) -> Grids:
        """Lay them out for texts of these lengths, (B,). like: has the device and the type of the scores."""
        size = TEXTS if like.device.type == "cpu" else len(lengths)
        order = np.argsort(-lengths, kind="stable")
        firsts, total = lengths.cumsum() - lengths, int(lengths.sum()) * heads
        into, shapes, masks = [], [], []
        for start in range(0, len(order), size):
            texts = order[start : start + size]
            width = int(lengths[texts[0]])
            places = np.arange(width)
            real = np.repeat(places < lengths[texts, None], heads, axis=0)  # (texts · heads, width)
            tokens = (firsts[texts, None, None] + places) * heads + np.arange(heads)[:, None]
            into.append(np.where(real, tokens.reshape(real.shape), total).ravel())
            shapes.append((len(texts), width))
            masks.append(torch.from_numpy(np.where(real, 0.0, -np.inf)[:, None]).to(like))
        flat = np.concatenate(into)
        back = np.argsort(flat, kind="stable")[:total]
        arrays = {"into": flat, "back": back, "order": order, "inverse": np.argsort(order), "firsts": firsts}
        tensors = {name: torch.from_numpy(array).to(like.device) for name, array in arrays.items()}
        return cls(**tensors, shapes=tuple(shapes), masks=tuple(masks), heads=heads)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float, scale: float, first: bool) -> Tensor:
        """Return what each token sees of its text, (N, H); first: what first tokens see, whose queries are (B, H).

        query, key, value: (N, H). dropout: of the weights.
        """
        width = query.shape[1] // self.heads
        key, value = (Moved.apply(x.view(-1, width), self.into, self.back) for x in (key, value))
        if first:
            query = query.index_select(0, self.order).view(-1, width)
        else:
            query = Moved.apply(query.view(-1, width), self.into, self.back)
        sizes = [texts * self.heads * places for texts, places in self.shapes]
        asking = [texts * self.heads for texts, _ in self.shapes] if first else sizes
        grids = zip(query.split(asking), key.split(sizes), value.split(sizes), self.masks, strict=True)
        seen = []
        for q, k, v, mask in grids:
            q, k, v = (x.view(len(mask), -1, width) for x in (q, k, v))
            seen.append(_attention(q, k, v, mask, dropout, scale).view(-1, width))
        out = torch.cat(seen)
        if first:
            return out.view(len(self.order), -1).index_select(0, self.inverse)
        return cast(Tensor, Moved.apply(out, self.back, self.into)).view(-1, self.heads * width)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float, scale: float) -> Tensor:
    """Return softmax(scale q kᵀ + mask) v. On a CPU, torch's own has no fused kernel with dropout."""
    if not dropout or q.device.type != "cpu":
        # With a dimension before, which the fused kernels want.
        return F.scaled_dot_product_attention(q[None], k[None], v[None], mask[None], dropout, scale=scale)[0]
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale)
    return torch.bmm(dropped(scores.softmax(-1), dropout), v)


class Moved(torch.autograd.Function):
    """Rows (N, ...) in other places, (P, ...): there `into` says which, or N for a row of zeros; `back` is its inverse.

    Each row has at most one place in the other. What stands in zeros gets, and gives, no gradient.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, into: Tensor, back: Tensor) -> Tensor:
        """Move them."""
        ctx.save_for_backward(into, back)
        return _moved(rows, into, back)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Move gradients the other way."""
        into, back = ctx.saved_tensors
        return _moved(gradient, back, into), None, None


def _moved(rows: Tensor, into: Tensor, back: Tensor) -> Tensor:
    if len(into) > len(back):  # there is padding
        rows = F.pad(rows, (0, 0, 0, 1))
    return rows.index_select(0, into)


class Dropout(nn.Dropout):
    """Dropout that draws 16 bits for each element on a CPU, where drawing is most of it: several times as fast."""

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements in training."""
        drops = self.training and 0 < self.p < 1 and input.device.type == "cpu"
        return dropped(input, self.p) if drops and not torch.compiler.is_compiling() else super().forward(input)


def dropped(x: Tensor, p: float) -> Tensor:
    """Return x with each element set to zero with probability p, to the nearest 1 / 65,536, and the others scaled."""
    return cast(Tensor, _Dropped.apply(x, p))


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        least = round(p * (1 << 16)) - (1 << 15)
        bits = torch.randint(-(1 << 63), (1 << 63) - 1, (-(-x.numel() // 4),), dtype=torch.int64)
        keep = (bits.view(torch.int16)[: x.numel()] >= least).view(x.shape)
        ctx.save_for_backward(keep)
        ctx.scale = 1 / (1 - p)
        return torch.ops.aten.native_dropout_backward(x, keep, ctx.scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return torch.ops.aten.native_dropout_backward(gradient, keep, ctx.scale), None
