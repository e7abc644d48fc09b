"""A run, from a recipe and its first stage to the report at its end, resumed from wherever it was left."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from scaletrain.assemble import build_networks, check_names, prepare
from scaletrain.callbacks.base import Observer
from scaletrain.callbacks.log import MetricsLog, draw, rewind
from scaletrain.callbacks.pictures import SampleFolder
from scaletrain.callbacks.progress import Progress as ProgressLine
from scaletrain.checkpoint import reader
from scaletrain.checkpoint.layout import METRICS, RECIPE, SUMMARY, checkpoints
from scaletrain.checkpoint.writer import set_aside
from scaletrain.config import NetworkSpec, Recipe, Stage
from scaletrain.crew import Progress
from scaletrain.data.loader import Layout
from scaletrain.engine.world import World
from scaletrain.errors import Interrupted, UserError
from scaletrain.finished import report_on
from scaletrain.objectives.base import Data, Objective
from scaletrain.recipe import check, load, objective_of, resolved_yaml, stages
from scaletrain.shelf import Shelf
from scaletrain.signals import StopSignals
from scaletrain.snapshot import Snapshot, versions
from scaletrain.trainer import Trainer

log = logging.getLogger("scaletrain")

_MAY_CHANGE = ("log", "checkpoint.every", "checkpoint.keep", "evaluate.samples", "evaluate.batch", "data.workers")
"""Keys that may differ between a run and its continuation: they change nothing that is learned."""


def train(
    recipe: Recipe, name: str, root: Path, fresh: bool = False, observers: Sequence[Observer] | None = None
) -> Path:
    """Train all stages of a recipe in `root/name`, from the newest checkpoint there if there is one.

    observers: told of the run on rank 0; by default those of `scaletrain.callbacks`. Returns the run folder. Raises
    UserError before anything is written when the recipe, the data or the folder is wrong, and Interrupted when a
    signal stopped the run after it saved.
    """
    check(recipe)
    world = World.start()
    try:
        with StopSignals() as signals:
            return _Run(recipe, root / name, world, observers).train(fresh, signals)
    finally:
        world.close()


def validate(recipe: Recipe) -> dict[str, int]:
    """Check all that can be known before a device is touched: keys, data, batches, and what the networks are told.

    Data of later stages may need what earlier ones leave behind, so only the first stage's are read. Returns how many
    examples there are to train on and to evaluate on. Raises UserError.
    """
    check(recipe)
    parts = stages(recipe)
    for stage in parts:
        Layout.derive(stage.recipe.train.global_batch, stage.recipe.train.micro_batch, 1, 0)
    run = _Run(recipe, Path(), World(torch.device("cpu")), [])
    _, data, _ = run.prepare(parts[0])
    return {"train": len(data.train), "eval": len(data.eval) if data.eval else 0}


class _Run:
    def __init__(self, recipe: Recipe, folder: Path, world: World, observers: Sequence[Observer] | None):
        self.recipe, self.folder, self.world = recipe, folder, world
        self.stages = stages(recipe)
        self.names = tuple(stage.name for stage in self.stages)
        self.shelf = Shelf(folder)
        self.given = observers
        self.observers: list[Observer] = []
        self.opened = False

    def train(self, fresh: bool, signals: StopSignals) -> Path:
        started = time.monotonic()
        latest = self.world.on_main(lambda: self._look(fresh))
        for stage in self.stages:
            batch = stage.recipe.train
            Layout.derive(batch.global_batch, batch.micro_batch, self.world.size, self.world.rank)
        status = "failed"
        metrics: dict[str, float] = {}
        done = reader.manifest(latest) if latest else None
        first = self.names.index(done["stage"]) + done["complete"] if done else 0
        try:
            if first == len(self.stages):
                self.world.agree(self._open_folder)  # nothing is left but the report
            for stage in self.stages[first:]:
                saved = latest if done and not done["complete"] and stage.name == done["stage"] else None
                metrics = self._stage(stage, saved, signals)
            self._report()
            status = "done"
        except (Interrupted, KeyboardInterrupt):
            status = "interrupted"
            raise
        finally:
            if self.opened:
                self._close(status, metrics, time.monotonic() - started)
        return self.folder

    def _close(self, status: str, metrics: Mapping[str, float], seconds: float) -> None:
        """Write the summary and the curves; a full disk is told and hides no other error."""
        try:
            for observer in self.observers:
                observer.end()
            _summarise(self.folder, status, metrics, seconds, self.world)
        except OSError as error:
            log.error("summary.json and curves.png could not be written: %s", error)

    def _look(self, fresh: bool) -> Path | None:
        """Look at what stands in the folder, before anything is written. Returns the checkpoint to go on from."""
        if fresh and self.folder.exists():
            raise UserError(f"--fresh: {self.folder} exists already. Choose another --run NAME, or remove it.")
        _probe(self.folder)
        path = self.folder / RECIPE
        if path.exists():
            differing = _differences(load(str(path), []).model_dump(mode="json"), self.recipe.model_dump(mode="json"))
            if differing and checkpoints(self.folder):
                raise UserError(
                    f"{self.folder} belongs to another recipe; these keys differ: {', '.join(differing)}. "
                    f"Give this run a name of its own with --run NAME."
                )
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise UserError(f"{self.folder} is not a run folder and is not empty. Choose another --run NAME.")
        return reader.newest(self.folder)

    def _open_folder(self) -> None:
        """Write the first files of the run, now that recipe, data and networks are known to be good."""
        if self.opened or not self.world.main:
            return
        trackers = []
        if self.recipe.log.trackers and self.given is None:
            from scaletrain.callbacks.trackers import Trackers

            trackers = [Trackers(self.recipe, self.folder)]
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".saving-*"):
            shutil.rmtree(left)
        set_aside(self.folder, reader.newest(self.folder) if checkpoints(self.folder) else None)
        temporary = self.folder / f".{RECIPE}.new"
        temporary.write_text(resolved_yaml(self.recipe))
        temporary.replace(self.folder / RECIPE)
        own = (MetricsLog(self.folder / METRICS), SampleFolder(self.folder / "samples"), ProgressLine())
        self.observers += [*trackers, *own] if self.given is None else self.given
        self.opened = True

    def prepare(self, stage: Stage) -> tuple[Objective[Any], Data, dict[str, NetworkSpec]]:
        """Make the objective, the examples and what the networks are told. Raises UserError."""
        objective = objective_of(stage.recipe)
        objective.restore(self._origins(stage))
        data = self.world.agree(lambda: prepare(objective, stage.recipe), main_first=True)
        if len(data.train) < self.world.size:
            raise UserError(f"{self.world.size} processes, but data.train has only {len(data.train)} example(s).")
        specs = self._continued(stage, objective.networks())
        check_names(stage.recipe, objective.turns, specs)
        return objective, data, specs

    def _stage(self, stage: Stage, saved: Path | None, signals: StopSignals) -> dict[str, float]:
        """Build everything of one stage and train it. Returns its last evaluation."""
        objective, data, specs = self.prepare(stage)
        networks = self.world.agree(
            lambda: build_networks(specs, self.shelf, saved, self.world.device, stage.recipe.seed, stage.name)
        )
        progress = Progress(first_step=self._first_step(stage), examples=len(data.train))
        if saved:
            progress = Progress(**reader.state(saved)["progress"])
            if progress.examples != len(data.train):
                raise UserError(
                    f"data.train has {len(data.train):,} examples; this run has been trained on {progress.examples:,}. "
                    "Go on with the same data, or start a run of its own with --run NAME."
                )
        snapshot = Snapshot(self.folder, self.names, specs, self.world)
        trainer = self.world.agree(
            lambda: Trainer.build(stage, objective, data, networks, progress, snapshot, self.observers, self.world)
        )
        trainer.check_metrics()
        if self.world.total([float(signals.asked)])[0]:
            raise Interrupted("stopped before a step was taken; run the same command again.")
        self.world.agree(self._open_folder)
        if self.world.main:
            rewind(self.folder / METRICS, progress.first_step + progress.step)
        if saved:
            snapshot.restore(saved, trainer.crew)
        trainer.fit(signals)
        return trainer.metrics

    def _first_step(self, stage: Stage) -> int:
        """Return at which step of the run a stage begins."""
        number = self.names.index(stage.name)
        if number == 0:
            return 0
        end = reader.stage_end(self.folder, self.names[number - 1])
        assert end is not None, "stages are trained in order"
        return int(reader.manifest(end)["step"])

    def _before(self, stage: Stage) -> dict[str, str]:
        """Return the `from` of every network that the stage before trained, by name."""
        number = self.names.index(stage.name)
        if number == 0:
            return {}
        end = reader.stage_end(self.folder, self.names[number - 1])
        known = reader.manifest(end)["networks"] if end else {}
        return {n: f"stage:{self.names[number - 1]}/{n}" for n, spec in known.items() if not spec["frozen"]}

    def _origins(self, stage: Stage) -> dict[str, Path]:
        """Return the folders of the networks that this stage's networks go on from, where they have one."""
        given = {name: spec.source for name, spec in stage.recipe.networks.items() if spec.source}
        folders = {name: self.shelf.folder(source) for name, source in {**self._before(stage), **given}.items()}
        return {name: folder for name, folder in folders.items() if folder.is_dir()}

    def _continued(self, stage: Stage, specs: Mapping[str, NetworkSpec]) -> dict[str, NetworkSpec]:
        """Let networks go on from those of the same name in the stage before, unless this stage says otherwise.

        What goes on from another network has that network's type and config. Raises UserError when the recipe asks
        for another.
        """
        before = self._before(stage)
        own = next((s.options.get("networks") or {} for s in self.recipe.stages if s.name == stage.name), {})
        found = dict(specs)
        for name, spec in specs.items():
            if name in before and not spec.frozen and not {"from", "path"} & set(own.get(name) or {}):
                spec = spec.model_copy(update={"source": before[name], "path": None})
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
