"""Weights in the ecosystem's own layout, proved equal to what was trained before they are called exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import nn

from scaletrain.checkpoint import reader
from scaletrain.checkpoint.layout import RECIPE
from scaletrain.config import NetworkSpec
from scaletrain.errors import UserError
from scaletrain.finished import FinishedStage
from scaletrain.networks.build import base_of, build, own_base, save
from scaletrain.shelf import Shelf


def export_run(folder: Path, destination: Path) -> list[Path]:
    """Write every trained network of the newest checkpoint, averaged where an average is kept, to `destination/NAME`.

    transformers, diffusers and peft load the folders as they are; each is loaded back and compared, tensor by tensor,
    before it gets its name. Raises UserError when the destination is not empty, RuntimeError when a tensor differs.
    """
    run = FinishedStage.open(folder)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{destination} is a file, or not empty: choose a new folder.")
    run.restore()
    shelf, written = Shelf(folder), []
    specs = {k: NetworkSpec.model_validate(v) for k, v in reader.manifest(run.checkpoint)["networks"].items()}
    for name, spec in specs.items():
        if spec.frozen:
            continue
        unproved = destination / f".unproved-{name}"
        try:
            module = shelf.open(run.checkpoint, name)
            save(module, spec, unproved)
            run.objective.save_assets(name, unproved)
            base = shelf.base(spec) if spec.adapter else None
            origin = shelf.spec(spec.source) if spec.source else spec
            home = spec  # where the adapter that is gone on with was begun
            while home.source and shelf.spec(home.source).adapter:
                home = shelf.spec(home.source)
            if own_base(name, home):
                base, origin = base_of(name, home), home
            if base is not None and not hasattr(base, "peft_config"):
                written.append(_export_base(base, origin, unproved, destination / f"{name}-base"))
            _compare(name, module, build(name, spec, base, unproved))
        except BaseException:
            shutil.rmtree(unproved, ignore_errors=True)
            raise
        unproved.rename(destination / name)
        written.append(destination / name)
    shutil.copy(folder / RECIPE, destination / RECIPE)
    return written


def _export_base(base: nn.Module, spec: NetworkSpec, adapter: Path, folder: Path) -> Path:
    """Write the network that an adapter was trained over, averaged as it was, and have the adapter's folder name it.

    The run that it came from may remove its checkpoints, and holds weights that are not averaged.
    """
    save(base, spec, folder)
    path = adapter / "adapter_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(folder.resolve())}, indent=2)
    )
    return folder


def _compare(name: str, trained: nn.Module, loaded: nn.Module) -> None:
    """Raise RuntimeError unless both networks hold the same tensors, bit for bit, and none is empty."""
    # What peft put aside for a module that is trained whole is never used, and drawn anew at each load.
    first, second = (
        {k: v for k, v in module.state_dict().items() if ".original_module." not in k} for module in (trained, loaded)
    )
    if first.keys() != second.keys():
        raise RuntimeError(f"export of {name}: tensors lost or gained: {sorted(first.keys() ^ second.keys())[:8]}")
    for key, value in first.items():
        if value.numel() == 0 or not torch.equal(value, second[key]):
            raise RuntimeError(f"export of {name}: `{key}` is empty or differs after loading it back")
