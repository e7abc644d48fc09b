"""An objective's evaluation terms over a whole set: sums over samples and processes, divided once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from scaletrain.config import Recipe
from scaletrain.data.dataset import Dataset
from scaletrain.data.loader import REPEATED, passes
from scaletrain.data.order import key_of
from scaletrain.engine.precision import autocast
from scaletrain.engine.world import World
from scaletrain.objectives.base import Objective


def evaluate(
    objective: Objective[Any],
    networks: Mapping[str, torch.nn.Module],
    dataset: Dataset | None,
    recipe: Recipe,
    world: World,
    beat: Callable[[], None] = lambda: None,
    lockstep: bool = False,
) -> dict[str, float]:
    """Return each term of the evaluation set, summed over ranks and divided once; nothing without such a set.

    beat: called at each batch. lockstep: all ranks take as many batches; one that has fewer takes one that is not
    counted.
    """
    if dataset is None:
        return {}
    share = world.agree(lambda: _share(objective, networks, dataset, recipe, world, beat, lockstep))
    shares = world.gather(share)
    units = {k: v for share in shares for k, v in share[2].items()}
    weights = {k: v for share in shares for k, v in share[3].items()}
    metrics = {}
    for name, unit in units.items():
        total = sum(share[1].get(unit, 0) for share in shares)
        metrics[name] = sum(share[0].get(name, 0.0) for share in shares) / total if total else math.nan
    if any(weights.values()):
        metrics.setdefault("loss", sum(weights[name] * value for name, value in metrics.items()))
    return objective.conclude(metrics)


def _share(
    objective: Objective[Any],
    networks: Mapping[str, torch.nn.Module],
    dataset: Dataset,
    recipe: Recipe,
    world: World,
    beat: Callable[[], None],
    lockstep: bool,
) -> tuple[dict[str, float], dict[str, int], dict[str, str], dict[str, float]]:
    """Return this rank's sums of terms, counts of units, the unit of each term and its weight."""
    sums: dict[str, torch.Tensor] = {}
    units: dict[str, str] = {}
    weights: dict[str, float] = {}
    counts: dict[str, int] = {}
    for micro in passes(dataset, batch_size(recipe), world.size, world.rank, lockstep):
        beat()
        torch.manual_seed(key_of(recipe.seed, "evaluate", micro.number))
        tensors = {name: tensor.to(world.device) for name, tensor in micro.tensors.items()}
        with torch.no_grad(), autocast(world.device, recipe.train.precision):
            terms = objective.evaluate(networks, tensors)
        if micro.window == REPEATED:
            continue
        for unit, number in objective.counts(objective.turns[0], micro.tensors).items():
            counts[unit] = counts.get(unit, 0) + number
        for name, term in terms.items():
            sums[name] = sums.get(name, 0) + term.sum.double()
            units[name], weights[name] = term.per, term.weight
    return {name: float(value) for name, value in sums.items()}, counts, units, weights


def batch_size(recipe: Recipe) -> int:
    """Return how many samples an evaluation takes at a time: not a matter of how many processes there are."""
    return recipe.evaluate.batch or recipe.train.micro_batch or min(recipe.train.global_batch, 64)
