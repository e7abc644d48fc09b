"""How a learning rate changes with a player's updates: a factor of its peak, by the number of the update.

With w = `warmup_steps`, the warm-up gives update u (from 0) the factor (u + 1) / w while u < w: the first update learns
already, and update w - 1 has the peak. After it, with T updates in all, p = (u - w) / (T - w) and f = `final`:

    constant       1
    linear         f + (1 - f) (1 - p)
    cosine         f + (1 - f) (1 + cos πp) / 2             (Loshchilov & Hutter, 2017, SGDR, equation 5)
    polynomial     f + (1 - f) (1 - p)^power
    wsd            1, then linearly to f over the last `decay_share` of all updates   (Hu et al., 2024, MiniCPM)
    inverse_sqrt   √(w / (u + 1)), 1 for w without a warm-up                 (Vaswani et al., 2017, section 5.3)
    one_cycle      from 1/25 to 1 along a cosine, and along another to f at the last update; the rise takes
                   `warmup_steps`, or 0.3 T when that is 0           (Smith & Topin, 2018; torch's OneCycleLR)
    plateau        times `factor` after every `patience` evaluations in a row without a better metric, but not under f
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from scaletrain.config import ScheduleSpec
from scaletrain.errors import UserError


class Schedule:
    """A factor of the peak learning rate: a pure function of the update's number for all types but `plateau`."""

    def __init__(self, spec: ScheduleSpec, total_updates: int):
        self.spec, self.total = spec, total_updates
        self._shape = _SHAPES[spec.type]

    def factor(self, update: int) -> float:
        """Return the factor of update number `update`, counted from 0; past the end, that of the end."""
        return self._shape(self.spec, min(update, self.total), self.total)

    def observe(self, metric_is_better: bool) -> None:
        """Take note of an evaluation; only `plateau` listens."""

    def state_dict(self) -> dict[str, Any]:
        """Return what is not a function of the update: nothing but for `plateau`. JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""


class Plateau(Schedule):
    """Falls when the metric has stopped getting better."""

    def __init__(self, spec: ScheduleSpec, total_updates: int):
        super().__init__(spec, total_updates)
        self._level, self._waited = 1.0, 0

    def factor(self, update: int) -> float:
        """Return the warm-up's factor times what the evaluations so far have left."""
        return super().factor(update) * self._level

    def observe(self, metric_is_better: bool) -> None:
        """Count evaluations without a better metric; at `patience` of them the rate falls."""
        self._waited = 0 if metric_is_better else self._waited + 1
        if self._waited == self.spec.patience:
            self._level, self._waited = max(self.spec.final, self._level * self.spec.factor), 0

    def state_dict(self) -> dict[str, Any]:
        """Return the level and how many evaluations it has waited."""
        return {"level": self._level, "waited": self._waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._level, self._waited = state["level"], state["waited"]


def build_schedule(spec: ScheduleSpec, total_updates: int, key: str = "schedule") -> Schedule:
    """Build the schedule of a player that makes `total_updates` updates.

    key: the dotted key of `spec`, for messages. Raises UserError for a warm-up or decay that does not fit in, and for
    a figure that the type does not use.
    """
    check_schedule(spec, key)
    if spec.warmup_share:
        spec = spec.model_copy(update={"warmup_steps": round(spec.warmup_share * total_updates)})
    if spec.warmup_steps > total_updates:
        raise UserError(
            f"`{key}.warmup_steps` is {spec.warmup_steps}, but the player makes {total_updates} updates in all: "
            "shorten the warm-up or train longer."
        )
    if spec.type == "wsd" and spec.warmup_steps + _decay_updates(spec, total_updates) > total_updates:
        raise UserError(
            f"`{key}.decay_share`: a warm-up of {spec.warmup_steps} updates and a decay over {spec.decay_share:g} of "
            f"{total_updates} do not fit; make one shorter."
        )
    return (Plateau if spec.type == "plateau" else Schedule)(spec, total_updates)


def check_schedule(spec: ScheduleSpec, key: str = "schedule") -> None:
    """Raise UserError for a figure other than its default that the type does not use, or two that say the same."""
    if spec.warmup_share and spec.warmup_steps:
        raise UserError(f"`{key}`: give warmup_steps or warmup_share, not both.")
    for name, types in _USED_BY.items():
        if spec.type not in types and getattr(spec, name) != ScheduleSpec.model_fields[name].default:
            raise UserError(f"`{key}.{name}`: {spec.type} does not use it; remove it (it is for {', '.join(types)}).")


_Shape = Callable[[ScheduleSpec, int, int], float]


def _after_warmup(level: Callable[[ScheduleSpec, float], float]) -> _Shape:
    """Make a shape of the share of the updates after the warm-up: 1 at its start, `final` where `level` is 0."""

    def shape(spec: ScheduleSpec, update: int, total: int) -> float:
        if update < spec.warmup_steps:
            return (update + 1) / spec.warmup_steps
        progress = (update - spec.warmup_steps) / max(1, total - spec.warmup_steps)
        return spec.final + (1 - spec.final) * level(spec, progress)

    return shape


def _cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def _decay_updates(spec: ScheduleSpec, total: int) -> int:
    return max(1, round(spec.decay_share * total))


def _wsd(spec: ScheduleSpec, update: int, total: int) -> float:
    if update < spec.warmup_steps:
        return (update + 1) / spec.warmup_steps
    left = min(1.0, (total - update) / _decay_updates(spec, total))
    return spec.final + (1 - spec.final) * left


def _inverse_sqrt(spec: ScheduleSpec, update: int, total: int) -> float:
    warmup = max(1, spec.warmup_steps)
    return min((update + 1) / warmup, math.sqrt(warmup / (update + 1)))


def _one_cycle(spec: ScheduleSpec, update: int, total: int) -> float:
    start = 1 / 25
    peak = (spec.warmup_steps or 0.3 * total) - 1
    if update < peak:
        return 1 + (start - 1) * _cosine(update / peak)
    progress = min(1.0, (update - peak) / max(1.0, total - 1 - peak))
    return spec.final + (1 - spec.final) * _cosine(progress)


_SHAPES: dict[str, _Shape] = {
    "constant": _after_warmup(lambda spec, progress: 1.0),
    "plateau": _after_warmup(lambda spec, progress: 1.0),
    "linear": _after_warmup(lambda spec, progress: 1 - progress),
    "polynomial": _after_warmup(lambda spec, progress: (1 - progress) ** spec.power),
    "cosine": _after_warmup(lambda spec, progress: _cosine(progress)),
    "wsd": _wsd,
    "inverse_sqrt": _inverse_sqrt,
    "one_cycle": _one_cycle,
}
_USED_BY = {
    "final": ("linear", "cosine", "wsd", "polynomial", "one_cycle", "plateau"),
    "decay_share": ("wsd",),
    "power": ("polynomial",),
    "patience": ("plateau",),
    "factor": ("plateau",),
}
