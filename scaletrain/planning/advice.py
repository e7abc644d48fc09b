"""What to change when a stage does not fit, the cheapest first, and how large a micro-batch may be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from scaletrain.config import TrainSpec
from scaletrain.errors import UserError
from scaletrain.planning.share import IN_PARTS, Way
from scaletrain.planning.trial import Trial, Trials


def largest(trial: Trial, usable: int) -> int | None:
    """Return the largest micro-batch that fits, or None when the smallest does not."""
    if trial.least > usable:
        return None
    micros = trial.micro_batches
    low = 0  # those before it fit
    high = len(micros)  # those from it on do not
    while low < high:
        middle = (low + high) // 2 if low else 0
        if trial.memory(micros[middle]).peak <= usable:
            low = middle + 1
        else:
            high = middle
    return micros[low - 1] if low else None


def advise(trials: Trials, way: Way, usable: int) -> tuple[str, ...]:
    """Return the settings that make a stage fit, as they are written; none when nothing does.

    In order of price: recomputing, half precision, then parts in place of wholes, host memory, and more processes.
    """
    return _Search(trials, way, usable).settings()


class _Search:
    """Looks for settings with which the smallest micro-batch fits."""

    def __init__(self, trials: Trials, way: Way, usable: int):
        self._trials, self._way, self._usable = trials, way, usable
        self._train = trials.part.stage.recipe.train
        self._fitting: dict[tuple[Way, str, str], bool] = {}

    def settings(self) -> tuple[str, ...]:
        for way in self._ways():
            for train in self._savers():
                if self._fits(way, train):
                    with self._trials.begun(way, train) as trial:
                        return (*self._said(way, train), f"train.micro_batch={largest(trial, self._usable)}")
        return ()

    def _said(self, way: Way, train: TrainSpec) -> Iterator[str]:
        for key in ("recompute", "precision"):
            if getattr(self._train, key) != getattr(train, key):
                yield f"train.{key}={getattr(train, key)}"
        if self._way.engine != way.engine:
            yield f"--engine {way.engine}"
        if self._way.offload != way.offload:
            yield "--offload"
        if self._way.processes != way.processes:
            yield f"--processes {way.processes}"

    def _savers(self) -> Iterator[TrainSpec]:
        """Yield settings that need less memory for activations, from as it is to all of them."""
        order, given = ["off", "selective", "full"], self._train
        for precision in dict.fromkeys((given.precision, "bf16" if given.precision == "fp32" else given.precision)):
            for recompute in order[order.index(given.recompute) :]:
                yield given.model_copy(update={"precision": precision, "recompute": recompute})

    def _ways(self) -> Iterator[Way]:
        """Yield where weights, gradients and optimiser may be, the cheapest first, of those that can fit."""
        way, batch = self._way, self._train.global_batch
        parts = way
        if way.engine not in IN_PARTS:
            parts = replace(way, engine="fsdp2" if way.processes > 1 else "zero3", offload=False)
        ways = [way, *([parts] if way.processes > 1 else [])]
        if not way.offload and way.cuda:
            ways.append(replace(parts, offload=True))
        yield from filter(self._possible, dict.fromkeys(ways))
        engine = "zero3" if parts.engine == "zero3" and way.processes > 1 else "fsdp2"
        counts = [n for n in range(way.processes + 1, batch + 1) if batch % n == 0]
        yield from self._first([replace(way, engine=engine, processes=n) for n in counts])

    def _first(self, ways: list[Way]) -> list[Way]:
        """Return the first that is possible, where those after it are, too."""
        low, high = 0, len(ways)
        while low < high:
            middle = (low + high) // 2
            if self._possible(ways[middle]):
                high = middle
            else:
                low = middle + 1
        return ways[low : low + 1]

    def _possible(self, way: Way) -> bool:
        """Say whether it fits with all that saves activations."""
        return any(self._fits(way, train) for train in self._savers() if train.recompute == "full")

    def _fits(self, way: Way, train: TrainSpec) -> bool:
        key = (way, train.precision, train.recompute)
        if key not in self._fitting:
            try:
                with self._trials.begun(way, train) as trial:
                    fitting = trial.least <= self._usable and trial.memory(1).peak <= self._usable
            except UserError:  # what cannot be launched, such as an optimiser that an engine cannot step
                fitting = False
            self._fitting[key] = fitting
        return self._fitting[key]
