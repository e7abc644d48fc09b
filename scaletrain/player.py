"""What is optimised, when, and on what loss: the words that the trainer, the engines and the objectives share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from scaletrain.engine.precision import LossScaler
    from scaletrain.optim.ema import EMA
    from scaletrain.optim.schedules import Schedule

Batch = Mapping[str, "torch.Tensor"]
"""One micro-batch: names to tensors whose first dimension is the sample (or, for packs, the pack)."""


@dataclass(frozen=True)
class Turn:
    """One entry of an objective's schedule.

    At each step, turns are taken in order. A turn is left out of the steps that `every` does not divide, and is
    otherwise taken `repeats` times, each time on an accumulation window of its own and with one update of `player`.
    """

    name: str
    player: str
    repeats: int = 1
    every: int = 1


@dataclass(frozen=True)
class Term:
    """An unreduced part of a loss: the sum over a micro-batch, and the unit that it is a sum over.

    The trainer divides by the number of units in the whole global batch (all micro-batches, all processes), so the
    loss is Σ weight · Σ sum / count and does not depend on accumulation or sharding. Weight 0 is a figure for the log:
    it is not trained on and should be detached.

    sum: scalar tensor. per: a unit that the objective's `counts` gives. weight: factor in the loss.
    """

    sum: torch.Tensor
    per: str
    weight: float = 1.0


@dataclass(frozen=True)
class Outcome:
    """What one update came to, on every rank alike.

    stepped: whether the weights were changed. finite: whether the gradients were finite.
    """

    stepped: bool
    finite: bool
    grad_norm: float
    scale: float = 1.0


@dataclass
class Player:
    """A named set of trainable networks with its own optimiser, schedule, clip, scaler, EMA and counters."""

    name: str
    networks: dict[str, nn.Module]
    trainable: dict[str, nn.Parameter]
    """By `network/parameter` name, fixed at the start: the names that checkpoints use."""
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    clip: float | None = None
    scaler: LossScaler | None = None
    ema: EMA | None = None
    updates: int = 0
    skipped: int = 0
    base_lrs: list[float] = field(default_factory=list)
    optimizer_bytes: int = 0
    """What the optimiser's state will come to, for the plan."""

    def set_lr(self) -> None:
        """Set the learning rate of every group for the update that comes next."""
        factor = self.schedule.factor(self.updates)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor

    def counters(self) -> dict[str, Any]:
        """Return what a checkpoint needs beside tensors."""
        state: dict[str, Any] = {"updates": self.updates, "skipped": self.skipped}
        state["schedule"] = self.schedule.state_dict()
        state["scaler"] = self.scaler.state_dict() if self.scaler else None
        return state

    def load_counters(self, state: Mapping[str, Any]) -> None:
        """Take back what `counters` returned."""
        self.updates, self.skipped = state["updates"], state["skipped"]
        self.schedule.load_state_dict(state["schedule"])
        if self.scaler and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
