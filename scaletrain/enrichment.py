"""What networks do for the data: before the training, once; before each window is counted; and before its losses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from scaletrain.assemble import build_networks, in_parts
from scaletrain.config import NetworkSpec, Recipe, Stage
from scaletrain.crew import Crew
from scaletrain.data.loader import Failure, Micro
from scaletrain.data.order import key_of
from scaletrain.engine.choice import build_engine
from scaletrain.engine.precision import autocast
from scaletrain.engine.world import World
from scaletrain.errors import Interrupted, UserError, agreed
from scaletrain.objectives.base import Ahead, Networks
from scaletrain.player import Batch, Turn
from scaletrain.shelf import Shelf

log = logging.getLogger("scaletrain")


def do_ahead(
    ahead: Ahead,
    specs: Mapping[str, NetworkSpec],
    stage: Stage,
    shelf: Shelf,
    world: World,
    stopped: Callable[[], bool],
) -> None:
    """Do the work that is missing, its parts shared among the processes. The networks are built for it, and let go.

    specs: of its networks. stopped: whether a signal asked to stop. Raises Interrupted, then; parts that are done
    stay. Raises UserError.
    """
    missing = world.broadcast(ahead.missing())
    if not missing:
        return
    recipe = stage.recipe
    engine = build_engine(world, recipe.train.precision)
    try:
        networks, weights = world.agree(lambda: build_networks(specs, shelf, None, engine, recipe.seed, stage.name))
        engine.wrap(networks, in_parts(specs, networks), weights)
        rounds = _rounds(missing, ahead.kind, world.size)
        for number, parts in enumerate(rounds, 1):
            if world.total([float(stopped())])[0]:
                raise Interrupted("stopped before a step was taken; run the same command again to go on.")
            log.info("%s: part %d of %d", ", ".join(networks), number, len(rounds))
            part = parts[min(world.rank, len(parts) - 1)]  # at the end some do what another does
            with torch.no_grad(), autocast(world.device, recipe.train.precision):
                ahead.do(networks, world.device, part)
    finally:
        engine.close()
    world.barrier()
    if any(world.gather(bool(ahead.missing()))):
        raise agreed(
            UserError("a process does not see what another has written: SCALETRAIN_CACHE must be on a shared disk.")
        )


def _rounds(parts: Sequence[int], kind: Callable[[int], Hashable], size: int) -> list[list[int]]:
    """Return parts that so many processes do at a time, all of one kind."""
    kinds: dict[Hashable, list[int]] = {}
    for part in parts:
        kinds.setdefault(kind(part), []).append(part)
    return [alike[first : first + size] for alike in kinds.values() for first in range(0, len(alike), size)]


def enriched(
    window: list[Micro] | Failure, turn: Turn, crew: Crew, recipe: Recipe, place: tuple[Any, ...]
) -> list[Micro] | Failure:
    """Let the objective make of a window what it is trained on, on all ranks, or on none where one has no data.

    place: where the run stands, for the seeds.
    """
    world = crew.engine.world
    if world.total([float(isinstance(window, Failure))])[0] or isinstance(window, Failure):
        return window
    key = (recipe.seed, *place, turn.name, "enrich")
    seeds = [key_of(*key, micro.number) for micro in window]
    torch.manual_seed(key_of(*key))
    with torch.no_grad(), autocast(world.device, recipe.train.precision):
        batches = crew.objective.enrich(
            turn, crew.engine.plain(), [micro.tensors for micro in window], seeds, world.device
        )
    return [replace(micro, tensors=dict(batch)) for micro, batch in zip(window, batches, strict=True)]


def surveyed(
    batches: Iterable[Batch], turn: Turn, networks: Networks, counts: Mapping[str, int], crew: Crew, recipe: Recipe
) -> dict[str, torch.Tensor]:
    """Return what the losses of a window must know of the whole of it, as () tensors.

    batches: its micro-batches, each seeded for as it is taken. counts: of the whole window.
    """
    world = crew.engine.world
    with torch.no_grad(), autocast(world.device, recipe.train.precision):
        found = [crew.objective.survey(turn, networks, batch) for batch in batches]
    names = list(found[0])
    sums = torch.stack([torch.stack([terms[name].sum.float() for terms in found]).sum() for name in names])
    totals = dict(zip(names, world.total(sums.tolist()), strict=True))
    return {n: torch.tensor(total / counts[found[0][n].per], device=world.device) for n, total in totals.items()}
