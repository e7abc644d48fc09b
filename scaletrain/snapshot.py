"""A stage's whole state, to a checkpoint and back: networks, players, the family's own state, progress.

Saving is two things: taking what is to be written, which the loop waits for, and writing it, which it need not.
"""

from __future__ import annotations

import json
import logging
import platform
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import scaletrain
from scaletrain.checkpoint import reader
from scaletrain.checkpoint.background import Background, HostCopies
from scaletrain.checkpoint.layout import FAMILY, STATE
from scaletrain.checkpoint.remote import Remote
from scaletrain.checkpoint.tensors import WHOLE, load_tensors, save_tensors
from scaletrain.checkpoint.writer import prune, write
from scaletrain.config import CheckpointSpec, NetworkSpec, Stage
from scaletrain.crew import Crew, Progress
from scaletrain.engine.base import Engine
from scaletrain.engine.world import World
from scaletrain.errors import Interrupted
from scaletrain.networks.build import save
from scaletrain.objectives.base import Objective

log = logging.getLogger("scaletrain")


def versions() -> dict[str, str]:
    """Return the versions of what a run depends on, as installed."""
    found = {"python": platform.python_version(), "scaletrain": scaletrain.__version__}
    for package in ("torch", "accelerate", "transformers", "peft", "diffusers", "deepspeed", "bitsandbytes"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


_States = Mapping[str, tuple[Mapping[str, torch.Tensor], Mapping[str, Any]]]
"""What `Engine.state` returns, by player."""


class Snapshot:
    """Saves a stage of a run under the run's folder, and restores it. Rank 0 writes; all ranks take part.

    stages: the names of all. specs: the stage's networks, completed by what the data told. remote: where copies go.
    """

    def __init__(
        self,
        root: Path,
        stages: tuple[str, ...],
        specs: Mapping[str, NetworkSpec],
        world: World,
        spec: CheckpointSpec,
        remote: Remote | None = None,
    ):
        self.root, self.stages, self.specs, self.world = root, stages, specs, world
        self.spec, self.remote = spec, remote
        self._background, self._copies = Background(), HostCopies()
        self._assets: dict[str, dict[str, bytes]] = {}
        self._reserved = not (spec.asynchronous and world.main)
        self._saved = time.monotonic()

    @property
    def failed(self) -> bool:
        """Whether a save in the background has failed here. Ask on every rank, add up, and then `finish` on all."""
        return self._background.failed

    @property
    def due(self) -> bool:
        """Whether `checkpoint.minutes` have passed, by the clock of rank 0."""
        minutes = self.spec.minutes
        return self.world.main and minutes is not None and time.monotonic() - self._saved >= 60 * minutes

    def reserve(self, crew: Crew) -> None:
        """Make room for copies beside the loop, once; after a step, when optimisers have their state."""
        if self._reserved or crew.engine.lockstep:
            return
        self._reserved = True
        states = {name: crew.engine.state(player) for name, player in crew.players.items()}
        changing, _ = self._split(crew, states)
        self._background.start(lambda: self._copies.reserve(changing))

    def save(
        self, step: int, stage: Stage, crew: Crew, progress: Progress, best: bool = False, kept: bool = False
    ) -> None:
        """Take everything as it is now; write it as a checkpoint, atomically, and remove old ones, in the background.

        best: the best so far. kept: one that stays. A save that is in flight ends first; its error, and an error of
        this one where it is not asynchronous, is raised as Interrupted, on every rank.
        """
        states = {name: crew.engine.state(player) for name, player in crew.players.items()}
        changing, fixed = self._split(crew, states)
        self._reserved = True
        facts = {
            "stage": stage.name,
            "stage_step": progress.step,
            "complete": progress.complete,
            "skipped_windows": list(progress.skipped),
            "best": best,
            "kept": kept,
            "engine": crew.engine.name,
            "world_size": self.world.size,
            "versions": versions(),
            "networks": {name: spec.model_dump(mode="json", by_alias=True) for name, spec in self.specs.items()},
        }

        def begin() -> None:
            self._background.wait()
            with _told(step, self.root):
                fill = self._take(crew, progress, states, changing, fixed)
            self._background.start(lambda: self._write(step, fill, facts))

        self._on_main(begin)
        self._saved = time.monotonic()
        # Asking a sharded module for its state reshards it, under the feet of a forward pass.
        if not self.spec.asynchronous or crew.engine.lockstep:
            self.finish()

    def finish(self) -> None:
        """Wait for the save in flight. Raises its error as Interrupted, on every rank."""
        self._on_main(self._background.wait)

    def close(self) -> None:
        """Wait for the save in flight, on this rank alone; its error is told and hides no other."""
        try:
            self._background.wait()
        except Exception as error:
            log.error("the last save failed: %s", error)

    def _on_main(self, work: Callable[[], None]) -> None:
        try:
            self.world.on_main(work)
        except OSError as error:
            raise Interrupted(str(error)) from error

    def _networks(self, crew: Crew) -> dict[str, nn.Module]:
        return {name: module for name, module in crew.engine.plain().items() if not self.specs[name].frozen}

    def _split(self, crew: Crew, states: _States) -> tuple[dict[str, Mapping[str, torch.Tensor]], dict[str, Any]]:
        """Return the tensors of networks and players that change, by group, and the rest of the networks' state.

        All processes call it: what is held in parts is gathered.
        """
        trained = {id(p) for player in crew.players.values() for p in player.trainable.values()}
        changing: dict[str, Mapping[str, torch.Tensor]] = {f"players/{n}": state for n, (state, _) in states.items()}
        fixed: dict[str, Mapping[str, Any]] = {}
        for name, module in self._networks(crew).items():
            changing[f"networks/{name}"], fixed[name] = _parts(module, self.specs[name], trained, crew.engine)
        return changing, fixed

    def _take(
        self,
        crew: Crew,
        progress: Progress,
        states: _States,
        changing: dict[str, Mapping[str, torch.Tensor]],
        fixed: Mapping[str, Any],
    ) -> Callable[[Path], None]:
        """Take what is to be written. Returns what writes it into a folder."""
        networks = self._networks(crew)
        family = crew.objective.state_dict()
        changing["family"] = {k: v for k, v in family.items() if isinstance(v, torch.Tensor)}
        taken = self._copies.take(changing) if self.spec.asynchronous else changing
        rates = {name: player.optimizer.param_groups[0]["lr"] for name, player in crew.players.items()}
        values = {
            "progress": asdict(progress),
            "players": {name: player.counters() | {"lr": rates[name]} for name, player in crew.players.items()},
            "optimizers": {name: values for name, (_, values) in states.items()},
            "objective": {k: v for k, v in family.items() if k not in changing["family"]},
        }
        text = json.dumps(values, indent=2) + "\n"
        if not self._assets:
            self._assets = {name: _assets(crew.objective, name) for name in networks}

        def fill(folder: Path) -> None:
            self._copies.wait()
            for name, module in networks.items():
                state = {**fixed[name], **taken[f"networks/{name}"]}
                save(module, self.specs[name], folder / "networks" / name, state)
                for file, content in self._assets[name].items():
                    path = folder / "networks" / name / file
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
            for name in states:
                save_tensors(folder / "training" / name / WHOLE, taken[f"players/{name}"])
            if taken["family"]:
                save_tensors(folder / FAMILY, taken["family"])
            (folder / STATE).write_text(text)

        return fill

    def _write(self, step: int, fill: Callable[[Path], None], facts: Mapping[str, Any]) -> None:
        from safetensors import SafetensorError

        with _told(step, self.root):
            try:
                path = write(self.root, step, fill, facts)
            except SafetensorError as error:  # a full disk, most often
                raise OSError(str(error)) from error
            prune(self.root, self.spec.keep, path, self.remote.in_use if self.remote else ())
        if self.remote:
            self.remote.send()

    def restore(self, checkpoint: Path, crew: Crew) -> None:
        """Give players and objective what a checkpoint holds; the networks were built from it already."""
        from safetensors.torch import load_file

        state = reader.state(checkpoint)
        for name, player in crew.players.items():
            crew.engine.load(player, load_tensors(checkpoint / "training" / name), state["optimizers"][name])
            player.load_counters(state["players"][name])
        path = checkpoint / FAMILY
        crew.objective.load_state_dict(dict(state["objective"]) | (load_file(path) if path.exists() else {}))


@contextmanager
def _told(step: int, root: Path) -> Iterator[None]:
    """Have an OSError say which save it was, and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"the checkpoint of step {step:,} could not be written ({error}); those before it are as they were. "
            f"Make room in {root} and run the same command again."
        ) from error


def _parts(
    module: nn.Module, spec: NetworkSpec, trained: Collection[int], engine: Engine
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a network's state into the tensors that change while it is trained, and the rest: an adapter's base.

    A tensor under two names, as tied weights are, is the same object under both. trained: `id` of trained parameters.
    """
    known = {*trained, *map(id, module.buffers())}
    changing: dict[str, Any] = {}
    fixed: dict[str, Any] = {}
    held: dict[int, torch.Tensor] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if not isinstance(value, torch.Tensor):
            fixed[name] = value
            continue
        changes = spec.adapter is None or id(value) in known
        if id(value) not in held:
            held[id(value)] = engine.whole(value.detach(), value) if changes else value.detach()
        (changing if changes else fixed)[name] = held[id(value)]
    return changing, fixed


def _assets(objective: Objective[Any], network: str) -> dict[str, bytes]:
    """Return the files beside a network's weights. They are asked for once, since they do not change."""
    with tempfile.TemporaryDirectory() as folder:
        objective.save_assets(network, Path(folder))
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
