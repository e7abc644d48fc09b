"""What a stage is trained with, and where it stands: what the trainer moves and a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from scaletrain.callbacks.base import Plan
from scaletrain.config import Stage
from scaletrain.data.loader import Layout
from scaletrain.data.stream import Stream
from scaletrain.engine.base import Engine
from scaletrain.evaluation import sources_of
from scaletrain.objectives.base import Data, Objective
from scaletrain.parameters import in_an_element
from scaletrain.player import Player


@dataclass
class Progress:
    """Where a stage stands: everything that is not a tensor and not a player's. Saved as it is."""

    step: int = 0
    """Steps of this stage that are done."""
    first_step: int = 0
    """Steps of the run before this stage."""
    facts: dict[str, str] = field(default_factory=dict)
    """Fingerprints of what the examples are made of: other data is another run."""
    batch: list[int] = field(default_factory=list)
    """Samples of a global batch and of a micro-batch: the lanes of the data."""
    cursors: dict[str, list[list[int]]] = field(default_factory=dict)
    """Of a stream: where each lane stands, by number."""
    skipped: list[int] = field(default_factory=list)
    """Windows of the data that are not trained on, since they led to a rollback."""
    refused: int = 0
    """Updates that the guard has left out in a row."""
    history: dict[str, list[list[float]]] = field(default_factory=dict)
    """By turn: the last losses and gradient norms, that spikes are told by."""
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


def plan(
    stage: Stage, stages: tuple[str, ...], crew: Crew, progress: Progress, layout: Layout, steps: int, device: str
) -> Plan:
    """Return what was derived for a stage, to be told before it starts."""
    networks, players = crew.engine.plain().values(), crew.players.values()
    trainable = [p for player in players for p in player.trainable.values()]

    def size(parameter: torch.Tensor) -> int:
        return crew.engine.shape(parameter).numel()

    memory = {
        "weights": sum(size(p) * p.element_size() for network in networks for p in network.parameters()),
        "gradients": sum(size(p) * p.element_size() for p in trainable),
        "optimiser": sum(player.optimizer_bytes for player in players),
        "average": sum(4 * size(p) for player in players if player.ema for p in player.trainable.values()),
    }
    return Plan(
        stage=stage.name,
        stages=stages,
        first_step=progress.first_step,
        steps=steps,
        at=progress.step,
        parameters=sum(size(p) * in_an_element(p) for network in networks for p in network.parameters()),
        trainable=sum(size(p) for p in trainable),
        micro_batch=layout.micro_batch,
        accumulate=layout.accumulate,
        processes=layout.world,
        precision=stage.recipe.train.precision,
        device=device,
        train_examples=len(crew.data.train),
        streamed=isinstance(crew.data.train, Stream),
        eval_examples=len(crew.data.eval) if crew.data.eval else 0,
        eval_sources=sources_of(crew.data.eval),
        bytes=memory,
        unit=crew.objective.throughput,
    )
