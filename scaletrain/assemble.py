"""From a stage's recipe to its data, networks and players."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scaletrain.config import NetworkSpec, PlayerSpec, Recipe
from scaletrain.data.cache import content_key
from scaletrain.data.dataset import Dataset
from scaletrain.data.mixture import Mixture, Shares
from scaletrain.data.order import key_of
from scaletrain.data.sources import Rows, joined, open_rows, split_holdout
from scaletrain.data.stream import WINDOW, Source, Stream
from scaletrain.engine.precision import build_scaler
from scaletrain.engine.statistics import statistics
from scaletrain.errors import UserError, did_you_mean
from scaletrain.explain import decode
from scaletrain.networks.build import build, network_module
from scaletrain.objectives.base import Data, Objective
from scaletrain.optim.ema import EMA
from scaletrain.optim.optimizers import build_optimizer, state_bytes
from scaletrain.optim.schedules import build_schedule
from scaletrain.player import Player, Turn
from scaletrain.position import windows_before
from scaletrain.shelf import Shelf


def prepare(objective: Objective[Any], recipe: Recipe) -> Data:
    """Open the data and let the objective make examples of them. Raises UserError."""
    spec = recipe.data
    weighted = spec.train[0].weight is not None
    parts = [open_rows([source]) for source in spec.train] if weighted else [open_rows(spec.train)]
    held: list[Rows] = []
    if spec.eval is not None:
        held = [open_rows(spec.eval)]
    elif spec.holdout:
        seed = recipe.seed if spec.seed is None else spec.seed
        parts, held = map(list, zip(*(split_holdout(rows, spec.holdout, seed) for rows in parts), strict=True))
    return examples_of(objective, parts, joined(held) if held else None)


def examples_of(objective: Objective[Any], parts: Sequence[Rows], held: Rows | None) -> Data:
    """Make examples of the training rows: of one source, or of several that are mixed. Raises UserError."""
    spec = objective.recipe.data
    train = joined(parts)
    objective.prepare(train, held)
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
    return Data(found, objective.examples(held, False) if held is not None else None, facts, train.streaming)


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
        decode(network_module(spec.type, f"networks.{name}").Config, spec.config, f"networks.{name}.config")
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
            if spec.dtype != "float32" and not spec.frozen and spec.adapter is None:
                raise UserError(
                    f"networks.{network}.dtype: what is trained is kept in float32; set train.precision=bf16 instead."
                )


def build_networks(
    specs: Mapping[str, NetworkSpec], shelf: Shelf, checkpoint: Path | None, device: torch.device, *seed: object
) -> dict[str, nn.Module]:
    """Build every network of a stage on the device. New weights are a function of (seed, network's name).

    checkpoint: the one to resume from, if any.
    """
    networks = {}
    for name, spec in specs.items():
        torch.manual_seed(key_of(*seed, "weights", name))
        saved = checkpoint / "networks" / name if checkpoint else None
        saved = saved if saved and saved.is_dir() else None  # frozen networks are not saved
        base = shelf.base(spec) if saved is None or spec.adapter else None
        module = build(name, spec, base, saved).to(device)
        module.train(not spec.frozen)
        networks[name] = module
    return networks


def recompute(name: str, module: nn.Module) -> None:
    """Switch activation checkpointing on: the library's own, or around each block of the network's lists."""
    if hasattr(module, "gradient_checkpointing_enable"):
        module.gradient_checkpointing_enable(  # type: ignore[operator]
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        if hasattr(module, "enable_input_require_grads") and hasattr(module, "peft_config"):
            module.enable_input_require_grads()  # type: ignore[operator]
        return
    from torch.utils.checkpoint import checkpoint

    blocks = [b for part in module.modules() if isinstance(part, nn.ModuleList) for b in part]
    if not blocks:
        raise UserError(f"train.recompute: network `{name}` has no list of blocks to recompute; set it to false.")
    for block in blocks:
        forward = block.forward
        block.forward = lambda *a, _forward=forward, **k: checkpoint(_forward, *a, use_reentrant=False, **k)


def updates_of(player: str, turns: tuple[Turn, ...], steps: int) -> int:
    """Return how often a player is updated in so many steps."""
    return sum(t.repeats * -(-steps // t.every) for t in turns if t.player == player)


def build_players(
    recipe: Recipe,
    networks: Mapping[str, nn.Module],
    turns: tuple[Turn, ...],
    steps: int,
    local: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, Player]:
    """Build the players of a stage. local: this process's part of a parameter. Raises UserError."""
    players = {}
    for name in dict.fromkeys(t.player for t in turns):
        spec = recipe.players.get(name, PlayerSpec())
        own = {n: networks[n] for n in (spec.networks or [name])}
        trainable = {f"{n}/{k}": p for n, m in own.items() for k, p in m.named_parameters() if p.requires_grad}
        if not trainable:
            raise UserError(f"players.{name} has nothing to train: every network of {', '.join(own)} is frozen.")
        optimizer = build_optimizer(spec.optimizer, trainable, own.values(), f"players.{name}.optimizer")
        players[name] = Player(
            name=name,
            networks=own,
            trainable=trainable,
            optimizer=optimizer,
            schedule=build_schedule(spec.schedule, updates_of(name, turns, steps), f"players.{name}.schedule"),
            clip=spec.clip,
            scaler=build_scaler(spec.scaler, recipe.train.precision),
            ema=EMA({n: local(p.detach()) for n, p in (trainable | statistics(own)).items()}, spec.ema)
            if spec.ema
            else None,
            base_lrs=[group["lr"] for group in optimizer.param_groups],
            optimizer_bytes=state_bytes(spec.optimizer, trainable),
        )
    return players
