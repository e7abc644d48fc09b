"""The loop: one stage of a run, whatever its family, engine or number of processes.

resume if there is a checkpoint
while step < steps:
    for turn in objective.turns:                          # data, in order
        if step % turn.every: continue
        player = players[turn.player]; only its networks require grad
        for repeat in range(turn.repeats):
            micros = the next accumulation window
            counts = sum over ranks and micros of objective.counts      # before forward; > 0 or an error on every rank
            for micro in micros:
                seed everything from (seed, stage, step, turn, repeat, global micro-batch number)
                terms = objective.loss(turn, networks, micro)           # autocast; gradients reduced at the last one
                engine.backward(player, world · Σ weight · sum / counts[per])
            outcome = engine.update(player)               # unscale, agree on overflow across ranks, clip, step
            if outcome.stepped: schedule, EMA, player.updates advance; objective.after_update(player)
            else: player.skipped += 1 (fp16), or stop and name the samples
    step += 1
    observers are told; evaluate, sample, checkpoint when due; stop when all ranks agree (signal, patience)
"""

from __future__ import annotations

import logging
import math
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from scaletrain.assemble import build_players, recompute
from scaletrain.callbacks.base import Observer
from scaletrain.config import Duration, EvaluateSpec, Stage
from scaletrain.crew import Crew, Progress, plan
from scaletrain.data.dataset import First
from scaletrain.data.loader import Failure, Layout, Micro, Windows
from scaletrain.data.order import key_of
from scaletrain.engine.data_parallel import DataParallel
from scaletrain.engine.hardware import flops_per_token, peak_flops
from scaletrain.engine.precision import autocast
from scaletrain.engine.world import World
from scaletrain.errors import Interrupted, UserError, agreed, did_you_mean
from scaletrain.evaluation import evaluate
from scaletrain.objectives.base import Data, Objective, Request
from scaletrain.player import Player, Term, Turn
from scaletrain.position import steps_of, windows_before
from scaletrain.signals import StopSignals
from scaletrain.snapshot import Snapshot

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
        self.layout = Layout.derive(recipe.train.global_batch, recipe.train.micro_batch, world.size, world.rank)
        self.steps = self._interval(recipe.train.duration)
        save, judge = recipe.checkpoint.every, recipe.evaluate.every
        self.save_every = self._interval(save) if save else max(1, self.steps // 10)
        self.evaluate_every = self._interval(judge) if judge else self.steps
        self.metrics: dict[str, float] = {}
        self._peak = peak_flops(world.device, recipe.train.precision)
        self._flops = flops_per_token(self.engine.plain().values())
        self._stop = False
        self._cannot_tell = False
        self._begin_throughput()

    @classmethod
    def build(
        cls,
        stage: Stage,
        objective: Objective[Any],
        data: Data,
        networks: Mapping[str, torch.nn.Module],
        progress: Progress,
        snapshot: Snapshot,
        observers: Sequence[Observer],
        world: World,
    ) -> Trainer:
        """Make players and an engine for networks that are built and on the device."""
        train = stage.recipe.train
        steps = steps_of(train.duration, objective.turns, data, train.global_batch)
        players = build_players(stage.recipe, networks, objective.turns, steps)
        for player in players.values():
            for name, module in player.networks.items():
                if train.recompute:
                    recompute(name, module)
                if train.compile:
                    module.compile()
        engine = DataParallel(world, train.precision)
        engine.prepare(players.values(), networks)
        return cls(stage, Crew(objective, data, engine, players), progress, snapshot, observers, world)

    def _interval(self, duration: Duration) -> int:
        return steps_of(duration, self.turns, self.crew.data, self.recipe.train.global_batch)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def fit(self, signals: StopSignals) -> None:
        """Train to the end of the stage. Raises Interrupted after saving when a signal asked to stop."""
        progress = self.progress
        order = (self._data_seed, self.stage.name)
        window = windows_before(self.turns, progress.step)
        workers, pin = self.recipe.data.workers, self.world.device.type == "cuda"
        self._windows = Windows(self.crew.data.train, self.layout, order, window, workers, pin)
        begun = plan(
            self.stage, self.snapshot.stages, self.crew, progress, self.layout, self.steps, self.world.device.type
        )
        self._tell("begin", begun)
        try:
            self._loop(signals)
        except UserError as error:
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
        networks = self.engine.view(player)
        micros, counts = self._next(turn, signals)
        sums: dict[str, torch.Tensor] = {}
        terms: dict[str, Term] = {}
        losses = []
        for micro in micros:
            torch.manual_seed(
                key_of(self.recipe.seed, self.stage.name, self.progress.step, turn.name, repeat, micro.number)
            )
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in micro.tensors.items()}
            with self.engine.accumulate(player, last=micro is micros[-1]):
                with autocast(device, self.recipe.train.precision):
                    terms = self.objective.loss(turn, networks, batch)
                loss = sum(t.weight / counts[t.per] * t.sum.float() for t in terms.values() if t.weight)
                assert isinstance(loss, torch.Tensor)
                self.engine.backward(player, loss * self.world.size)
            losses.append(loss.detach())
            if logged:
                for name, term in terms.items():
                    sums[name] = sums.get(name, 0) + term.sum.detach().float()
        hopeless = player.scaler is None or player.scaler.exhausted  # then an overflow is not a matter of scaling
        outcome = self.engine.update(player)
        self.engine.synchronise_statistics()
        if outcome.stepped:
            player.updates += 1
            if player.ema:
                player.ema.update(player.updates)
            self.objective.after_update(player, self.engine.plain())
        elif hopeless:
            self._explain(turn, player, micros, losses)
        else:
            player.skipped += 1
        if not logged:
            return {}
        totals = self.world.total(torch.stack(list(sums.values())).tolist())
        figures = {name: total / counts[terms[name].per] for name, total in zip(sums, totals, strict=True)}
        figures.setdefault("loss", sum(terms[name].weight * value for name, value in figures.items()))
        figures |= {"grad_norm": outcome.grad_norm, "lr": player.optimizer.param_groups[0]["lr"]}
        if player.scaler:
            figures |= {"scale": outcome.scale, "skipped": player.skipped}
        return figures if len(self.turns) == 1 else {f"{turn.name}/{k}": v for k, v in figures.items()}

    def _next(self, turn: Turn, signals: StopSignals) -> tuple[list[Micro], dict[str, int]]:
        """Return the next window and the global counts. One small sum over ranks carries errors and signals too."""
        window = next(self._windows)
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
        vector = [float(bool(failure)), float(stop), *(float(own[u]) for u in units)]
        failures, stops, *totals = self.world.total(vector + [0.0] * (2 + _MAX_UNITS - len(vector)))
        if failures:
            raise agreed(UserError(next(message for message in self.world.gather(failure) if message)))
        self._stop = self._stop or stops > 0
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
        if turn is self.turns[0]:
            for unit, number in {"samples": self.recipe.train.global_batch, **counts}.items():
                self.progress.seen[unit] = self.progress.seen.get(unit, 0) + number
        return micros, counts

    def _explain(self, turn: Turn, player: Player, micros: list[Micro], losses: list[torch.Tensor]) -> None:
        """Stop on every rank, before the update, and say where the first value that is not finite came from."""
        bad = [micro for micro, loss in zip(micros, losses, strict=True) if not math.isfinite(float(loss))]
        names = [self.crew.data.train.name(e) for micro in bad for e in micro.examples]
        found = [(rank, n) for rank, n in enumerate(self.world.gather(names)) if n]
        where = "; ".join(f"rank {rank}: {', '.join(n[:16])}" for rank, n in found)
        cause = f"the loss is not finite ({where})" if found else "the loss is finite, a gradient is not"
        raise agreed(
            UserError(
                f"step {self.global_step}, stage {self.stage.name}, turn {turn.name}: {cause}. Nothing was updated. "
                f"Look at these samples; or lower players.{player.name}.optimizer.lr, or set "
                f"players.{player.name}.clip, in a run of its own (--run NAME)."
            )
        )

    # --- between steps ------------------------------------------------------------------------------------------------

    def _after_step(self) -> None:
        progress, recipe = self.progress, self.recipe
        last = progress.step == self.steps
        is_best = False
        if last or progress.step % self.evaluate_every == 0:
            is_best = self._judge(self._evaluate())
            patience = recipe.evaluate.patience
            progress.complete = patience is not None and progress.waited >= patience
        progress.complete = progress.complete or last
        if progress.complete or self._stop or is_best or progress.step % self.save_every == 0:
            started = time.monotonic()
            self.snapshot.save(self.global_step, self.stage, self.crew, self.progress, is_best)
            self._tell("saved", self.global_step, time.monotonic() - started)
            self._begin_throughput()
        if self._stop and not progress.complete:
            raise Interrupted(f"stopped at step {self.global_step:,} and saved; run the same command again to go on.")

    def check_metrics(self) -> None:
        """Raise UserError when patience, `plateau` or `checkpoint.best` would look at a metric that there is not.

        What there is, is known from one batch: better now than after the training.
        """
        spec, best, held = self.recipe.evaluate, self.recipe.checkpoint.best, self.crew.data.eval
        looked_at = spec.patience or self._listens or (held is not None and spec.metric != "loss")
        wanted = {"evaluate.metric": spec.metric} if looked_at else {}
        wanted |= {"checkpoint.best": best} if best else {}
        if not wanted:
            return
        if held is None:
            raise UserError(
                f"`{next(iter(wanted))}`, evaluate.patience and plateau look at evaluations, and there is no data for "
                "them: give data.eval or data.holdout."
            )
        with self._at_rest() as networks:
            found = evaluate(self.objective, networks, First(held, 2 * self.world.size), self.recipe, self.world)
        for key, name in wanted.items():
            if name not in found:
                raise UserError(f"`{key}`: there is no metric `{name}`.{did_you_mean(name, found)}")

    def _judge(self, metrics: dict[str, float]) -> bool:
        """Take note of an evaluation. Returns whether it is the best one by `checkpoint.best`."""
        progress, spec, best = self.progress, self.recipe.evaluate, self.recipe.checkpoint.best
        if spec.metric in metrics:  # where something looks at it, it is: see check_metrics
            value = metrics[spec.metric]
            better = progress.best is None or EvaluateSpec.better(spec.metric, value, progress.best)
            progress.best, progress.waited = (value, 0) if better else (progress.best, progress.waited + 1)
            for player in self.players.values():
                player.schedule.observe(better)
        if best is None:
            return False
        if progress.best_saved is None or EvaluateSpec.better(best, metrics[best], progress.best_saved):
            progress.best_saved = metrics[best]
            return True
        return False

    def _evaluate(self) -> dict[str, float]:
        """Evaluate and draw samples with averaged weights where there are any."""
        with self._at_rest() as networks:
            metrics = evaluate(self.objective, networks, self.crew.data.eval, self.recipe, self.world)
            if metrics:
                self.metrics = metrics
                record = {"kind": "evaluate", "step": self.global_step, "stage": self.stage.name, **metrics}
                self._tell("evaluated", self.global_step, record)
            if self.recipe.evaluate.samples:
                self.world.on_main(lambda: self._sample(networks))
        self._begin_throughput()
        return metrics

    def _sample(self, networks: Mapping[str, torch.nn.Module]) -> None:
        """Draw the same samples, as it were, at every evaluation: from the same noise."""
        generator = torch.Generator(self.world.device).manual_seed(key_of(self.recipe.seed, "samples"))
        samples = self.objective.sample(networks, Request(self.recipe.evaluate.samples, generator))
        if samples is not None:
            self._tell("sampled", self.global_step, samples)

    @contextmanager
    def _at_rest(self) -> Iterator[Mapping[str, torch.nn.Module]]:
        """The plain networks in evaluation mode, with averaged weights, without gradients."""
        networks = self.engine.plain()
        training = {name: module.training for name, module in networks.items()}
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for player in self.players.values():
                if player.ema:
                    stack.enter_context(player.ema.swapped())
            for module in networks.values():
                module.eval()
            try:
                yield networks
            finally:
                for name, module in networks.items():
                    module.train(training[name])

    @property
    def _listens(self) -> bool:
        return any(player.schedule.spec.type == "plateau" for player in self.players.values())

    # --- what observers are told --------------------------------------------------------------------------------------

    def _tell(self, event: str, *facts: Any) -> None:
        for observer in self.observers:
            try:
                getattr(observer, event)(*facts)
            except OSError as error:  # a full disk: stop all ranks at the next step, in order
                log.error("%s cannot write: %s; the run saves and stops", type(observer).__name__, error)
                self._cannot_tell = True

    def _begin_throughput(self) -> None:
        self._timed_from = (time.monotonic(), dict(self.progress.seen))

    def _record(self, figures: dict[str, float]) -> dict[str, Any]:
        unit = self.objective.throughput
        began, seen = self._timed_from
        rate = (self.progress.seen.get(unit, 0) - seen.get(unit, 0)) / max(time.monotonic() - began, 1e-9)
        self._begin_throughput()
        if self.world.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated()
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        head = {"kind": "train", "step": self.global_step, "stage": self.stage.name}
        tail = {"seen": dict(self.progress.seen), "throughput": round(rate, 3), "memory_bytes": memory}
        if self._peak and unit == "tokens":
            tail["mfu"] = round(rate * self._flops / (self._peak * self.world.size), 4)
        return {**head, **figures, **tail}
