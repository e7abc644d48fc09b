"""The loop: one stage of a run, whatever its family, engine or number of processes.

resume if there is a checkpoint
while step < steps:
    for turn in objective.turns:                          # data, in order
        if step % turn.every: continue
        player = players[turn.player]; only its networks require grad
        for repeat in range(turn.repeats):
            micros = the next accumulation window               # enriched by its objective, where that says so
            counts = sum over ranks and micros of objective.counts      # before forward; > 0 or an error on every rank
            known = objective.survey of all ranks and micros / counts   # where the loss must know the whole batch
            for micro in micros:
                seed everything from (seed, stage, step, turn, repeat, global micro-batch number)
                terms = objective.loss(turn, networks, micro)           # autocast; gradients reduced at the last one
                engine.backward(player, world · Σ weight · sum / counts[per])
            outcome = engine.update(player)               # unscale, agree on overflow across ranks, clip, step
            if outcome.stepped: schedule, EMA, player.updates advance; objective.after_update(player)
            else: player.skipped += 1                     # and, unless loss scaling may help: stop, skip or roll back
    step += 1
    observers are told; evaluate, sample, checkpoint when due; stop when all ranks agree (signal, patience)
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from scaletrain.assemble import add_averages, build_players, in_parts
from scaletrain.callbacks.base import Observer
from scaletrain.checkpoint.tensors import Stored
from scaletrain.config import Duration, Stage, TrainSpec
from scaletrain.crew import Crew, Progress, plan
from scaletrain.data.loader import Failure, Layout, Micro, Windows
from scaletrain.data.mixture import Mixture
from scaletrain.data.order import key_of
from scaletrain.data.stream import Cursor, Stream
from scaletrain.engine import savers
from scaletrain.engine.base import Engine
from scaletrain.engine.precision import autocast
from scaletrain.engine.world import World
from scaletrain.enrichment import enriched, surveyed
from scaletrain.errors import Interrupted, UserError, agreed
from scaletrain.evaluator import Evaluator
from scaletrain.guard import Rollback, Spikes
from scaletrain.meter import Meter
from scaletrain.nonfinite import watched
from scaletrain.objectives.base import Data, Objective
from scaletrain.player import Player, Term, Turn
from scaletrain.position import next_window, steps_of, windows_before
from scaletrain.signals import StopSignals
from scaletrain.snapshot import Snapshot
from scaletrain.watchdog import Watchdog

log = logging.getLogger("scaletrain")

_MAX_UNITS = 8


class Trainer:
    """Trains one stage from wherever `progress` says it stands."""

    def __init__(
        self,
        stage: Stage,
        crew: Crew,
        progress: Progress,
        snapshot: Snapshot,
        observers: Sequence[Observer],
        world: World,
    ):
        recipe = stage.recipe
        self.stage, self.recipe, self.crew, self.progress = stage, recipe, crew, progress
        self.snapshot, self.observers, self.world = snapshot, observers, world
        self.objective, self.engine, self.players = crew.objective, crew.engine, crew.players
        self.turns = self.objective.turns
        self.layout = self._layout(recipe.train)
        self.steps = self._interval(recipe.train.duration, "train.duration")
        save, judge = recipe.checkpoint.every, recipe.evaluate.every
        self.save_every = self._interval(save, "checkpoint.every") if save else max(1, self.steps // 10)
        self.evaluate_every = self._interval(judge, "evaluate.every") if judge else self.steps
        keep = recipe.checkpoint.keep_every
        self.keep_every = self._interval(keep, "checkpoint.keep_every") if keep else None
        self.metrics: dict[str, float] = {}
        self._meter = Meter(self.objective.throughput, self.engine)
        self._spikes = {
            turn.name: Spikes(recipe.train.guard, progress.history.setdefault(turn.name, []))
            for turn in (self.turns if recipe.train.guard.spike != "off" else ())
        }
        self.evaluator = Evaluator(stage, crew, progress, world, self._tell)
        self._cursors: dict[int, Cursor] = {}
        self._stop = False
        self._due = False
        self._cannot_tell = False
        self._begun = self._saved = progress.step

    @classmethod
    def build(
        cls,
        stage: Stage,
        objective: Objective[Any],
        data: Data,
        networks: Mapping[str, torch.nn.Module],
        weights: Mapping[str, Mapping[str, Stored]],
        engine: Engine,
        progress: Progress,
        snapshot: Snapshot,
        observers: Sequence[Observer],
    ) -> Trainer:
        """Make players for networks that are built and on the device. weights: those that the engine reads itself."""
        train = stage.recipe.train
        steps = steps_of(train.duration, objective.turns, data, train.global_batch)
        trained = [name for name, module in networks.items() if any(p.requires_grad for p in module.parameters())]
        savers.save(train, {name: networks[name] for name in trained}, engine.world.device)
        engine.wrap(networks, in_parts(snapshot.specs, networks), weights)
        players = build_players(stage.recipe, networks, objective.turns, steps, engine)
        engine.prepare(players.values(), networks)
        add_averages(stage.recipe, players, engine)
        return cls(stage, Crew(objective, data, engine, players), progress, snapshot, observers, engine.world)

    def _layout(self, spec: TrainSpec) -> Layout:
        """Return how the global batch is cut: as before, where the recipe leaves it open and it still divides."""
        before, world = self.progress.batch, self.world
        kept = before[1] if before and before[0] % (before[1] * world.size) == 0 else None
        layout = Layout.derive(spec.global_batch, spec.micro_batch or kept, world.size, world.rank)
        now = [layout.global_batch, layout.micro_batch]
        if before and before != now and (self.crew.data.streamed or isinstance(self.crew.data.train, Mixture)):
            raise UserError(
                f"this run takes its data in micro-batches of {before[1]}, and {world.size} process(es) would have "
                f"{now[1]}. Go on with as many as before; a run begun with a smaller train.micro_batch may change them."
            )
        self.progress.batch = now
        return layout

    def _interval(self, duration: Duration, key: str) -> int:
        return steps_of(duration, self.turns, self.crew.data, self.recipe.train.global_batch, key)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def fit(self, signals: StopSignals) -> None:
        """Train to the end of the stage.

        Raises Interrupted after saving when a signal asked to stop, and Rollback where the recipe asks for one.
        """
        progress, spec = self.progress, self.recipe.data
        self._windows = Windows(
            self.crew.data.train,
            self.layout,
            (self._data_seed, self.stage.name),
            next_window(windows_before(self.turns, progress.step), progress.skipped),
            spec.workers,
            self.world.device.type == "cuda",
            {int(lane): cursor for lane, cursor in progress.cursors.items()},
            progress.skipped,
            spec.shuffle,
        )
        begun = plan(
            self.stage, self.snapshot.stages, self.crew, progress, self.layout, self.steps, self.world.device.type
        )
        self._tell("begin", begun)
        self._meter.restart(progress.seen)
        minutes = self.recipe.train.watchdog
        stacks = self.snapshot.root / "stacks" / f"rank-{self.world.rank}.txt"
        try:
            with Watchdog(60 * minutes if minutes else None, stacks) as self._watchdog:
                self._loop(signals)
        except Exception as error:
            self.snapshot.close()
            if isinstance(error, UserError):
                error.agreed = bool(error.agreed)  # the loop is where one process can fail alone
            raise
        finally:
            del self._windows  # ends its workers

    def _loop(self, signals: StopSignals) -> None:
        progress, log_every = self.progress, self.recipe.log.every
        while progress.step < self.steps and not progress.complete:
            step = progress.step
            logged = min(self.steps, (step // log_every + 1) * log_every) - 1  # the next step that is logged
            for turn in self.turns:
                if step % turn.every == 0:
                    last = step + turn.every > logged  # of this turn, until then
                    for repeat in range(turn.repeats):
                        progress.figures |= self._take(turn, repeat, signals, last and repeat == turn.repeats - 1)
            progress.step += 1
            record = self._record(progress.figures) if step == logged else None
            if record:
                progress.figures = {}
            self._tell("step", self.global_step, record)
            self._after_step()

    @property
    def global_step(self) -> int:
        """Steps of the whole run that are done."""
        return self.progress.first_step + self.progress.step

    @property
    def _data_seed(self) -> int:
        return self.recipe.seed if self.recipe.data.seed is None else self.recipe.data.seed

    def _take(self, turn: Turn, repeat: int, signals: StopSignals, logged: bool) -> dict[str, float]:
        """Take a turn once: one window, one update. Returns figures for the log where this step is logged."""
        player, device = self.players[turn.player], self.world.device
        micros, counts = self._next(turn, repeat, signals)
        networks = self.engine.view(player)
        sums: dict[str, torch.Tensor] = {}
        terms: dict[str, Term] = {}
        losses = []
        known: dict[str, torch.Tensor] = {}
        if self.objective.surveys:
            begun = (self._begin(turn, repeat, micro) for micro in micros)
            known = surveyed(begun, turn, networks, counts, self.crew, self.recipe)

        def loss_of(micro: Micro) -> dict[str, Term]:
            batch = self._begin(turn, repeat, micro) | known
            with autocast(device, self.recipe.train.precision):
                return self.objective.loss(turn, networks, batch)

        for micro in micros:
            with self.engine.accumulate(player, last=micro is micros[-1]):
                terms = loss_of(micro)
                loss = sum(t.weight / counts[t.per] * t.sum.float() for t in terms.values() if t.weight)
                assert isinstance(loss, torch.Tensor)
                self.engine.backward(player, loss * self.world.size)
            losses.append(loss.detach())
            if logged:
                for name, term in terms.items():
                    sums[name] = sums.get(name, 0) + term.sum.detach().float()
        scaled = (
            player.scaler is not None and not player.scaler.exhausted
        )  # then an overflow may be a matter of scaling
        found: list[str] = []
        outcome = self.engine.update(player, partial(self._admit, turn, losses, found))
        self.engine.synchronise_statistics(outcome.stepped)
        if outcome.stepped:
            player.updates += 1
            self.progress.refused = 0
            if player.ema:
                player.ema.update(player.updates)
            if type(self.objective).after_update is not Objective.after_update:
                networks = self.engine.plain()
                with self.engine.changing(player):
                    self.objective.after_update(player, networks)
        else:
            player.skipped += 1
            if outcome.finite or not scaled:
                self._refuse(turn, player, micros, losses, found, loss_of)
        if not logged:
            return {}
        totals = self.world.total(torch.stack(list(sums.values())).tolist())
        figures = {name: total / counts[terms[name].per] for name, total in zip(sums, totals, strict=True)}
        figures.setdefault("loss", sum(terms[name].weight * value for name, value in figures.items()))
        figures |= {"grad_norm": outcome.grad_norm, "lr": player.optimizer.param_groups[0]["lr"]}
        if player.scaler:
            figures["scale"] = outcome.scale
        if player.scaler or player.skipped:
            figures["skipped"] = player.skipped
        return figures if len(self.turns) == 1 else {f"{turn.name}/{k}": v for k, v in figures.items()}

    def _begin(self, turn: Turn, repeat: int, micro: Micro) -> dict[str, torch.Tensor]:
        """Seed everything for a micro-batch and return it on the device."""
        self._watchdog.beat()
        torch.manual_seed(
            key_of(self.recipe.seed, self.stage.name, self.progress.step, turn.name, repeat, micro.number)
        )
        return {name: tensor.to(self.world.device, non_blocking=True) for name, tensor in micro.tensors.items()}

    def _next(self, turn: Turn, repeat: int, signals: StopSignals) -> tuple[list[Micro], dict[str, int]]:
        """Return the next window and the global counts. One small sum over ranks carries errors and signals too."""
        window = next(self._windows)
        if self.objective.enriching:
            window = enriched(window, turn, self.crew, self.recipe, (self.stage.name, self.progress.step, repeat))
        micros: list[Micro] = [] if isinstance(window, Failure) else window
        failure = window.message if isinstance(window, Failure) else ""
        own: dict[str, int] = {}
        try:
            for micro in micros:
                for unit, number in self.objective.counts(turn, micro.tensors).items():
                    own[unit] = own.get(unit, 0) + number
        except UserError as error:
            failure = str(error)
        units = sorted(own)
        stop = signals.asked or self._cannot_tell
        flags = [float(f) for f in (bool(failure), stop, self.snapshot.failed, self.snapshot.due)]
        vector = [*flags, *(float(own[u]) for u in units)]
        failures, stops, unsaved, due, *totals = self.world.total(vector + [0.0] * (4 + _MAX_UNITS - len(vector)))
        if failures:
            message = next(message for message in self.world.gather(failure) if message)
            if turn is self.turns[0] and repeat == 0 and self.progress.step > self._begun:
                if self.progress.step > self._saved:
                    self._save(wait=True)
                else:  # not again: that would replace it by one that is neither the best nor kept
                    self.snapshot.finish()
                message += f" What was trained until step {self.global_step:,} is saved; the same command goes on."
            raise agreed(UserError(message))
        if unsaved:
            self.snapshot.finish()
        self._stop, self._due = self._stop or stops > 0, self._due or due > 0
        counts = dict(zip(units, map(int, totals), strict=False))
        if 0 in counts.values():
            empty = next(unit for unit, number in counts.items() if number == 0)
            own_names = [self.crew.data.train.name(e) for m in micros for e in m.examples]
            names = [name for share in self.world.gather(own_names) for name in share]
            raise agreed(
                UserError(
                    f"step {self.global_step}, turn {turn.name}: the global batch has no {empty} to learn from "
                    f"({', '.join(names[:8])}). Check the data's labels and masks, or raise train.global_batch."
                )
            )
        self._cursors |= {micro.number: micro.cursor for micro in micros if micro.cursor is not None}
        if turn is self.turns[0]:
            for unit, number in {"samples": self.recipe.train.global_batch, **counts}.items():
                self.progress.seen[unit] = self.progress.seen.get(unit, 0) + number
        return micros, counts

    def _admit(self, turn: Turn, losses: Sequence[torch.Tensor], found: list[str], norm: float) -> bool:
        """Say whether an update may be made; notes in `found` what is wrong with it."""
        if turn.name not in self._spikes:
            return True
        (loss,) = self.world.total([float(torch.stack([*losses]).sum())])
        fault = self._spikes[turn.name].find(loss, norm)
        found += [fault] if fault else []
        return not fault

    def _refuse(
        self,
        turn: Turn,
        player: Player,
        micros: list[Micro],
        losses: list[torch.Tensor],
        found: list[str],
        loss_of: Callable[[Micro], object],
    ) -> None:
        """Do, on every rank, what the recipe says about an update that was not made, and say where it came from."""
        guard = self.recipe.train.guard
        policy = guard.spike if found else guard.nonfinite
        bad = [micro for micro, loss in zip(micros, losses, strict=True) if found or not math.isfinite(float(loss))]
        names = [self.crew.data.train.name(e) for micro in bad for e in micro.examples]
        held = [(rank, n) for rank, n in enumerate(self.world.gather(names)) if n]
        where = "; ".join(f"rank {rank}: {', '.join(n[:16])}" for rank, n in held)
        if found:
            cause = f"{found[0]} ({where})"
        else:
            cause = f"the loss is not finite ({where})" if held else "the loss is finite, a gradient is not"
        text = f"step {self.global_step}, stage {self.stage.name}, turn {turn.name}: {cause}."
        self.progress.refused += 1
        if policy == "skip" and self.progress.refused <= guard.limit:
            record = {"kind": "skip", "step": self.global_step + 1, "stage": self.stage.name, "reason": text}
            self._tell("noted", self.global_step + 1, record)
        elif policy == "rollback" and len(self.progress.skipped) < guard.limit:
            raise Rollback(text, self.global_step, (micros[0].window,))
        else:
            if held and not found:
                with watched(self.engine.plain()) as places:  # once more, as all ranks call networks together
                    loss_of((bad or micros)[0])
                first = next((names[0] for names in self.world.gather(places) if names), "")
                text += f" The first that is not: {first}." if first else ""
            raise agreed(
                UserError(
                    f"{text} Nothing was updated. Look at these samples; or lower players.{player.name}.optimizer.lr, "
                    f"or set players.{player.name}.clip, in a run of its own (--run NAME)."
                )
            )

    # --- between steps ------------------------------------------------------------------------------------------------

    def _after_step(self) -> None:
        progress, recipe = self.progress, self.recipe
        self.snapshot.reserve(self.crew)
        last = progress.step == self.steps
        is_best = False
        if last or progress.step % self.evaluate_every == 0:
            found = self.evaluator.run(self.global_step, self._watchdog)
            self.metrics = found or self.metrics
            is_best = self.evaluator.judge(found)
            patience = recipe.evaluate.patience
            progress.complete = patience is not None and progress.waited >= patience
            self._meter.restart(progress.seen)
        progress.complete = progress.complete or last
        kept = self.keep_every is not None and progress.step % self.keep_every == 0
        wait = progress.complete or self._stop
        if wait or is_best or kept or self._due or progress.step % self.save_every == 0:
            self._save(wait, is_best, kept)
        if self._stop and not progress.complete:
            raise Interrupted(f"stopped at step {self.global_step:,} and saved; run the same command again to go on.")

    def _save(self, wait: bool, is_best: bool = False, kept: bool = False) -> None:
        """Save; with `wait`, the checkpoint is on disk when this returns."""
        started, self._due, self._saved = time.monotonic(), False, self.progress.step
        with self._watchdog.paused():
            for cursors in self.world.gather(self._cursors):
                self.progress.cursors |= {str(lane): cursor for lane, cursor in cursors.items()}
            self.snapshot.save(self.global_step, self.stage, self.crew, self.progress, is_best, kept)
            if wait:
                self.snapshot.finish()
        self._tell("saved", self.global_step, time.monotonic() - started)
        self._meter.restart(self.progress.seen)

    # --- what observers are told --------------------------------------------------------------------------------------

    def _tell(self, event: str, *facts: Any) -> None:
        for observer in self.observers:
            try:
                getattr(observer, event)(*facts)
            except OSError as error:  # a full disk: stop all ranks at the next step, in order
                log.error("%s cannot write: %s; the run saves and stops", type(observer).__name__, error)
                self._cannot_tell = True

    def _record(self, figures: dict[str, float]) -> dict[str, Any]:
        head = {"kind": "train", "step": self.global_step, "stage": self.stage.name}
        return {
            **head,
            **figures,
            **self._epochs(),
            "seen": dict(self.progress.seen),
            **self._meter.read(self.progress.seen),
        }

    def _epochs(self) -> dict[str, Any]:
        """Return the epochs of each source of a mixture or a stream."""
        data, lanes = self.crew.data.train, self.layout.lanes
        if isinstance(data, Stream):
            return {"epochs": data.epochs(self._cursors.values(), lanes)}
        if isinstance(data, Mixture):
            return {"epochs": data.epochs(windows_before(self.turns, self.progress.step), lanes)}
        return {}
