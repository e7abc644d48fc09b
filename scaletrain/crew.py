"""What a stage is trained with, and where it stands: what the trainer moves and a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scaletrain.engine.base import Engine
from scaletrain.objectives.base import Data, Objective
from scaletrain.player import Player


@dataclass
class Progress:
    """Where a stage stands: everything that is not a tensor and not a player's. Saved as it is."""

    step: int = 0
    """Steps of this stage that are done."""
    first_step: int = 0
    """Steps of the run before this stage."""
    examples: int = 0
    """To train on, in all: other data is another run."""
    complete: bool = False
    best: float | None = None
    """The best value of `evaluate.metric` so far."""
    waited: int = 0
    """Evaluations since then."""
    best_saved: float | None = None
    """The best value of `checkpoint.best` so far."""
    figures: dict[str, float] = field(default_factory=dict)
    """Of turns that were taken since the last logged step, for the next."""
    seen: dict[str, float] = field(default_factory=dict)
    """Units that the first turn has been trained on: samples, tokens ..."""


@dataclass(frozen=True)
class Crew:
    """What a stage is trained with, all built and on the device."""

    objective: Objective[Any]
    data: Data
    engine: Engine
    players: Mapping[str, Player]
