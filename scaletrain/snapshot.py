"""A stage's whole state, to a checkpoint and back: networks, players, the family's own state, progress."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import scaletrain
from scaletrain.checkpoint import reader
from scaletrain.checkpoint.layout import STATE, point
from scaletrain.checkpoint.writer import prune, write
from scaletrain.config import NetworkSpec, Stage
from scaletrain.crew import Crew, Progress
from scaletrain.engine.world import World
from scaletrain.errors import Interrupted
from scaletrain.networks.build import save


def versions() -> dict[str, str]:
    """Return the versions of what a run depends on, as installed."""
    found = {"python": platform.python_version(), "scaletrain": scaletrain.__version__}
    for package in ("torch", "accelerate", "transformers", "peft", "diffusers", "deepspeed", "bitsandbytes"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class Snapshot:
    """Saves a stage of a run under the run's folder, and restores it. Rank 0 writes; all ranks take part.

    stages: the names of all. specs: the stage's networks, completed by what the data told.
    """

    def __init__(self, root: Path, stages: tuple[str, ...], specs: Mapping[str, NetworkSpec], world: World):
        self.root, self.stages, self.specs, self.world = root, stages, specs, world

    def save(self, step: int, stage: Stage, crew: Crew, progress: Progress, best: bool) -> None:
        """Write a checkpoint, atomically, then remove old ones. Raises Interrupted when the disk refuses."""
        states = {name: crew.engine.state(player) for name, player in crew.players.items()}
        facts = {
            "stage": stage.name,
            "stage_step": progress.step,
            "complete": progress.complete,
            "engine": crew.engine.name,
            "world_size": self.world.size,
            "versions": versions(),
            "networks": {name: spec.model_dump(mode="json", by_alias=True) for name, spec in self.specs.items()},
        }

        def fill(folder: Path) -> None:
            for name, module in crew.engine.plain().items():
                if not self.specs[name].frozen:
                    save(module, self.specs[name], folder / "networks" / name)
                    crew.objective.save_assets(name, folder / "networks" / name)
            (folder / "training").mkdir()
            values = {name: value for name, (_, value) in states.items()}
            for name, (tensors, _) in states.items():
                _save_tensors(folder / "training" / f"{name}.safetensors", tensors)
            family = crew.objective.state_dict()
            tensors = {k: v for k, v in family.items() if isinstance(v, torch.Tensor)}
            if tensors:
                _save_tensors(folder / "training" / "objective.safetensors", tensors)
            state = {
                "progress": asdict(progress),
                "players": {name: player.counters() for name, player in crew.players.items()},
                "optimizers": values,
                "objective": {k: v for k, v in family.items() if k not in tensors},
            }
            (folder / STATE).write_text(json.dumps(state, indent=2) + "\n")

        from safetensors import SafetensorError

        def work() -> None:
            try:
                path = write(self.root, step, fill, facts)
            except SafetensorError as error:  # a full disk, most often
                raise OSError(str(error)) from error
            if best:
                point(self.root / "best", path.name)
            prune(self.root, stage.recipe.checkpoint.keep, path)

        try:
            self.world.on_main(work)
        except OSError as error:
            raise Interrupted(
                f"the checkpoint of step {step:,} could not be written ({error}); those before it are as they were. "
                f"Make room in {self.root} and run the same command again."
            ) from error

    def restore(self, checkpoint: Path, crew: Crew) -> None:
        """Give players and objective what a checkpoint holds; the networks were built from it already."""
        state = reader.state(checkpoint)
        for name, player in crew.players.items():
            tensors = _load_tensors(checkpoint / "training" / f"{name}.safetensors")
            crew.engine.load(player, tensors, state["optimizers"][name])
            player.load_counters(state["players"][name])
        family: dict[str, Any] = dict(state["objective"])
        path = checkpoint / "training" / "objective.safetensors"
        crew.objective.load_state_dict(family | (_load_tensors(path) if path.exists() else {}))


def _save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path)


def _load_tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = load_file(path)
    return tensors
