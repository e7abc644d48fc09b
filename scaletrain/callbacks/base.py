"""What an observer is told. Observers live on rank 0, write and show; the trainer never asks them anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scaletrain.objectives.base import Samples


@dataclass(frozen=True)
class Plan:
    """What was derived before a stage begins."""

    stage: str
    stages: tuple[str, ...]
    first_step: int
    """Global step at which the stage began."""
    steps: int
    """Steps of this stage."""
    at: int
    """Step of the stage to begin with: more than 0 when it is resumed."""
    parameters: int
    trainable: int
    micro_batch: int
    accumulate: int
    processes: int
    precision: str
    device: str
    train_examples: int
    """Rows, of a stream."""
    streamed: bool
    eval_examples: int
    eval_sources: tuple[str, ...]
    """Names of those that are each evaluated by itself, too."""
    bytes: dict[str, int]
    """Memory of one process by kind: weights, gradients, optimiser, average."""
    unit: str
    """Of the throughput."""


class Observer:
    """Does nothing; subclasses override what they are interested in."""

    def begin(self, plan: Plan) -> None:
        """A stage begins."""

    def step(self, step: int, record: Mapping[str, Any] | None) -> None:
        """A step of the run ended; `record` holds its figures at the steps that are logged."""

    def evaluated(self, step: int, record: Mapping[str, Any]) -> None:
        """An evaluation ended."""

    def sampled(self, step: int, samples: Samples) -> None:
        """Samples were drawn."""

    def noted(self, step: int, record: Mapping[str, Any]) -> None:
        """Something out of the ordinary happened: an update was left out (`skip`), the run went back (`rollback`)."""

    def saved(self, step: int, seconds: float) -> None:
        """A checkpoint was written."""

    def say(self, text: str) -> None:
        """Something to tell the user."""

    def end(self) -> None:
        """The run ends, well or not."""
