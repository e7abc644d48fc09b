"""Losses of a language model from its last hidden states, a part of the places at a time: the logits never exist whole.

A causal language model of transformers made `reducing` takes three more arguments: `learned`, the places at which
something is learned; `reduction`, what is made of their logits; and `others`, what the reduction needs beside them. It
then returns what the reduction gives in place of its output. The call goes through the network's own `forward`, and
through that of its head, so that every wrapper that gathers weights sees it.

Nothing here waits for the device: how many places are learned is known from shapes, and parts are of a fixed size.

Shapes: B sequences, T positions, K learned places of all B · T, C of them at a time, H hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

log = logging.getLogger("scaletrain")

Reduction = Callable[..., Tensor]
"""(logits (C, V) float32, *others (C, ...)) -> sums (S,), of which the first is trained on and the others are figures;
or, with `per_token`, values (C, ...), all of which are trained on. Gradients go to the logits, not to the others."""

Shape = Callable[[Tensor], Tensor]
"""What an architecture does to the product of hidden states and matrix: logits to logits, elementwise."""

ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 26}
"""Logits that exist at a time, by device: products of fewer places are slower, and of more hardly faster."""
_FEWEST = 256
"""Places at a time, however large the vocabulary."""
_LIFT = {torch.float16: 256.0}
"""Factor on the logits' gradients in a type whose smallest numbers are near those of a softmax. Loss scaling comes
after them."""
_PROBE = 8
"""Places at which a network is compared with itself."""


class Closed(ABC):
    """A reduction to sums that knows its gradient, which takes fewer passes over the logits than autograd's."""

    @abstractmethod
    def __call__(self, logits: Tensor, *others: Tensor) -> Tensor:
        """Return sums (S,) of logits (C, V)."""

    @abstractmethod
    def gradient(self, logits: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums, and the gradient of the first of them, (C, V), in memory of its own."""


@dataclass(frozen=True)
class CrossEntropy(Closed):
    """Σ -log p(target), with two changes to what is trained on; sums: (changed, unchanged).

    smoothing: share of the target that is spread over the vocabulary (Szegedy et al., 2016, section 7). z_loss: factor
    of (log Z)², Z the sum of all exp(logit) (Chowdhery et al., 2022, "PaLM", section 5).
    """

    smoothing: float = 0.0
    z_loss: float = 0.0

    def __call__(self, logits: Tensor, *others: Tensor) -> Tensor:
        """Return the sums at targets (C,)."""
        (targets,) = others
        return self._sums(logits, torch.logsumexp(logits, -1), targets)

    def gradient(self, logits: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        """Return them, and (1 + 2 z log Z) p - (1 - s) onehot - s / V."""
        (targets,) = others
        found = torch.softmax(logits, -1)
        log_z = logits.amax(-1) - found.amax(-1).log()  # the largest probability is at least 1 / V
        sums = self._sums(logits, log_z, targets)
        if self.z_loss:
            found.mul_((1 + 2 * self.z_loss * log_z)[:, None])
        places = targets[:, None]
        found.scatter_(1, places, found.gather(1, places) - (1 - self.smoothing))
        if self.smoothing:
            found.sub_(self.smoothing / logits.shape[-1])
        return sums, found

    def _sums(self, logits: Tensor, log_z: Tensor, targets: Tensor) -> Tensor:
        at_target = logits.gather(1, targets[:, None]).squeeze(1)
        unchanged = (log_z - at_target).sum()
        if not (self.smoothing or self.z_loss):
            return torch.stack([unchanged, unchanged])
        changed = unchanged
        if self.smoothing:
            changed = changed + self.smoothing * (at_target - logits.mean(-1)).sum()
        if self.z_loss:
            changed = changed + self.z_loss * log_z.square().sum()
        return torch.stack([changed, unchanged])


def judged(logits: Tensor, targets: Tensor) -> Tensor:
    """Return, at targets (C,), Σ -log p(target), and how many of them are the most likely token."""
    loss = F.cross_entropy(logits, targets, reduction="sum")
    return torch.stack([loss, (logits.argmax(-1) == targets).sum().to(loss.dtype)])


STATES = ("hidden_states", "attentions")
"""What a network returns of every layer where `output_hidden_states` or `output_attentions` asks for it."""


def reducing(model: nn.Module) -> nn.Module:
    """Have a causal language model of transformers take a reduction, where its head is a plain matrix, and noise."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if type(head) is nn.Linear:
        head.__class__ = Head
    if not isinstance(model, Reducing):
        model.__class__ = _reducing_class(type(model))  # type: ignore[arg-type]
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
    if takes_reduction(model, inputs):
        found: Tensor = model(
            **inputs, use_cache=False, learned=learned, reduction=reduction, others=others, per_token=per_token
        )
        return found
    logits = model(**inputs, use_cache=False).logits
    width = next(iter(inputs.values())).shape[1]
    logits = logits[:, -width:].flatten(0, 1).index_select(0, learned)  # without places that a prompt's adapter adds
    return reduction(_wide(logits), *others)


def takes_reduction(model: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> bool:
    """Say whether a network, wrapped or not, was made `reducing` and has its plain head still.

    inputs: with them, a network is called the first time, to see that it makes its logits as we do; that it does not
    is said once.
    """
    prompts = False
    for part in model.modules():
        configs: Any = getattr(part, "peft_config", None)
        if isinstance(configs, Mapping):
            prompts |= any(getattr(config, "is_prompt_learning", False) for config in configs.values())
        if isinstance(part, Reducing):
            if prompts or part.agrees is False or _plain(part.get_output_embeddings()) is None:  # type: ignore[operator]
                return False
            if inputs is not None and part.agrees is None:
                part.agrees = _agrees(model, inputs)
                if not part.agrees:
                    log.warning(
                        "%s makes logits in a way of its own: they will exist whole, which takes more memory",
                        type(part).__name__,
                    )
            return part.agrees is not False
    return False


def takes_noise(model: nn.Module) -> bool:
    """Say whether a network, wrapped or not, takes `noise`."""
    return any(isinstance(part, Reducing) for part in model.modules())


def _agrees(model: nn.Module, inputs: Mapping[str, Tensor]) -> bool:
    """Compare logits, as the network gives them and as its head does, at a few places."""
    some = {name: tensor[:1, :_PROBE] for name, tensor in inputs.items()}
    first = next(iter(some.values()))
    learned = torch.arange(first.shape[1], device=first.device)

    def call(**options: Any) -> Any:
        with torch.random.fork_rng([first.device] if first.device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(0)  # for dropout
            with torch.compiler.set_stance("force_eager"):
                return model(**some, use_cache=False, **options)

    whole = call().logits[0]
    parts = call(learned=learned, reduction=_themselves, per_token=True)
    if whole.untyped_storage().device.type == "meta":  # without values, as `scaletrain plan` has them
        return True
    half = torch.is_autocast_enabled(first.device.type) or whole.dtype in (torch.float16, torch.bfloat16)
    error = 3e-2 if half else 1e-4
    return bool((_wide(whole) - parts).abs().max() <= error * whole.abs().max())


def _themselves(logits: Tensor) -> Tensor:
    return logits


class Head(nn.Linear):
    """An output matrix that can hand its logits to a reduction."""

    def forward(
        self,
        input: Tensor,
        reduction: Reduction | None = None,
        others: Sequence[Tensor] = (),
        per_token: bool = False,
        shape: Shape | None = None,
    ) -> Tensor:
        """Return logits, or, of hidden states (K, H), what the reduction makes of them.

        shape: what follows the matrix.
        """
        if reduction is None:
            return super().forward(input)
        return _reduced(input, self.weight, self.bias, reduction, others, per_token, shape)


class Reducing:
    """What comes before a transformers class to have it take a reduction, and noise.

    agrees: whether its logits are those that its head gives; None before they were compared.
    """

    agrees: bool | None = None

    def forward(
        self,
        *args: Any,
        learned: Tensor | None = None,
        reduction: Reduction | None = None,
        others: Sequence[Tensor] = (),
        per_token: bool = False,
        noise: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the output of the network, or what the reduction makes of its logits, with the states asked for.

        noise: (B, T), what is added to each embedding is drawn uniformly from ± this / √H (Jain et al., 2023,
        "NEFTune", algorithm 1).
        """
        model: Any = self
        if noise is not None:
            kwargs["inputs_embeds"] = _noised(model, kwargs.pop("input_ids", None), kwargs.get("inputs_embeds"), noise)
        if reduction is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
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


def _noised(model: Any, ids: Tensor | None, embedded: Tensor | None, noise: Tensor) -> Tensor:
    found: Tensor = model.get_input_embeddings()(ids) if embedded is None else embedded
    noise = F.pad(noise, (found.shape[1] - noise.shape[1], 0))  # none on places that a prompt's adapter adds
    width = (noise / found.shape[-1] ** 0.5).to(found.dtype)
    return found + (2 * torch.rand_like(found) - 1) * width[..., None]


@functools.cache
def _reducing_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of the same name and signature."""

    class Found(Reducing, cls):  # type: ignore[misc, valid-type]
        @functools.wraps(cls.forward)  # `generate` looks at the signature
        def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            return super().forward(*args, **kwargs)

    Found.__name__, Found.__qualname__, Found.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    return Found


def _plain(head: Any) -> Head | None:
    """Return the head that computes, where it is a plain matrix; peft may hold it among those that it trains whole."""
    if hasattr(head, "modules_to_save"):
        head = head.modules_to_save[head.active_adapters[0]]
    return head if isinstance(head, Head) else None


def _shape(config: Any) -> Shape | None:
    """Return what an architecture does to the product of hidden states and matrix, by its configuration."""
    cap = getattr(config, "final_logit_softcapping", None)
    factor = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)
    if cap is None and factor == 1.0:
        return None

    def shape(logits: Tensor) -> Tensor:
        logits = logits * factor
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return shape


# --- the passes over the parts ----------------------------------------------------------------------------------------


@contextmanager
def on(device: str) -> Iterator[None]:
    """Have a CPU take as many places at a time as another device, to see what that needs."""
    before = ELEMENTS["cpu"]
    ELEMENTS["cpu"] = ELEMENTS[device]
    try:
        yield
    finally:
        ELEMENTS["cpu"] = before


def _parts(places: int, vocabulary: int, device: torch.device) -> list[slice]:
    """Cut the places: into one part that is empty, where there are none."""
    size = max(_FEWEST, ELEMENTS.get(device.type, ELEMENTS["cuda"]) // vocabulary)
    return [slice(start, start + size) for start in range(0, max(1, places), size)]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _reduced(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reduction: Reduction,
    others: Sequence[Tensor],
    per_token: bool,
    shape: Shape | None,
) -> Tensor:
    """Return sums (S,) or values (K, ...). Products are of the type that autocast gives them, sums of it in float32."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):
        if per_token:
            values: Tensor = _PerToken.apply(hidden, weight, bias, reduction, shape, *others)
            return values
        sums: Tensor = _Summed.apply(hidden, weight, bias, reduction, shape, torch.is_grad_enabled(), *others)
        return sums


class _Summed(torch.autograd.Function):
    """Sums over places. Gradients are made in the forward pass, so that each logit is computed once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        reduction: Reduction,
        shape: Shape | None,
        learns: bool,
        *others: Tensor,
    ) -> Tensor:
        ctx.others = len(others)
        sums: list[Tensor] = []
        if not learns or not any(ctx.needs_input_grad[:3]):
            for logits, part in _logits(hidden, weight, bias):
                sums.append(reduction(logits if shape is None else shape(logits), *(o[part] for o in others)))
            return torch.stack(sums).sum(0)

        def gradient(logits: Tensor, part: slice) -> Tensor:
            found, by_logits = _gradient(reduction, shape, logits, [o[part] for o in others])
            sums.append(found)
            return by_logits

        ctx.lift = _LIFT.get(hidden.dtype, 1.0)
        ctx.save_for_backward(*_differentiate(hidden, weight, bias, ctx.needs_input_grad, gradient, ctx.lift))
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        return torch.stack(sums).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_sums: Tensor) -> Any:
        factor = by_sums[0] / ctx.lift  # not rounded to half precision, where it would be as wrong in every gradient
        found = [
            None if gradient is None else gradient.to(factor.dtype).mul_(factor).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*found, None, None, None, *(None for _ in range(ctx.others)))


class _PerToken(torch.autograd.Function):
    """Values of places. In the backward pass, the logits are made again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        reduction: Reduction,
        shape: Shape | None,
        *others: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, *others)
        ctx.reduction, ctx.shape = reduction, shape
        return torch.cat(
            [
                reduction(logits if shape is None else shape(logits), *(o[part] for o in others))
                for logits, part in _logits(hidden, weight, bias)
            ]
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_values: Tensor) -> Any:
        hidden, weight, bias, *others = ctx.saved_tensors

        def gradient(logits: Tensor, part: slice) -> Tensor:
            with torch.enable_grad():
                logits.requires_grad_()
                shaped = logits if ctx.shape is None else ctx.shape(logits)
                values = ctx.reduction(shaped, *(o[part] for o in others))
            return torch.autograd.grad(values, logits, by_values[part])[0]

        found = _differentiate(hidden, weight, bias, ctx.needs_input_grad, gradient, 1.0)
        dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        returned = [None if g is None else g.to(dtype) for g, dtype in zip(found, dtypes, strict=True)]
        return (*returned, None, None, *(None for _ in others))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[Tensor, slice]]:
    """Yield logits (C, V) in at least float32, and the places that they are of."""
    weight = weight.to(hidden.dtype)
    bias = None if bias is None else bias.to(hidden.dtype)
    for part in _parts(len(hidden), len(weight), hidden.device):
        yield _wide(F.linear(hidden[part], weight, bias)), part


def _gradient(
    reduction: Reduction, shape: Shape | None, logits: Tensor, others: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the sums, and the gradient of the first with respect to the logits as they leave the matrix."""
    if isinstance(reduction, Closed) and shape is None:
        return reduction.gradient(logits, *others)
    with torch.enable_grad():
        shaped = logits.requires_grad_() if shape is None else shape(logits.requires_grad_())
        if not isinstance(reduction, Closed):
            sums = reduction(shaped, *others)
            return sums.detach(), torch.autograd.grad(sums[0], logits)[0]
        sums, by_shaped = reduction.gradient(shaped.detach(), *others)
        return sums, torch.autograd.grad(shaped, logits, by_shaped)[0]


def _differentiate(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    wanted: Sequence[bool],
    gradient: Callable[[Tensor, slice], Tensor],
    lift: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of hidden states, in their type, and of matrix and bias, in at least float32, or None.

    gradient: of the logits of a part. lift: factor on it, and so on what is returned.
    """
    by_hidden = torch.empty_like(hidden) if wanted[0] else None
    by_weight = torch.zeros_like(weight, dtype=_wider(weight.dtype)) if wanted[1] else None
    by_bias = torch.zeros_like(bias, dtype=_wider(bias.dtype)) if wanted[2] and bias is not None else None
    own = weight.to(hidden.dtype)
    for logits, part in _logits(hidden, own, bias):
        by_logits = gradient(logits, part)
        del logits
        by_logits = (by_logits if lift == 1 else by_logits.mul_(lift)).to(hidden.dtype)
        if by_hidden is not None:
            torch.mm(by_logits, own, out=by_hidden[part])
        if by_weight is not None:
            _add_product(by_weight, by_logits.T, hidden[part])
        if by_bias is not None:
            by_bias += by_logits.sum(0, dtype=by_bias.dtype)
        del by_logits
    return by_hidden, by_weight, by_bias


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to a sum that may be of a wider type."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _wider(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor in at least float32."""
    return tensor.to(_wider(tensor.dtype))
