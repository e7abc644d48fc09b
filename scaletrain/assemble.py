"""From a stage's recipe to its data, networks and players."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scaletrain.checkpoint.tensors import Stored
from scaletrain.config import NetworkSpec, PlayerSpec, Recipe, SourceSpec
from scaletrain.data.cache import content_key
from scaletrain.data.dataset import Dataset
from scaletrain.data.joined import Joined, short_names
from scaletrain.data.mixture import Mixture, Shares
from scaletrain.data.order import key_of
from scaletrain.data.sources import Rows, joined, open_rows, split_holdout
from scaletrain.data.stream import WINDOW, Source, Stream
from scaletrain.engine.base import Engine
from scaletrain.engine.precision import build_scaler
from scaletrain.engine.statistics import statistics
from scaletrain.errors import UserError, did_you_mean
from scaletrain.explain import decode
from scaletrain.networks import quantised
from scaletrain.networks._post_training import require_torchao
from scaletrain.networks.build import build, network_module
from scaletrain.networks.unread import unread
from scaletrain.objectives.base import Data, Objective
from scaletrain.optim.ema import EMA
from scaletrain.optim.optimizers import build_optimizer, state_bytes
from scaletrain.optim.schedules import build_schedule
from scaletrain.parameters import align, to_device
from scaletrain.player import Player, Turn
from scaletrain.position import windows_before
from scaletrain.shelf import Shelf


def prepare(objective: Objective[Any], recipe: Recipe) -> Data:
    """Open the data and let the objective make examples of them. Raises UserError."""
    spec = recipe.data
    weighted = spec.train[0].weight is not None
    parts = [open_rows([source]) for source in spec.train] if weighted else [open_rows(spec.train)]
    held: dict[str, Rows] = {}
    if spec.eval is not None:
        held = _open_held(spec.eval)
    elif spec.holdout:
        seed = recipe.seed if spec.seed is None else spec.seed
        parts, aside = map(list, zip(*(split_holdout(rows, spec.holdout, seed) for rows in parts), strict=True))
        names = short_names([source.path for source in spec.train]) if weighted else [""]
        held = dict(zip(names, aside, strict=True))
    return examples_of(objective, parts, held)


def prepare_held(objective: Objective[Any], sources: Sequence[SourceSpec]) -> Dataset:
    """Make examples to evaluate a restored objective on, without the training data. Raises UserError."""
    held = _open_held(sources)
    rows = joined(list(held.values()))
    objective.prepare(rows, rows)
    return _held_examples(objective, held)


def _open_held(sources: Sequence[SourceSpec]) -> dict[str, Rows]:
    """Open each source, under a short name."""
    return {name: open_rows([s]) for name, s in zip(short_names([s.path for s in sources]), sources, strict=True)}


def _held_examples(objective: Objective[Any], held: Mapping[str, Rows]) -> Dataset:
    """Make examples of each source, so that each is evaluated by itself, too."""
    sets = [objective.examples(rows, False) for rows in held.values()]
    return sets[0] if len(sets) == 1 else Joined(sets, tuple(held))


def examples_of(objective: Objective[Any], parts: Sequence[Rows], held: Mapping[str, Rows]) -> Data:
    """Make examples of the training rows: of one source, or of several that are mixed. Raises UserError.

    held: rows to evaluate on, by the name of their source; empty for none.
    """
    spec = objective.recipe.data
    train = joined(parts)
    objective.prepare(train, joined(list(held.values())) if held else None)
    streamed = objective.windowed and train.streaming
    sets = [objective.examples(rows.sample(WINDOW) if streamed else rows, True) for rows in parts]
    shares = _shares(objective, sets) if spec.train[0].weight is not None else None
    labels = [source.path for source in spec.train] if shares else [", ".join(source.path for source in spec.train)]
    found: Dataset | Stream
    if streamed:
        expand = partial(objective.examples, training=True, window=True)
        means = [part.tokens_per_example for part in sets]
        found = Stream(tuple(map(Source, labels, parts, repeat(expand), means)), shares)
    else:
        found = Mixture(sets, shares, labels) if shares else sets[0]
    made_of = train.fingerprint if len(parts) == 1 else content_key(*(part.fingerprint for part in parts))
    facts = {"data.train": made_of, **objective.facts()}
    if train.streaming:
        how = (spec.seq_len, spec.packing, spec.shuffle, spec.seed)
        facts["how its rows are read (data.seq_len, packing, shuffle or seed)"] = content_key(how)
    return Data(found, _held_examples(objective, held) if held else None, facts, train.streaming)


def _shares(objective: Objective[Any], sets: Sequence[Dataset]) -> Shares:
    """Return what part of the examples each source has, by the window."""
    spec = objective.recipe.data
    sizes = [1.0 if spec.weigh_by == "samples" else part.tokens_per_example for part in sets]
    if None in sizes:
        raise UserError("data.weigh_by: these data have no tokens; take `samples`.")
    weights = [w if isinstance(w := source.weight, dict) else {0: w or 0.0} for source in spec.train]
    return Shares.of(weights, sizes, lambda step: windows_before(objective.turns, step))  # type: ignore[arg-type]


def check_names(recipe: Recipe, turns: tuple[Turn, ...], specs: Mapping[str, NetworkSpec]) -> None:
    """Check networks and players against what the family has. Raises UserError that names the key."""
    for name, spec in specs.items():
        if spec.type is None:
            raise UserError(f"networks.{name}.type is missing: say which network it is.")
        if spec.qat is not None:
            require_torchao(f"networks.{name}.qat")
        decode(network_module(spec.type, f"networks.{name}").Config, spec.config, f"networks.{name}.config")
        quantised.check(spec, f"networks.{name}")
    for name in recipe.networks:
        if name not in specs:
            raise UserError(f"networks.{name}: this family has no such network.{did_you_mean(name, specs)}")
    owner: dict[str, str] = {}
    for name in dict.fromkeys(turn.player for turn in turns):
        player = recipe.players.get(name, PlayerSpec())
        for network in player.networks or [name]:
            if network not in specs:
                raise UserError(f"players.{name}.networks: no network `{network}`.{did_you_mean(network, specs)}")
            if network in owner:
                raise UserError(f"players.{name}.networks: `{network}` is trained by `{owner[network]}` already.")
            owner[network] = name
            spec = specs[network]
            if spec.shard is not None and not spec.frozen:
                raise UserError(f"networks.{network}.shard is for frozen networks: what is trained is held in parts.")
            if spec.trainable is not None and (spec.frozen or spec.adapter is not None):
                why = "it is frozen" if spec.frozen else "its adapter says what is trained"
                raise UserError(f"networks.{network}.trainable: {why}; leave `trainable` or that out.")
            if spec.dtype != "float32" and not spec.frozen and spec.adapter is None:
                raise UserError(
                    f"networks.{network}.dtype: what is trained is kept in float32; set train.precision=bf16 instead."
                )


def build_networks(
    specs: Mapping[str, NetworkSpec], shelf: Shelf, checkpoint: Path | None, engine: Engine, *seed: object
) -> tuple[dict[str, nn.Module], dict[str, dict[str, Stored]]]:
    """Build every network of a stage on the device. New weights are a function of (seed, network's name).

    checkpoint: the one to resume from, if any. Returns, too, where weights are that the engine reads in parts.
    """
    networks, weights = {}, {}
    check_held(specs, engine)
    for name, spec in specs.items():
        torch.manual_seed(key_of(*seed, "weights", name))
        saved = checkpoint / "networks" / name if checkpoint else None
        saved = saved if saved and saved.is_dir() else None  # frozen networks are not saved
        left = unread(name, spec, saved) if engine.reads else None
        if left and in_parts({name: spec}, {name: left.module}):
            module, weights[name] = left.module, left.weights
            to_device(module, engine.world.device)
        else:
            torch.manual_seed(key_of(*seed, "weights", name))
            base = shelf.base(spec) if saved is None or spec.adapter else None
            module = build(name, spec, base, saved).to(engine.world.device)
            align(module)
        module.train(not spec.frozen)
        networks[name] = module
    return networks, weights


def check_held(specs: Mapping[str, NetworkSpec], engine: Engine) -> None:
    """Raise UserError for a network that an engine cannot hold."""
    for name, spec in specs.items():
        if reason := engine.cannot_hold(spec):
            raise UserError(f"networks.{name}: {reason}")


def check_able(objective: Objective[Any], engine: Engine) -> None:
    """Raise UserError for an objective whose loss takes what an engine cannot do."""
    if objective.differentiates_forward and not engine.differentiates_forward:
        raise UserError(
            f"objective.type: {objective.recipe.objective.type} differentiates networks forward, which {engine.name} "
            "cannot: launch with ZeRO-2, FSDP or MULTI_GPU."
        )


def in_parts(specs: Mapping[str, NetworkSpec], networks: Mapping[str, nn.Module]) -> list[str]:
    """Return the networks to hold in parts, where an engine does: what is trained, and frozen ones that are large."""
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in networks.items()}
    large = {
        n: sizes[n] >= _LARGE and not spec.quantize if spec.shard is None else spec.shard for n, spec in specs.items()
    }
    return [name for name, spec in specs.items() if large[name] or not spec.frozen]


_LARGE = 1e9
"""Weights of a frozen network from which it is held in parts, unless its `shard` differs."""


def updates_of(player: str, turns: tuple[Turn, ...], steps: int) -> int:
    """Return how often a player is updated in so many steps."""
    return sum(t.repeats * -(-steps // t.every) for t in turns if t.player == player)


def build_players(
    recipe: Recipe,
    networks: Mapping[str, nn.Module],
    turns: tuple[Turn, ...],
    steps: int,
    engine: Engine,
) -> dict[str, Player]:
    """Build the players of a stage, without their averages: engines may yet move the weights. Raises UserError."""
    players = {}
    for name in dict.fromkeys(t.player for t in turns):
        spec = recipe.players.get(name, PlayerSpec())
        own = {n: networks[n] for n in (spec.networks or [name])}
        trainable = {f"{n}/{k}": p for n, m in own.items() for k, p in m.named_parameters() if p.requires_grad}
        if not trainable:
            raise UserError(f"players.{name} has nothing to train: every network of {', '.join(own)} is frozen.")
        if reason := engine.refuses(spec.optimizer.type):
            raise UserError(f"players.{name}.optimizer.type: {reason}")
        optimizer = build_optimizer(spec.optimizer, trainable, own.values(), f"players.{name}.optimizer", engine.shape)
        players[name] = Player(
            name=name,
            networks=own,
            trainable=trainable,
            optimizer=optimizer,
            schedule=build_schedule(spec.schedule, updates_of(name, turns, steps), f"players.{name}.schedule"),
            clip=spec.clip,
            scaler=build_scaler(spec.scaler, recipe.train.precision),
            base_lrs=[group["lr"] for group in optimizer.param_groups],
            optimizer_bytes=state_bytes(spec.optimizer, map(engine.shape, trainable.values())),
        )
    return players


def add_averages(recipe: Recipe, players: Mapping[str, Player], engine: Engine) -> None:
    """Give players their averages, of this process's parts of the weights."""
    for name, player in players.items():
        spec = recipe.players.get(name, PlayerSpec()).ema
        if spec:
            averaged = player.trainable | statistics(player.networks)
            player.ema = EMA({key: engine.local(tensor) for key, tensor in averaged.items()}, spec)
