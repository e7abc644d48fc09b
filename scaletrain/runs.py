"""A run, from a recipe and its first stage to the report at its end, resumed from wherever it was left."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from scaletrain.assemble import build_networks, check_able, check_names, prepare
from scaletrain.callbacks.base import Observer
from scaletrain.callbacks.log import MetricsLog, draw, rewind
from scaletrain.callbacks.pictures import SampleFolder
from scaletrain.callbacks.progress import Progress as ProgressLine
from scaletrain.checkpoint import reader
from scaletrain.checkpoint.claim import LOCK, Claim
from scaletrain.checkpoint.layout import METRICS, RECIPE, SUMMARY, checkpoints
from scaletrain.checkpoint.remote import Remote
from scaletrain.checkpoint.writer import set_aside, write
from scaletrain.config import NetworkSpec, Recipe, Stage
from scaletrain.crew import Progress
from scaletrain.data.contract import Inspection
from scaletrain.data.loader import Layout
from scaletrain.data.stream import Stream
from scaletrain.engine.choice import build_engine, check_launch, engine_name
from scaletrain.engine.precision import check_precision
from scaletrain.engine.world import World
from scaletrain.enrichment import do_ahead
from scaletrain.errors import Interrupted, UserError
from scaletrain.finished import report_on
from scaletrain.guard import Rollback
from scaletrain.inspection import inspected, say
from scaletrain.objectives.base import Data, Objective
from scaletrain.position import steps_of
from scaletrain.recipe import check, load, objective_of, resolved_yaml, stages
from scaletrain.shelf import Shelf
from scaletrain.signals import StopSignals
from scaletrain.snapshot import Snapshot, versions
from scaletrain.trainer import Trainer

log = logging.getLogger("scaletrain")

_SAVING = ("every", "minutes", "keep", "keep_every", "asynchronous", "remote")
_MAY_CHANGE = (
    "log", *(f"checkpoint.{key}" for key in _SAVING), "evaluate.samples", "evaluate.batch", "data.workers",
    "train.watchdog",
)  # fmt: skip
"""Keys that may differ between a run and its continuation: they change nothing that is learned."""
_MAY_EXTEND = ("train.", "data.", "players.", "evaluate.", "checkpoint.")
"""What may differ, too, when the user says --extend."""


def train(
    recipe: Recipe,
    name: str,
    root: Path,
    fresh: bool = False,
    observers: Sequence[Observer] | None = None,
    extend: bool = False,
) -> Path:
    """Train all stages of a recipe in `root/name`, from the newest checkpoint there if there is one.

    extend: go on although the run is finished, or its data, batch or duration are no longer what it was begun with.
    observers: told of the run on rank 0; by default those of `scaletrain.callbacks`. Returns the run folder. Raises
    UserError before anything is written when the recipe, the data or the folder is wrong, and Interrupted when a
    signal stopped the run after it saved.
    """
    check(recipe)
    check_launch(stage.recipe.train.precision for stage in stages(recipe))
    engine_name()
    world = World.start()
    try:
        with StopSignals() as signals:
            return _Run(recipe, root / name, world, observers, extend).train(fresh, signals)
    finally:
        world.close()


def validate(recipe: Recipe) -> tuple[str, list[tuple[str, Inspection]]]:
    """Check all that can be known before a device is touched: keys, data, batches, and what the networks are told.

    Data of later stages may need what earlier ones leave behind, so only the first stage's are read. Returns how long
    that is, and how many examples it has; and what the family says of each source of them. Raises UserError.
    """
    check(recipe)
    parts = stages(recipe)
    for stage in parts:
        Layout.derive(stage.recipe.train.global_batch, stage.recipe.train.micro_batch, 1, 0)
    run = _Run(recipe, Path(), World(torch.device("cpu")), [])
    objective, data, _ = run.prepare(parts[0])
    first = parts[0].recipe
    saving, judging = first.checkpoint, first.evaluate
    durations = {"train.duration": first.train.duration, "checkpoint.every": saving.every}
    durations |= {"checkpoint.keep_every": saving.keep_every, "evaluate.every": judging.every}
    steps, *_ = (
        steps_of(duration, objective.turns, data, first.train.global_batch, key)
        for key, duration in durations.items()
        if duration
    )
    kind = "rows of a stream" if isinstance(data.train, Stream) else "examples"
    held = len(data.eval) if data.eval else 0
    text = f"{steps:,} steps, {len(data.train):,} {kind} to train on, {held:,} to evaluate on"
    return text, list(inspected(objective, data))


def foresee(
    recipe: Recipe, folder: Path, world: World | None = None
) -> Iterator[tuple[Stage, Objective[Any], Data, dict[str, NetworkSpec], Shelf]]:
    """Yield what each stage is made of, as if those before had ended: objective, data, networks, and where those are.

    folder: an empty one, for checkpoints without weights. world: by default one process. Raises UserError.
    """
    check(recipe)
    run = _Run(recipe, folder, world or World(torch.device("cpu")), [])
    for number, stage in enumerate(run.stages, 1):
        objective, data, specs = run.prepare(stage)
        yield stage, objective, data, specs, run.shelf

        def fill(hidden: Path, objective: Objective[Any] = objective, specs: Mapping[str, Any] = specs) -> None:
            for name, spec in specs.items():
                if not spec.frozen:
                    own = hidden / "networks" / name
                    own.mkdir(parents=True)
                    objective.save_assets(name, own)
                    (own / "config.json").write_text(json.dumps({"type": spec.type, "config": spec.config}))

        facts = {name: spec.model_dump(mode="json", by_alias=True) for name, spec in specs.items()}
        write(folder, number, fill, {"stage": stage.name, "complete": True, "networks": facts})


class _Run:
    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        world: World,
        observers: Sequence[Observer] | None,
        extend: bool = False,
    ):
        self.recipe, self.folder, self.world, self.extend = recipe, folder, world, extend
        self.stages = stages(recipe)
        self.names = tuple(stage.name for stage in self.stages)
        self.shelf = Shelf(folder)
        self.given = observers
        saving = recipe.checkpoint
        self.remote = Remote(saving.remote, folder, saving.keep) if saving.remote else None
        self.observers: list[Observer] = []
        self.opened = False
        self.latest: Path | None = None
        self.claim: Claim | None = None

    def train(self, fresh: bool, signals: StopSignals) -> Path:
        started = time.monotonic()
        self.latest = latest = self.world.on_main(lambda: self._look(fresh))
        engine = build_engine(self.world, self.stages[0].recipe.train.precision)
        for stage in self.stages:
            check_able(objective_of(stage.recipe), engine)
            batch = stage.recipe.train
            check_precision(batch.precision, self.world.device)
            Layout.derive(batch.global_batch, batch.micro_batch, self.world.size, self.world.rank)
        engine.close()
        status = "failed"
        metrics: dict[str, float] = {}
        done = reader.manifest(latest) if latest else None
        again = self.extend and done is not None and done["stage"] == self.names[-1]  # the last stage, though complete
        first = self.names.index(done["stage"]) + (done["complete"] and not again) if done else 0
        try:
            if first == len(self.stages):
                self.world.agree(self._open_folder)  # nothing is left but the report
            for stage in self.stages[first:]:
                saved = latest if done and stage.name == done["stage"] and (again or not done["complete"]) else None
                metrics = self._stage(stage, saved, signals)
            self._report()
            status = "done"
        except (Interrupted, KeyboardInterrupt):
            status = "interrupted"
            raise
        finally:
            if self.opened:
                self._close(status, metrics, time.monotonic() - started)
            if self.claim:
                self.claim.release()
        return self.folder

    def _close(self, status: str, metrics: Mapping[str, float], seconds: float) -> None:
        """Wait for copies, write the summary and the curves; a full disk is told and hides no other error."""
        if self.remote:
            self.remote.finish()
        try:
            for observer in self.observers:
                observer.end()
            _summarise(self.folder, status, metrics, seconds, self.world)
        except OSError as error:
            log.error("summary.json and curves.png could not be written: %s", error)

    def _look(self, fresh: bool) -> Path | None:
        """Look at what stands in the folder, before anything is written. Returns the checkpoint to go on from."""
        if fresh and (self.folder.exists() or (self.remote and self.remote.exists())):
            place = self.folder if self.folder.exists() else f"{self.recipe.checkpoint.remote}/{self.folder.name}"
            raise UserError(f"--fresh: {place} exists already. Choose another --run NAME, or remove it.")
        _probe(self.folder)
        path = self.folder / RECIPE
        if path.exists() and checkpoints(self.folder):
            self._check_recipe(path)
        elif not path.exists() and self.folder.exists() and any(p.name != LOCK for p in self.folder.iterdir()):
            raise UserError(f"{self.folder} is not a run folder and is not empty. Choose another --run NAME.")
        if self.remote and not checkpoints(self.folder):
            self.remote.fetch(self._check_recipe)
        return reader.newest(self.folder)

    def _check_recipe(self, path: Path) -> None:
        """Raise UserError when a run was begun with another recipe, but for what may differ."""
        differing = _differences(load(str(path), []).model_dump(mode="json"), self.recipe.model_dump(mode="json"))
        last = f"stages.{len(self.stages) - 1}."  # what its own keys say; stages before it have ended
        others = [key for key in differing if not f"{key.removeprefix(last)}.".startswith(_MAY_EXTEND)]
        fixed = others if self.extend else differing
        if fixed:
            way = "" if others else ", or say --extend to go on with them"
            raise UserError(
                f"{self.folder} belongs to another recipe; these keys differ: {', '.join(fixed)}. "
                f"Give this run a name of its own with --run NAME{way}."
            )

    def _open_folder(self) -> None:
        """Write the first files of the run, now that recipe, data and networks are known to be good."""
        if self.opened or not self.world.main:
            return
        trackers = []
        if self.recipe.log.trackers and self.given is None:
            from scaletrain.callbacks.trackers import Trackers

            trackers = [Trackers(self.recipe, self.folder)]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.claim = Claim(self.folder)
        for left in self.folder.glob(".saving-*"):
            shutil.rmtree(left)
        set_aside(self.folder, self.latest)
        temporary = self.folder / f".{RECIPE}.new"
        temporary.write_text(resolved_yaml(self.recipe))
        temporary.replace(self.folder / RECIPE)
        own = (MetricsLog(self.folder / METRICS), SampleFolder(self.folder / "samples"), ProgressLine())
        self.observers += [*trackers, *own] if self.given is None else self.given
        if self.remote:
            self.remote.send()  # what an earlier attempt could not
        self.opened = True

    def _see_folder(self) -> None:
        """Raise UserError where this process, which is to write its share, does not see what rank 0 has written."""
        if not (self.folder / RECIPE).is_file():
            raise UserError(
                f"process {self.world.rank} does not see {self.folder.absolute()}, which process 0 has made. Each "
                "writes its share of a checkpoint: --root must be on a disk that all machines share."
            )

    def prepare(self, stage: Stage) -> tuple[Objective[Any], Data, dict[str, NetworkSpec]]:
        """Make the objective, the examples and what the networks are told. Raises UserError."""
        objective = objective_of(stage.recipe)
        objective.origins = self._origins(stage)
        objective.restore(self._folders(objective.origins))
        data = self.world.agree(lambda: prepare(objective, stage.recipe), main_first=True)
        if len(data.train) < self.world.size:
            raise UserError(f"{self.world.size} processes, but data.train has only {len(data.train)} example(s).")
        specs = self._continued(stage, objective.networks())
        check_names(stage.recipe, objective.turns, {**specs, **self._early(stage, objective)})
        return objective, data, specs

    def _early(self, stage: Stage, objective: Objective[Any]) -> dict[str, NetworkSpec]:
        """Return the networks that are needed before the training alone."""
        ahead = objective.ahead()
        return self._continued(stage, ahead.networks) if ahead else {}

    def _stage(self, stage: Stage, saved: Path | None, signals: StopSignals) -> dict[str, float]:
        """Train one stage, from its checkpoint if it has one. Returns its last evaluation."""
        skipped: list[int] = []
        while True:
            trainer = self._build(stage, saved, skipped, signals)
            try:
                trainer.fit(signals)
                return trainer.metrics
            except Rollback as error:
                skipped = sorted({*trainer.progress.skipped, *error.windows})
                going = error.record()
            finally:
                trainer.engine.close()
            del trainer
            gc.collect()  # what it held, of which some refers to itself, before others are built
            saved = self.world.on_main(lambda: self._newest_of(stage))
            back = int(reader.manifest(saved)["step"]) if saved else self._first_step(stage)
            self.world.on_main(lambda: self._note(back, {**going, "step": back, "stage": stage.name}))  # noqa: B023

    def _note(self, step: int, record: Mapping[str, Any]) -> None:
        """Put on record that the run went back to a step."""
        rewind(self.folder / METRICS, step)
        for observer in self.observers:
            observer.noted(step, record)

    def _build(self, stage: Stage, saved: Path | None, skipped: list[int], signals: StopSignals) -> Trainer:
        """Build everything of one stage, as `saved` has it. skipped: windows of the data that are passed over."""
        objective, data, specs = self.prepare(stage)
        progress = Progress(first_step=self._first_step(stage), facts=dict(data.facts))
        if saved:
            progress = Progress(**reader.state(saved)["progress"])
            self._check_facts(progress, data, stage)
        elif not skipped:
            self.world.on_main(lambda: say(objective, data))
        if ahead := objective.ahead():
            early = self._early(stage, objective)
            do_ahead(ahead, early, stage, self.shelf, self.world, lambda: bool(signals.asked))
        progress.skipped = sorted({*progress.skipped, *skipped})
        engine = build_engine(self.world, stage.recipe.train.precision)
        networks, weights = self.world.agree(
            lambda: build_networks(specs, self.shelf, saved, engine, stage.recipe.seed, stage.name)
        )
        snapshot = Snapshot(self.folder, self.names, specs, self.world, stage.recipe.checkpoint, self.remote)
        trainer = self.world.agree(
            lambda: Trainer.build(stage, objective, data, networks, weights, engine, progress, snapshot, self.observers)
        )
        if self.extend and progress.complete:
            if progress.step >= trainer.steps:
                raise UserError(
                    f"--extend: {progress.step:,} steps are done and train.duration comes to {trainer.steps:,}: give a "
                    "longer one."
                )
            progress.complete = False
        trainer.evaluator.check()
        if self.world.total([float(signals.asked)])[0]:
            raise Interrupted("stopped before a step was taken; run the same command again.")
        self.world.agree(self._open_folder)
        if engine.sharded:
            self.world.agree(self._see_folder)
        if self.world.main:
            rewind(self.folder / METRICS, progress.first_step + progress.step)
        if saved:
            rates = {name: player["lr"] for name, player in reader.state(saved)["players"].items()}
            snapshot.restore(saved, trainer.crew)
            if self.extend and self.world.main:
                self._say_extended(trainer, rates)
        return trainer

    def _say_extended(self, trainer: Trainer, rates: Mapping[str, float]) -> None:
        """Say what going on means for the learning rates and the order of the data."""
        for name, player in trainer.players.items():
            player.set_lr()
            now, kind = player.optimizer.param_groups[0]["lr"], player.schedule.spec.type
            log.warning(
                "--extend: player %s goes on at update %s of its %s schedule over %s updates: lr %.3g, after %.3g",
                *(name, f"{player.updates:,}", kind, f"{player.schedule.total:,}", now, rates[name]),
            )
        steps = trainer.steps
        log.warning("--extend: the stage ends at step %s; the data go on at their position", f"{steps:,}")

    def _check_facts(self, progress: Progress, data: Data, stage: Stage) -> None:
        """Raise UserError when the examples are no longer made of what they were, unless that was asked for."""
        then, now = progress.facts, data.facts
        changed = [name for name in {**then, **now} if then.get(name) != now.get(name)]
        if changed and not self.extend:
            raise UserError(
                f"{' and '.join(changed)} changed since {self.folder} was begun (the fingerprints differ). Go on with "
                "what it was begun with, start a run of its own with --run NAME, or say --extend to go on with this."
            )
        if changed:
            log.warning(
                "--extend: %s changed; the run goes on at its position in what is there now", " and ".join(changed)
            )
            progress.facts, progress.cursors = dict(now), {}
        batch, micro = stage.recipe.train.global_batch, stage.recipe.train.micro_batch
        if self.extend and progress.batch != [batch, micro or progress.batch[1]]:
            progress.batch, progress.cursors = [], {}

    def _newest_of(self, stage: Stage) -> Path | None:
        """Return the newest checkpoint that verifies, if it is of this stage."""
        found = reader.newest(self.folder) if checkpoints(self.folder) else None
        return found if found and reader.manifest(found)["stage"] == stage.name else None

    def _first_step(self, stage: Stage) -> int:
        """Return at which step of the run a stage begins."""
        number = self.names.index(stage.name)
        if number == 0:
            return 0
        end = reader.stage_end(self.folder, self.names[number - 1])
        if end is None:
            raise UserError(
                f"{self.folder}: the checkpoint in which stage `{self.names[number - 1]}` ended is gone or damaged, "
                "and this stage goes on from it. Start anew in another folder with --run NAME."
            )
        return int(reader.manifest(end)["step"])

    def _before(self, stage: Stage) -> dict[str, str]:
        """Return the `from` of every network that the stage before trained, by name."""
        number = self.names.index(stage.name)
        if number == 0:
            return {}
        end = reader.stage_end(self.folder, self.names[number - 1])
        known = reader.manifest(end)["networks"] if end else {}
        return {n: f"stage:{self.names[number - 1]}/{n}" for n, spec in known.items() if not spec["frozen"]}

    def _origins(self, stage: Stage) -> dict[str, str]:
        """Return what the networks of a stage go on from, by name: what it says, or else the stage before."""
        own = next((s.options.get("networks") or {} for s in self.recipe.stages if s.name == stage.name), {})
        specs = stage.recipe.networks
        found = {
            name: source
            for name, source in self._before(stage).items()
            if not {"from", "path"} & set(own.get(name) or {}) and not (name in specs and specs[name].frozen)
        }
        return found | {name: spec.source for name, spec in specs.items() if spec.source and name not in found}

    def _folders(self, origins: Mapping[str, str]) -> dict[str, Path]:
        """Return where the networks stand that others go on from."""
        folders = {name: self.shelf.folder(source) for name, source in origins.items()}
        return {name: folder for name, folder in folders.items() if folder.is_dir()}

    def _continued(self, stage: Stage, specs: Mapping[str, NetworkSpec]) -> dict[str, NetworkSpec]:
        """Let networks go on from their origins.

        What goes on from another network has that network's type and config. Raises UserError when the recipe asks
        for another.
        """
        origins = self._origins(stage)
        found = dict(specs)
        for name, spec in specs.items():
            if name in origins and not spec.frozen:
                spec = spec.model_copy(update={"source": origins[name], "path": None})
            if spec.source is not None:
                origin = self.shelf.spec(spec.source)
                asked = stage.recipe.networks.get(name, NetworkSpec()).config
                other = [key for key, value in asked.items() if origin.config.get(key, value) != value]
                if other:
                    raise UserError(
                        f"networks.{name}.config.{other[0]} is {asked[other[0]]}, but {spec.source}, which it goes on "
                        f"from, has {origin.config[other[0]]}: leave it out."
                    )
                spec = spec.model_copy(update={"type": origin.type, "config": {**spec.config, **origin.config}})
            found[name] = spec
        return found

    def _report(self) -> None:
        """Judge the run as a whole, once."""

        def work() -> None:
            report = report_on(self.folder, self.world.device)
            if report:
                for observer in self.observers:
                    observer.say(report.text)

        self.world.on_main(work)


def _probe(folder: Path) -> None:
    """Raise UserError unless a folder, or its nearest parent that exists, can be written. Leaves nothing behind."""
    try:
        parent = folder
        while not parent.exists():
            parent = parent.parent
        with tempfile.TemporaryDirectory(prefix=".scaletrain-", dir=parent):
            pass
        if parent != folder:
            os.lstat(parent / folder.relative_to(parent).parts[0])
    except FileNotFoundError:
        return  # it can be made
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}. Choose another place with --root DIR.") from None


def _differences(old: Any, new: Any, key: str = "") -> list[str]:
    """Return the dotted keys in which two recipes differ, but for those that may."""
    if old == new or re.sub(r"^stages\.[^.]+\.", "", key) in _MAY_CHANGE:
        return []
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for name in sorted(old.keys() | new.keys(), key=str):
            found += _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
        return found
    return [key]


def _summarise(folder: Path, status: str, metrics: Mapping[str, float], seconds: float, world: World) -> None:
    """Write summary.json and the curves."""
    try:
        git = ["git", "rev-parse", "HEAD"]
        revision = subprocess.run(git, capture_output=True, text=True, timeout=5, check=False).stdout.strip() or None
    except OSError:
        revision = None
    found = checkpoints(folder)
    cuda = world.device.type == "cuda"
    summary = {
        "status": status,
        "step": int(found[-1].name.removeprefix("step-")) if found else 0,
        "metrics": dict(metrics),
        "seconds": round(seconds, 2),
        "versions": versions(),
        "git_revision": revision,
        "hardware": {
            "processes": world.size,
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
    }
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    if (folder / METRICS).exists():
        draw(folder / METRICS, folder / "curves.png")
