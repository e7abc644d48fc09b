"""An objective's evaluation terms over a whole set: sums over samples and processes, divided once.

Where the set is made of several sources, each is evaluated by itself: the terms are given by source, as `loss@SOURCE`,
and in all, as `loss`. Where an objective generates answers to compare, that is one more pass, over some of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from scaletrain.config import Recipe
from scaletrain.data.dataset import Dataset, First
from scaletrain.data.joined import parts_of
from scaletrain.data.loader import REPEATED, passes
from scaletrain.data.order import key_of
from scaletrain.engine.precision import autocast
from scaletrain.engine.world import World
from scaletrain.objectives.base import Objective
from scaletrain.player import Batch, Term


@dataclass
class Tally:
    """Sums of terms, the unit and the weight of each, and how many there are of each unit."""

    sums: dict[str, float] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


def evaluate(
    objective: Objective[Any],
    networks: Mapping[str, torch.nn.Module],
    dataset: Dataset | None,
    recipe: Recipe,
    world: World,
    beat: Callable[[], None] = lambda: None,
    lockstep: bool = False,
    first: int | None = None,
) -> dict[str, float]:
    """Return each term of the evaluation set, summed over ranks and divided once; nothing without such a set.

    beat: called at each batch. lockstep: all ranks take as many batches; one that has fewer takes one that is not
    counted. first: take so many examples of each source only.
    """
    if dataset is None:
        return {}
    parts = parts_of(dataset)
    tallies = world.agree(lambda: _share(objective, networks, parts, recipe, world, beat, lockstep, first))
    shares = world.gather(tallies)
    metrics = objective.conclude(_divided(tally for share in shares for tally in share.values()))
    for name in sources_of(dataset):
        own = objective.conclude(_divided(share[name] for share in shares))
        metrics |= {of_source(metric, name): value for metric, value in own.items()}
    return metrics


def sources_of(dataset: Dataset | None) -> tuple[str, ...]:
    """Return the names of the sources that are each evaluated by itself, too: of several."""
    parts = {} if dataset is None else parts_of(dataset)
    return tuple(parts) if len(parts) > 1 else ()


def of_source(metric: str, source: str) -> str:
    """Return the name of a metric of one source; a slash would take classes, as in `f1/CLASS`, for sources."""
    return f"{metric}@{source}"


def _divided(tallies: Iterable[Tally]) -> dict[str, float]:
    """Add up, and divide each sum by the number of its unit."""
    sums: dict[str, float] = {}
    units: dict[str, str] = {}
    weights: dict[str, float] = {}
    counts: dict[str, int] = {}
    for tally in tallies:
        units, weights = {**units, **tally.units}, {**weights, **tally.weights}
        for total, own in ((sums, tally.sums), (counts, tally.counts)):
            for name, number in own.items():
                total[name] = total.get(name, 0) + number  # type: ignore[assignment]
    metrics = {name: sums[name] / counts[unit] if counts.get(unit) else math.nan for name, unit in units.items()}
    if any(weights.values()):
        weighted = sum(weights[name] * value for name, value in metrics.items() if weights[name])
        metrics.setdefault("loss", weighted)
    return metrics


def _share(
    objective: Objective[Any],
    networks: Mapping[str, torch.nn.Module],
    parts: Mapping[str, Dataset],
    recipe: Recipe,
    world: World,
    beat: Callable[[], None],
    lockstep: bool,
    first: int | None,
) -> dict[str, Tally]:
    """Return what this rank's batches of each source come to."""
    sums: dict[str, dict[str, torch.Tensor]] = {name: {} for name in parts}
    tallies = {name: Tally() for name in parts}
    before = 0

    def take(
        part: str,
        dataset: Dataset,
        terms_of: Callable[[Batch], dict[str, Term]],
        count: Callable[[Batch], dict[str, int]],
    ) -> None:
        nonlocal before
        tally, total = tallies[part], sums[part]
        dataset = First(dataset, first) if first else dataset
        for micro in passes(dataset, recipe.evaluation_batch, world.size, world.rank, lockstep):
            beat()
            torch.manual_seed(key_of(recipe.seed, "evaluate", before + micro.number))
            tensors = {name: tensor.to(world.device) for name, tensor in micro.tensors.items()}
            with torch.no_grad(), autocast(world.device, recipe.train.precision):
                terms = terms_of(tensors)
            if micro.window == REPEATED:
                continue
            for unit, number in count(micro.tensors).items():
                tally.counts[unit] = tally.counts.get(unit, 0) + number
            for name, term in terms.items():
                total[name] = total.get(name, 0) + term.sum.double()
                tally.units[name], tally.weights[name] = term.per, term.weight
        before += -(-len(dataset) // recipe.evaluation_batch)

    for name, dataset in parts.items():
        take(name, dataset, partial(objective.evaluate, networks), partial(objective.counts, objective.turns[0]))
    for name, dataset in parts.items():
        if answers := objective.answers(dataset):
            take(name, answers, partial(objective.judge, networks, lockstep=lockstep), _answers)
        tallies[name].sums = {term: float(value) for term, value in sums[name].items()}
    return tallies


def _answers(batch: Batch) -> dict[str, int]:
    return {"answers": len(next(iter(batch.values())))}
