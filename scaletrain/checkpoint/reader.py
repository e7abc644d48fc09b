"""Reading checkpoints: nothing is trusted before its bytes are verified, and no pickle is ever read."""

from __future__ import annotations

import json
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

from scaletrain.checkpoint.integrity import verify
from scaletrain.checkpoint.layout import FAMILY, FORMAT, MANIFEST, STATE, checkpoints
from scaletrain.errors import UserError

log = logging.getLogger("scaletrain")


def manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a verified checkpoint. Raises UserError for a format of another version."""
    content: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    if content["format"] != FORMAT:
        raise UserError(f"{folder}: checkpoint format {content['format']}; this version reads format {FORMAT}.")
    return content


def newest(root: Path) -> Path | None:
    """Return the newest checkpoint that verifies, and say which ones were passed over; None when there is none at all.

    Raises UserError when there are checkpoints and every one is damaged.
    """
    found = checkpoints(root)
    faults: list[str] = []
    for path in reversed(found):
        faults = verify(path)
        if not faults:
            return path
        log.warning("%s is damaged and is passed over: %s", path, "; ".join(faults))
    if found:
        raise UserError(
            f"No checkpoint in {root} verifies ({found[0].name}: {'; '.join(faults)}). "
            "Start anew in another folder with --run NAME."
        )
    return None


def stage_end(root: Path, stage: str) -> Path | None:
    """Return the checkpoint in which a stage of a run ended, if it has. Raises UserError when that one is damaged."""
    for path in reversed(checkpoints(root)):
        try:
            facts = manifest(path)
        except (OSError, ValueError, KeyError):
            continue  # not the end of a stage that anyone could read
        if facts["stage"] == stage and facts["complete"]:
            faults = _verified(path, (path / MANIFEST).stat().st_mtime_ns)
            if faults:
                raise UserError(f"{path}, in which stage `{stage}` ended, is damaged: {'; '.join(faults)}")
            return path
    return None


@lru_cache(maxsize=256)
def _verified(path: Path, written: int) -> tuple[str, ...]:
    """Verify a checkpoint once in the life of a process."""
    return tuple(verify(path))


def state(folder: Path) -> dict[str, Any]:
    """Return the counters and progress of a checkpoint."""
    content: dict[str, Any] = json.loads((folder / STATE).read_text())
    return content


def family(folder: Path) -> dict[str, Any]:
    """Return what the objective carries from step to step."""
    from safetensors.torch import load_file

    path = folder / FAMILY
    return dict(state(folder)["objective"]) | (load_file(path) if path.exists() else {})


def average(folder: Path, network: str) -> dict[str, Any]:
    """Return a network's EMA parameters by name, from whichever player keeps one; empty when none does."""
    from scaletrain.checkpoint.tensors import stored

    prefix = f"ema/{network}/"
    for path in sorted((folder / "training").iterdir()):
        entries = stored(path) if path.is_dir() else {}
        found = {name: entry for name, entry in entries.items() if name.startswith(prefix)}
        if found:
            return {name.removeprefix(prefix): entry.whole() for name, entry in found.items()}
    return {}
