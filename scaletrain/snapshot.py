"""A stage's whole state, to a checkpoint and back: networks, players, the family's own state, progress.

Saving is two things: taking what is to be written, which the loop waits for, and writing it, which it need not.
"""

from __future__ import annotations

import json
import logging
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

import scaletrain
from scaletrain.checkpoint import reader
from scaletrain.checkpoint.background import Background, HostCopies, Key, Kind
from scaletrain.checkpoint.layout import FAMILY, STATE
from scaletrain.checkpoint.remote import Remote
from scaletrain.checkpoint.tensors import WHOLE, TensorFile, Tensors, save_tensors
from scaletrain.checkpoint.writer import begin, hidden_folder, prune, write
from scaletrain.config import CheckpointSpec, NetworkSpec, Stage
from scaletrain.crew import Crew, Progress
from scaletrain.engine.base import Engine, Part
from scaletrain.engine.world import World
from scaletrain.errors import Interrupted, UserError
from scaletrain.networks.build import own_names, save, save_config
from scaletrain.objectives.base import Objective

T = TypeVar("T")
log = logging.getLogger("scaletrain")


def versions() -> dict[str, str]:
    """Return the versions of what a run depends on, as installed."""
    found = {"python": platform.python_version(), "scaletrain": scaletrain.__version__}
    for package in ("torch", "accelerate", "transformers", "peft", "diffusers", "deepspeed", "bitsandbytes", "torchao"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


_Groups = Mapping[str, Mapping[str, Part]]
"""Tensors by group (`networks/NAME`, `players/NAME`) and their own name."""


class Snapshot:
    """Saves a stage of a run under the run's folder, and restores it. All ranks take part.

    Rank 0 writes; where weights or their state are held in parts, each rank gathers one tensor at a time with the
    others and writes its share of them. stages: the names of all. specs: the stage's networks, completed by what the
    data told. remote: where copies go.
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
        self._background, self._copies, self._shared = Background(), HostCopies(), HostCopies()
        self._beside: World | None = None
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
        if self._reserved or crew.engine.sharded:
            return
        self._reserved = True
        groups, _ = self._groups(crew)
        held = {group: _gathered(parts) for group, parts in groups.items()}
        self._background.start(lambda: self._copies.reserve(held))

    def save(
        self, step: int, stage: Stage, crew: Crew, progress: Progress, best: bool = False, kept: bool = False
    ) -> None:
        """Take everything as it is now; write it as a checkpoint, atomically, and remove old ones, in the background.

        best: the best so far. kept: one that stays. A save that is in flight ends first; its error, and an error of
        this one where it is not asynchronous, is raised as Interrupted, on every rank.
        """
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
        groups, fixed = self._groups(crew)
        shared = self._divide(crew, groups) if crew.engine.sharded else []
        divided = {entry.group for entry in shared}
        values = self._values(crew, progress)
        self.finish()
        if shared:
            with _interrupting():
                self.world.on_main(partial(begin, self.root, step))
        write_share = self._take_share(step, shared)
        whole: dict[str, dict[str, torch.Tensor]] = {}
        for group, parts in groups.items():
            if group not in divided:
                if self.world.main:
                    whole[group] = _gathered(parts)
                else:
                    _attend(parts)
        if crew.engine.lockstep:
            # Libraries ask a module for its state, which reshards it under the feet of a forward pass: not beside one.
            hidden = hidden_folder(self.root, step)
            with _interrupting():
                self.world.on_main(_telling(step, self.root, partial(self._write_networks, crew, whole, fixed, hidden)))
        fill = self._take(crew, whole, fixed, shared, values) if self.world.main else None

        telling = partial(_telling, step, self.root)

        def work() -> None:
            if self._beside is None:
                if fill:
                    telling(partial(self._write, step, write, fill, facts))()
                return
            hidden = hidden_folder(self.root, step)
            try:
                self._beside.agree(telling(write_share))
                self._beside.on_main(partial(_check_shares, hidden, shared))
            except (OSError, UserError):
                if fill:
                    shutil.rmtree(hidden, ignore_errors=True)
                raise
            put = partial(write, begun=True)
            self._beside.on_main(telling(partial(self._write, step, put, fill, facts)) if fill else lambda: None)

        self._background.start(work)
        self._saved = time.monotonic()
        if not self.spec.asynchronous:
            self.finish()

    def finish(self) -> None:
        """Wait for the save in flight. Raises its error as Interrupted, on every rank."""
        with _interrupting():
            self.world.agree(self._background.wait)

    def close(self) -> None:
        """Wait for the save in flight, on this rank alone; its error is told and hides no other."""
        try:
            self._background.wait()
        except Exception as error:
            log.error("the last save failed: %s", error)

    def _networks(self, crew: Crew) -> dict[str, nn.Module]:
        return {name: module for name, module in crew.engine.plain().items() if not self.specs[name].frozen}

    def _groups(self, crew: Crew) -> tuple[dict[str, dict[str, Part]], dict[str, dict[str, Any]]]:
        """Return the tensors of networks and players that change, and the rest of each network's state."""
        trained = {id(p) for player in crew.players.values() for p in player.trainable.values()}
        groups = {f"players/{name}": crew.engine.state(player)[0] for name, player in crew.players.items()}
        fixed: dict[str, dict[str, Any]] = {}
        for name, module in self._networks(crew).items():
            groups[f"networks/{name}"], fixed[name] = _parts(module, self.specs[name], trained, crew.engine)
        return groups, fixed

    def _values(self, crew: Crew, progress: Progress) -> dict[str, Any]:
        """Return what is written as JSON, but for what the family carries."""
        rates = {name: player.optimizer.param_groups[0]["lr"] for name, player in crew.players.items()}
        return {
            "progress": asdict(progress),
            "players": {name: player.counters() | {"lr": rates[name]} for name, player in crew.players.items()},
            "optimizers": {name: crew.engine.state(player)[1] for name, player in crew.players.items()},
        }

    # --- what each rank writes a share of -----------------------------------------------------------------------------

    def _divide(self, crew: Crew, groups: _Groups) -> list[_Divided]:
        """Return the groups that all ranks write: those of players, and of networks that are not adapters."""
        found = []
        for group, parts in groups.items():
            kind, _, name = group.partition("/")
            folder, stem = f"training/{name}", "shard"
            if kind == "networks":
                if self.specs[name].adapter or not own_names(crew.engine.plain()[name], parts):
                    continue
                folder, stem = group, "model"
            found.append(_Divided(group, folder, stem, parts, self.world.size))
        return found

    def _take_share(self, step: int, divided: Sequence[_Divided]) -> Callable[[], None]:
        """Gather tensors with the other ranks and take this rank's. Returns what writes them.

        Where saving is asynchronous they are copied to host memory, otherwise they are written at once.
        """
        if not divided:
            return lambda: None
        if self._beside is None:
            self._beside = self.world.beside()
        hidden, rank = hidden_folder(self.root, step), self.world.rank
        own = {group.group: group.file(rank) for group in divided if rank in group.owners.values()}

        def entries() -> Iterator[tuple[Key, Part, Iterable[torch.Tensor]]]:
            for group in divided:
                for name, owner in group.owners.items():
                    part = group.parts[name]
                    pieces = part.pieces()
                    if owner == rank:
                        yield (group.group, name), part, pieces
                    for _ in pieces:  # with the ranks that take them
                        pass

        def write(taken: Iterable[tuple[Key, Kind, Iterable[torch.Tensor]]]) -> None:
            with ExitStack() as stack:
                files: dict[str, TensorFile] = {}
                for (group, _), _, pieces in taken:
                    if group not in files:
                        path, kinds = own[group]
                        (hidden / path).parent.mkdir(parents=True, exist_ok=True)
                        files[group] = stack.enter_context(TensorFile(hidden / path, kinds))
                    files[group].append(pieces)

        if self.spec.asynchronous:
            copies = self._shared.fill(entries())

            def later() -> None:
                self._shared.wait()
                write((key, tensor, [tensor]) for key, tensor in copies.items())

            return later
        pending = entries()
        try:
            write(pending)
        except OSError as error:
            for _ in pending:  # go on with the other ranks
                pass
            raised = error
            return lambda: _raise(raised)
        return lambda: None

    # --- what rank 0 writes -------------------------------------------------------------------------------------------

    def _write_networks(
        self,
        crew: Crew,
        whole: dict[str, dict[str, torch.Tensor]],
        fixed: Mapping[str, Mapping[str, Any]],
        folder: Path,
    ) -> None:
        """Write the networks that are there whole, and let go of them."""
        for name, module in self._networks(crew).items():
            if f"networks/{name}" in whole:
                state = whole.pop(f"networks/{name}")
                save(module, self.specs[name], folder / "networks" / name, {**fixed[name], **state})

    def _take(
        self,
        crew: Crew,
        whole: dict[str, dict[str, torch.Tensor]],
        fixed: Mapping[str, Mapping[str, Any]],
        divided: Sequence[_Divided],
        values: dict[str, Any],
    ) -> Callable[[Path], None]:
        """Take what rank 0 writes whole. Returns what writes it into a folder."""
        networks = self._networks(crew)
        family = crew.objective.state_dict()
        whole["family"] = {k: v for k, v in family.items() if isinstance(v, torch.Tensor)}
        taken = self._copies.take(whole) if self.spec.asynchronous else whole
        values["objective"] = {k: v for k, v in family.items() if k not in whole["family"]}
        text = json.dumps(values, indent=2) + "\n"
        if not self._assets:
            self._assets = {name: _assets(crew.objective, name) for name in networks}
        indexes = {group.group: group.index() for group in divided if group.stem == "model"}

        def fill(folder: Path) -> None:
            self._copies.wait()
            for name, module in networks.items():
                own = folder / "networks" / name
                if f"networks/{name}" in taken:
                    save(module, self.specs[name], own, {**fixed[name], **taken[f"networks/{name}"]})
                elif f"networks/{name}" in indexes:
                    save_config(module, self.specs[name], own)
                    (own / "model.safetensors.index.json").write_text(indexes[f"networks/{name}"])
                for file, content in self._assets[name].items():
                    path = own / file
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
            for name in crew.players:
                if f"players/{name}" in taken:
                    save_tensors(folder / "training" / name / WHOLE, taken[f"players/{name}"])
                (folder / "training" / name).mkdir(parents=True, exist_ok=True)
            if taken["family"]:
                save_tensors(folder / FAMILY, taken["family"])
            (folder / STATE).write_text(text)

        return fill

    def _write(
        self, step: int, put: Callable[..., Path], fill: Callable[[Path], None], facts: Mapping[str, Any]
    ) -> None:
        """Write what rank 0 does, by `write`, and remove old checkpoints."""
        path = put(self.root, step, fill, facts)
        prune(self.root, self.spec.keep, path, self.remote.in_use if self.remote else ())
        if self.remote:
            self.remote.send()

    def restore(self, checkpoint: Path, crew: Crew) -> None:
        """Give players and objective what a checkpoint holds; the networks were built from it already."""
        state = reader.state(checkpoint)
        for name, player in crew.players.items():
            crew.engine.load(player, Tensors(checkpoint / "training" / name), state["optimizers"][name])
            player.load_counters(state["players"][name])
        crew.objective.load_state_dict(reader.family(checkpoint))


@contextmanager
def _interrupting() -> Iterator[None]:
    """Have an OSError end the run as one that may go on."""
    try:
        yield
    except OSError as error:
        raise Interrupted(str(error)) from error


def _telling(step: int, root: Path, work: Callable[[], T]) -> Callable[[], T]:
    """Return work whose errors say which save it was, before ranks agree on them."""

    def told() -> T:
        with _told(step, root):
            return work()

    return told


@contextmanager
def _told(step: int, root: Path) -> Iterator[None]:
    """Have an OSError, or safetensors' own for a full disk, say which save it was and what to do."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"the checkpoint of step {step:,} could not be written ({error}); those before it are as they were. "
            f"Make room in {root} and run the same command again."
        ) from error


def _parts(
    module: nn.Module, spec: NetworkSpec, trained: Collection[int], engine: Engine
) -> tuple[dict[str, Part], dict[str, Any]]:
    """Split a network's state into the tensors that change while it is trained, and the rest: an adapter's base.

    A tensor under two names, as tied weights are, is the same object under both. trained: `id` of trained parameters.
    """
    known = {*trained, *map(id, module.buffers())}
    changing: dict[str, Part] = {}
    fixed: dict[str, Any] = {}
    held: dict[int, Part] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if not isinstance(value, torch.Tensor):
            fixed[name] = value
        elif spec.adapter is not None and id(value) not in known:
            fixed[name] = value.detach()
        else:
            changing[name] = held.setdefault(id(value), engine.gathered(engine.local(value), value))
    return changing, fixed


def _attend(parts: Mapping[str, Part]) -> None:
    """Take part in the gathering of tensors for another process."""
    for part in {id(part): part for part in parts.values()}.values():
        for _ in part.pieces() if part.held is None else ():
            pass


def _gathered(parts: Mapping[str, Part]) -> dict[str, torch.Tensor]:
    """Gather tensors; one under two names is one."""
    once = {id(part): part.gather() for part in {id(part): part for part in parts.values()}.values()}
    return {name: once[id(part)] for name, part in parts.items()}


def _check_shares(folder: Path, divided: Iterable[_Divided]) -> None:
    """Raise UserError unless the files of all ranks are here."""
    for group in divided:
        for rank in sorted(set(group.owners.values())):
            path = folder / group.file(rank)[0]
            if not path.is_file():
                raise UserError(
                    f"process {rank} has written {path.name}, and it is not in {path.parent}: all processes write "
                    "into one run folder, so --root must be on a disk that all machines share."
                )


class _Divided:
    """A group of tensors that is written in as many files as there are ranks, each tensor whole in one of them.

    folder, stem: where the files stand and how they are called. owners: the rank that writes each tensor.
    """

    def __init__(self, group: str, folder: str, stem: str, parts: Mapping[str, Part], size: int):
        self.group, self.folder, self.stem, self.parts = group, folder, stem, parts
        first = {id(part): name for name, part in reversed(list(parts.items()))}  # a tied weight is written once
        names = [name for name, part in parts.items() if first[id(part)] == name]
        weights = {name: parts[name].shape.numel() * parts[name].dtype.itemsize for name in names}
        total, done = sum(weights.values()) + 1, 0
        self.owners: dict[str, int] = {}
        for name in names:
            self.owners[name] = min(size - 1, (done + weights[name] // 2) * size // total)
            done += weights[name]

    def file(self, rank: int) -> tuple[str, dict[str, tuple[torch.Size, torch.dtype]]]:
        """Return a rank's file, and the kinds of the tensors in it."""
        ranks = sorted(set(self.owners.values()))
        path = f"{self.folder}/{self.stem}-{ranks.index(rank) + 1:05d}-of-{len(ranks):05d}.safetensors"
        kinds = {n: (self.parts[n].shape, self.parts[n].dtype) for n, owner in self.owners.items() if owner == rank}
        return path, kinds

    def index(self) -> str:
        """Return the content of the index that transformers looks tensors up in."""
        kinds = [(part.shape.numel() * part.dtype.itemsize) for part in map(self.parts.__getitem__, self.owners)]
        files = {name: self.file(owner)[0].rpartition("/")[2] for name, owner in self.owners.items()}
        return json.dumps({"metadata": {"total_size": sum(kinds)}, "weight_map": files}, indent=2) + "\n"


def _raise(error: OSError) -> None:
    raise error


def _assets(objective: Objective[Any], network: str) -> dict[str, bytes]:
    """Return the files beside a network's weights. They are asked for once, since they do not change."""
    with tempfile.TemporaryDirectory() as folder:
        objective.save_assets(network, Path(folder))
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
