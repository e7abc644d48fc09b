"""What happens at an evaluation: metrics with averaged weights, samples, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from scaletrain.config import EvaluateSpec, Stage
from scaletrain.crew import Crew, Progress
from scaletrain.data.order import key_of
from scaletrain.engine.precision import autocast
from scaletrain.engine.world import World
from scaletrain.errors import UserError, did_you_mean
from scaletrain.evaluation import evaluate
from scaletrain.objectives.base import Request
from scaletrain.watchdog import Watchdog


class Evaluator:
    """Evaluates a stage, draws samples, and keeps note of the best. tell: passes an event on to the observers."""

    def __init__(self, stage: Stage, crew: Crew, progress: Progress, world: World, tell: Callable[..., None]):
        self._stage, self._crew, self._progress, self._world, self._tell = stage, crew, progress, world, tell
        self._spec, self._best = stage.recipe.evaluate, stage.recipe.checkpoint.best

    def check(self) -> None:
        """Raise UserError when patience, `plateau` or `checkpoint.best` would look at a metric that there is not.

        What there is, is known from one batch: better now than after the training.
        """
        held = self._crew.data.eval
        listens = any(player.schedule.spec.type == "plateau" for player in self._crew.players.values())
        looked_at = self._spec.patience or listens or (held is not None and self._spec.metric != "loss")
        wanted = {"evaluate.metric": self._spec.metric} if looked_at else {}
        wanted |= {"checkpoint.best": self._best} if self._best else {}
        if not wanted:
            return
        if held is None:
            raise UserError(
                f"`{next(iter(wanted))}`, evaluate.patience and plateau look at evaluations, and there is no data for "
                "them: give data.eval or data.holdout."
            )
        with self._at_rest() as networks:
            lockstep, few = self._crew.engine.lockstep, 2 * self._world.size
            recipe, world = self._stage.recipe, self._world
            found = evaluate(self._crew.objective, networks, held, recipe, world, lockstep=lockstep, first=few)
        for key, name in wanted.items():
            if name not in found:
                raise UserError(f"`{key}`: there is no metric `{name}`.{did_you_mean(name, found)}")

    def run(self, step: int, watchdog: Watchdog) -> dict[str, float]:
        """Evaluate and draw samples. Returns the metrics."""
        objective, held, recipe = self._crew.objective, self._crew.data.eval, self._stage.recipe
        with self._at_rest() as networks:
            lockstep = self._crew.engine.lockstep
            metrics = evaluate(objective, networks, held, recipe, self._world, watchdog.beat, lockstep)
            if metrics:
                record = {"kind": "evaluate", "step": step, "stage": self._stage.name, **metrics}
                self._tell("evaluated", step, record)
            if self._spec.samples:
                share = self._world.agree if lockstep else self._world.on_main
                with watchdog.paused():
                    share(lambda: self._sample(step, networks))
        return metrics

    def judge(self, metrics: Mapping[str, float]) -> bool:
        """Take note of an evaluation. Returns whether it is the best one by `checkpoint.best`."""
        progress, spec, best = self._progress, self._spec, self._best
        if spec.metric in metrics:  # where something looks at it, it is: see check
            value = metrics[spec.metric]
            better = progress.best is None or EvaluateSpec.better(spec.metric, value, progress.best)
            progress.best, progress.waited = (value, 0) if better else (progress.best, progress.waited + 1)
            for player in self._crew.players.values():
                player.schedule.observe(better)
        if best is None:
            return False
        if progress.best_saved is None or EvaluateSpec.better(best, metrics[best], progress.best_saved):
            progress.best_saved = metrics[best]
            return True
        return False

    def _sample(self, step: int, networks: Mapping[str, torch.nn.Module]) -> None:
        """Draw the same samples, as it were, at every evaluation: from the same noise."""
        seed = key_of(self._stage.recipe.seed, "samples")
        request = Request(self._spec.samples, torch.Generator(self._world.device).manual_seed(seed))
        with autocast(self._world.device, self._stage.recipe.train.precision):
            samples: Any = self._crew.objective.sample(networks, request)
        if samples is not None:
            self._tell("sampled", step, samples)

    @contextmanager
    def _at_rest(self) -> Iterator[Mapping[str, torch.nn.Module]]:
        """The plain networks in evaluation mode, with averaged weights, without gradients."""
        networks = self._crew.engine.plain()
        training = {name: module.training for name, module in networks.items()}
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for player in self._crew.players.values():
                if player.ema:
                    stack.enter_context(player.ema.swapped())
            for module in networks.values():
                module.eval()
            try:
                yield networks
            finally:
                for name, module in networks.items():
                    module.train(training[name])
