"""Where everything stands in a run folder.

recipe.yaml  metrics.jsonl  summary.json  samples/
step-00001000/
  manifest.json             facts, every file with bytes and SHA-256, and a SHA-256 of itself
  networks/<name>/          weights of each trained network in its library's layout
  training/<player>/        optimiser state and EMA, by `kind/network/parameter`: see `scaletrain.checkpoint.tensors`
  training/objective.safetensors  what the family carries, where it does
  training/state.json       counters, schedules, scalers, progress
latest -> step-00001000     best -> step-00000800
.saving-...                 is being written, fetched or removed, or was when the run was killed
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

FORMAT = 3
MANIFEST = "manifest.json"
RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
STATE = "training/state.json"
FAMILY = "training/objective.safetensors"
log = logging.getLogger("scaletrain")
_STEP = re.compile(r"step-(\d{8,})")


def step_folder(root: Path, step: int) -> Path:
    """Return where the checkpoint of a step stands."""
    return root / f"step-{step:08d}"


def checkpoints(root: Path) -> list[Path]:
    """Return the finished checkpoints, oldest first."""
    found = [(int(m.group(1)), p) for p in root.glob("step-*") if (m := _STEP.fullmatch(p.name)) and p.is_dir()]
    return [p for _, p in sorted(found)]


def is_step(name: str) -> bool:
    """Say whether this is the name of a checkpoint's folder."""
    return _STEP.fullmatch(name) is not None


def number(path: Path) -> int:
    """Return the step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def point(link: Path, target: str) -> None:
    """Make a symbolic link point to `target`, atomically.

    Links are for people, and some file systems have none: that one cannot be made is told, and no error.
    """
    temporary = link.with_name(f".{link.name}.new")
    try:
        temporary.unlink(missing_ok=True)
        os.symlink(target, temporary)
        os.replace(temporary, link)
    except OSError as error:
        log.warning("%s could not be made to point to %s: %s", link, target, error)
