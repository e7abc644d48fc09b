"""Optimisers by type, over named parameters: torch's own, bitsandbytes' 8-bit ones, Lion, and Muon beside AdamW."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adafactor, Adagrad, Adam, AdamW, Muon, Optimizer, RMSprop

from scaletrain.config import OptimizerSpec
from scaletrain.errors import UserError

Groups = list[dict[str, Any]]


def build_optimizer(
    spec: OptimizerSpec,
    named: Mapping[str, nn.Parameter],
    networks: Iterable[nn.Module] = (),
    key: str = "optimizer",
    shape: Callable[[nn.Parameter], torch.Size] = Tensor.size,
) -> Optimizer:
    """Build the optimiser of a player over its parameters, in the order of `named`; those in none of its groups first.

    Parameters with fewer than two dimensions (biases, norms, scalars) are in groups without weight decay. Decay
    is decoupled from the gradient in adamw, adafactor, lion and muon, and an L2 term of the gradient in the others.
    `optimizer.state[parameter]` is a flat dict of tensors and numbers for every type.

    networks: the modules that hold the parameters, unwrapped; muon leaves their embeddings and output heads to AdamW.
    key: the dotted key of `spec`, for messages. shape: of a parameter that may be held in parts. Raises UserError for a
    figure that the type does not take, or a group that matches no parameter.
    """
    check_optimizer(spec, key)
    options = _options(spec)
    try:
        if spec.type == "muon":
            return _muon(spec, named, networks, key)
        cls = _class(spec.type, key)
        groups = _groups(spec, named, key, shape)
        return cls(groups, lr=spec.lr, **options, **_fused(cls, named.values()))
    except ValueError as error:
        raise UserError(f"`{key}`: {error}") from error


_MOMENTS = {"sgd": 4, "adagrad": 4, "rmsprop": 4, "adafactor": 0, "lion": 4, "muon": 4}
_BYTES_8BIT = {"adam8bit": 2, "adamw8bit": 2, "lion8bit": 1, "paged_adamw8bit": 2}


def state_bytes(spec: OptimizerSpec, shapes: Iterable[torch.Size]) -> int:
    """Return about how many bytes of state an optimiser will hold: two fp32 moments for Adam, one for most others."""
    each = (_MOMENTS | _BYTES_8BIT).get(spec.type, 8)
    if spec.type == "sgd" and not spec.momentum:
        each = 0
    return each * sum(shape.numel() for shape in shapes)


def check_optimizer(spec: OptimizerSpec, key: str = "optimizer") -> None:
    """Raise UserError for a figure that the chosen type does not take, or a library that is not installed."""
    taken = set(inspect.signature(_class(spec.type, key)).parameters)
    if spec.type == "muon":
        taken |= {"betas"}
    for name in _options(spec):
        if name not in taken:
            own = sorted(taken & OPTIONS)
            raise UserError(
                f"`{key}.{name}`: {spec.type} has no {name}; remove it"
                + (f" (it takes {', '.join(own)})." if own else ".")
            )


class Lion(Optimizer):
    """Evolved sign momentum (Chen et al., 2023, Symbolic Discovery of Optimization Algorithms, algorithm 2).

    θ ← θ − lr · (sign(β₁ m + (1 − β₁) g) + λ θ);  m ← β₂ m + (1 − β₂) g.
    """

    def __init__(
        self, params: Groups, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ):
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), not {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step over every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            averages = [self.state[p]["exp_avg"] for p in params]
            beta1, beta2 = group["betas"]
            update = torch._foreach_lerp(averages, grads, 1 - beta1)
            torch._foreach_sign_(update)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, update, alpha=-group["lr"])
            torch._foreach_lerp_(averages, grads, 1 - beta2)
        return loss


class Composite(Optimizer):
    """Several optimisers, each over its own parameters, that behave as one: shared groups, state and state dict."""

    def __init__(self, parts: Sequence[Optimizer]):
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        start = 0
        for part in self.parts:
            stop = start + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[start:stop], self.state
            start = stop

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step of every part."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self._share()


OPTIONS = {"betas", "eps", "momentum", "nesterov", "alpha"}
_CLASSES: dict[str, Callable[..., Optimizer]] = {
    "sgd": SGD, "adagrad": Adagrad, "rmsprop": RMSprop, "adam": Adam, "adamw": AdamW, "adafactor": Adafactor,
    "lion": Lion, "muon": Muon,
}  # fmt: skip
_BITSANDBYTES = {
    "adam8bit": "Adam8bit", "adamw8bit": "AdamW8bit", "lion8bit": "Lion8bit", "paged_adamw8bit": "PagedAdamW8bit",
}  # fmt: skip


def _class(name: str, key: str) -> Callable[..., Optimizer]:
    if name in _CLASSES:
        return _CLASSES[name]
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise UserError(f"`{key}.type`: {name} needs bitsandbytes: pip install 'scaletrain[quant]'.") from error
    return getattr(optim, _BITSANDBYTES[name])


def _options(spec: OptimizerSpec) -> dict[str, Any]:
    options = {name: getattr(spec, name) for name in sorted(OPTIONS) if getattr(spec, name) is not None}
    if spec.type == "adafactor" and "eps" in options:
        options["eps"] = (options["eps"], 1e-3)  # the second floors the parameter scale: Adafactor's own constant
    return options


def _groups(
    spec: OptimizerSpec,
    named: Mapping[str, nn.Parameter],
    key: str,
    shape: Callable[[nn.Parameter], torch.Size] = Tensor.size,
    only: Callable[[nn.Parameter], bool] = lambda parameter: True,
) -> Groups:
    """Return groups of the parameters that `only` says yes to. Raises UserError for one of the spec's with none."""
    found: list[list[nn.Parameter]] = [[] for _ in range(len(spec.groups) + 1)]
    for name, parameter in named.items():
        matches = (number for number, group in enumerate(spec.groups, 1) if re.search(group.match, name))
        found[next(matches, 0)].append(parameter)
    for number, group in enumerate(spec.groups):
        if not found[number + 1]:
            taken = any(re.search(group.match, name) for name in named)
            why = "all that it matches is in groups before it" if taken else f"there are {_endings(named)}"
            raise UserError(f"`{key}.groups.{number}.match`: `{group.match}` has no parameter that is trained: {why}.")
    groups: Groups = []
    for own_figures, parameters in zip((None, *spec.groups), found, strict=True):
        figures: dict[str, Any] = {}
        decay = spec.weight_decay
        if own_figures is not None:
            figures = {"lr": own_figures.lr or spec.lr * (own_figures.lr_factor or 1.0)}
            decay = decay if own_figures.weight_decay is None else own_figures.weight_decay
        own = [p for p in parameters if only(p)]
        matrices = [p for p in own if len(shape(p)) >= 2]
        vectors = [p for p in own if len(shape(p)) < 2]
        groups.append({"params": matrices, **figures, "weight_decay": decay})
        groups.append({"params": vectors, **figures, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def _endings(named: Iterable[str]) -> str:
    """Return the last two parts of names, each once, for a message."""
    ends = dict.fromkeys(".".join(name.replace("/", ".").split(".")[-2:]) for name in named)
    return ", ".join(f"`{end}`" for end in ends)


def _fused(cls: Callable[..., Optimizer], params: Iterable[nn.Parameter]) -> dict[str, Any]:
    """One kernel for all parameters where torch has it: 4 times as fast on a CPU; DTensors know it for Adam only."""
    known: list[Callable[..., Optimizer]] = [Adam, AdamW]
    params = list(params)
    if not any(isinstance(p, DTensor) for p in params):
        known.append(SGD)
    able = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in params)
    return {"fused": True} if cls in known and able else {}


def _muon(spec: OptimizerSpec, named: Mapping[str, nn.Parameter], networks: Iterable[nn.Module], key: str) -> Optimizer:
    """Muon (Jordan, 2024) for hidden matrices, AdamW for the rest.

    Updates are scaled to the RMS of AdamW's (Liu et al., 2025, Muon is Scalable for LLM Training, section 2.2), so that
    one learning rate and one weight decay serve both. `eps` and `betas` are AdamW's, `momentum` and `nesterov` Muon's.
    """
    ends = set()
    for network in networks:
        ends |= {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
        head = getattr(network, "get_output_embeddings", lambda: None)()
        if head is not None:
            ends.add(id(head.weight))

    def hidden(parameter: nn.Parameter) -> bool:
        return parameter.ndim == 2 and id(parameter) not in ends

    matrices = _groups(spec, named, key, only=hidden)
    if not matrices:
        raise UserError(f"`{key}.type`: muon is for matrices and this player trains none; use adamw.")
    options = _options(spec)
    own = {name: options[name] for name in ("momentum", "nesterov") if name in options}
    parts: list[Optimizer] = [Muon(matrices, lr=spec.lr, adjust_lr_fn="match_rms_adamw", **own)]
    rest = _groups(spec, named, key, only=lambda parameter: not hidden(parameter))
    if rest:
        adam = {name: options[name] for name in ("betas", "eps") if name in options}
        parts.append(AdamW(rest, lr=spec.lr, **adam, **_fused(AdamW, [p for g in rest for p in g["params"]])))
    return Composite(parts)
