"""A stage tried in one way or another: rehearsals on batches of its own data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from scaletrain.assemble import check_able, check_held
from scaletrain.config import PlayerSpec, Stage, TrainSpec
from scaletrain.data.loader import Layout
from scaletrain.engine.deepspeed import Zero
from scaletrain.engine.zero_spec import ZeroSpec
from scaletrain.errors import UserError
from scaletrain.planning.rehearse import Imagined, Part, Peak, Rehearsal, Unknown, batch_of, launched, worst_example
from scaletrain.planning.share import Memory, Way, share


class Trials:
    """One stage. unknown: the operation that could not be rehearsed, once one was met."""

    def __init__(self, part: Part):
        self.part = part
        self.examples, self.worst = worst_example(part.data)
        self.unknown: str | None = None

    def layout(self, way: Way) -> Layout:
        """Return how the global batch is cut. Raises UserError when it does not divide."""
        train = self.part.stage.recipe.train
        return Layout.derive(train.global_batch, train.micro_batch, way.processes, 0)

    @contextmanager
    def begun(self, way: Way, train: TrainSpec) -> Iterator[Trial]:
        """Build the stage as it is launched in a way, with other settings of `train`. Raises UserError."""
        recipe, size = self.part.stage.recipe, way.rehearsed
        if way.engine.startswith("zero"):
            zero = Zero(Imagined(way.processes), train.precision, ZeroSpec(int(way.engine[-1]), {}))
            check_held(self.part.specs, zero)
            check_able(self.part.objective, zero)
            for name in dict.fromkeys(turn.player for turn in self.part.objective.turns):
                if reason := zero.refuses(recipe.players.get(name, PlayerSpec()).optimizer.type):
                    raise UserError(f"players.{name}.optimizer.type: {reason}")
        # Batches are cut here, and what is compiled holds what it holds otherwise.
        own = train.model_copy(update={"global_batch": size, "micro_batch": 1, "compile": "off"})
        stage = Stage(self.part.stage.name, recipe.model_copy(update={"train": own}))
        with launched(way.variables, size):
            yield Trial(self, way, train, Rehearsal(self.part, stage, Imagined(size), way.cuda))


@dataclass(frozen=True)
class Trial:
    """A stage that is built, to be rehearsed."""

    trials: Trials
    way: Way
    train: TrainSpec
    rehearsal: Rehearsal

    @property
    def micro_batches(self) -> list[int]:
        """Those that divide the global batch over the processes."""
        most = self.train.global_batch // self.way.processes
        return [m for m in range(1, most + 1) if most % m == 0]

    @property
    def least(self) -> int:
        """Bytes that are held even between steps."""
        return share(self.way, self.rehearsal, None, None, False).peak

    def memory(self, micro_batch: int) -> Memory:
        """Rehearse a step and an evaluation with a micro-batch."""
        trials, recipe, data = self.trials, self.trials.part.stage.recipe, self.trials.part.data
        step: Peak | None = None
        judged: Peak | None = None
        given = trials.layout(self.way).micro_batch
        changed = {} if micro_batch == given else {"micro_batch": micro_batch}
        width = recipe.model_copy(update={"train": self.train.model_copy(update=changed)}).evaluation_batch
        accumulate = self.train.global_batch // (micro_batch * self.way.processes)
        try:
            step = self.rehearsal.step(batch_of(trials.examples, trials.worst, micro_batch), accumulate)
            if data.eval:
                width = min(width, len(data.eval))
                judged = self.rehearsal.evaluate(batch_of(trials.examples, trials.worst, width))
        except Unknown as unknown:
            trials.unknown = str(unknown)
        return share(self.way, self.rehearsal, step, judged, recipe.checkpoint.asynchronous)
