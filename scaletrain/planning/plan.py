"""`scaletrain plan`: what every stage of a run needs on each process, what fits, and what to change when it does not.

No GPU is needed and no weights are read: see `rehearse.py` for the memory of a step.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scaletrain.callbacks.base import Plan
from scaletrain.config import Recipe
from scaletrain.crew import Progress
from scaletrain.crew import plan as arithmetic
from scaletrain.errors import UserError
from scaletrain.planning.advice import advise, largest
from scaletrain.planning.rehearse import Imagined, Part
from scaletrain.planning.share import Memory, Way
from scaletrain.planning.trial import Trials
from scaletrain.position import steps_of
from scaletrain.recipe import stages
from scaletrain.runs import foresee

RESERVED = 0.08
"""Part of a GPU's memory that is left for its driver, its libraries' work space, and gaps between tensors."""


@dataclass(frozen=True)
class Needs:
    """What one stage comes to.

    seen: units that are trained on, by name. hours: with a throughput. usable: bytes of a device that may be planned
    with. best: the largest micro-batch that fits. advice: settings to change when the stage does not fit, and what it
    then takes; empty when there are none that help. unknown: the operation that could not be rehearsed.
    """

    plan: Plan
    way: Way
    memory: Memory
    seen: dict[str, float]
    hours: float | None = None
    usable: int | None = None
    best: int | None = None
    advice: tuple[str, ...] = ()
    unknown: str | None = None

    @property
    def fits(self) -> bool | None:
        """Whether it does, where that was asked."""
        return None if self.usable is None else self.memory.peak <= self.usable


def read_memory(text: str) -> int:
    """Read a size such as 80GB, 24GiB or 80e9. Raises UserError."""
    match = re.fullmatch(r"\s*([0-9.]+(?:[eE][+]?[0-9]+)?)\s*(?:([kKMGT])(i?)B?|B)?\s*", text)
    try:
        number = float(match.group(1)) if match else 0.0
    except ValueError:
        number = 0.0
    if not match or not number:
        raise UserError(f"--device-memory: `{text}` is no size; write 80GB, 24GiB or 80e9.")
    power = " KMGT".index((match.group(2) or " ").upper())
    return int(number * (1024 if match.group(3) else 1000) ** power)


def plan(
    recipe: Recipe, way: Way, device_memory: int | None = None, throughput: float | None = None
) -> Iterator[Needs]:
    """Yield what each stage needs. throughput: units of the family in a second, of all processes. Raises UserError."""
    names = tuple(stage.name for stage in stages(recipe))
    with tempfile.TemporaryDirectory() as folder:
        for found in foresee(recipe, Path(folder), Imagined(way.processes)):
            yield _needs(Trials(Part(*found)), names, way, device_memory, throughput)


def _needs(
    trials: Trials, names: tuple[str, ...], way: Way, device_memory: int | None, throughput: float | None
) -> Needs:
    part, recipe = trials.part, trials.part.stage.recipe
    layout = trials.layout(way)
    usable = None
    if device_memory is not None:
        usable = int(device_memory * (1 - RESERVED)) if way.cuda else device_memory
    best: int | None = None
    advice: tuple[str, ...] = ()
    objective, turn, data = part.objective, part.objective.turns[0], part.data
    steps = steps_of(recipe.train.duration, objective.turns, data, recipe.train.global_batch)
    with trials.begun(way, recipe.train) as trial:
        device = "GPU" if way.cuda else "CPU"
        header = arithmetic(part.stage, names, trial.rehearsal.crew, Progress(), layout, steps, device)
        memory = trial.memory(layout.micro_batch)
        if usable is not None and not trials.unknown:
            best = largest(trial, usable)
    if usable is not None and best is None and not trials.unknown:
        advice = advise(trials, way, usable)
    seen = {"samples": steps * turn.repeats / turn.every * recipe.train.global_batch}
    if data.train.tokens_per_example:
        seen["tokens"] = seen["samples"] * data.train.tokens_per_example
    unit = "tokens" if objective.throughput == "tokens" else "samples"
    hours = seen[unit] / throughput / 3600 if throughput and unit in seen else None
    return Needs(header, way, memory, seen, hours, usable, best, advice, trials.unknown)
