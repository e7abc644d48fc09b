"""Writing a checkpoint so that a folder with its final name is complete, whatever happens while it is written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from scaletrain.checkpoint.layout import FORMAT, MANIFEST, checkpoints, number, point, step_folder


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write(root: Path, step: int, fill: Callable[[Path], None], facts: Mapping[str, Any]) -> Path:
    """Write one checkpoint: `fill` writes files into a hidden folder, which is flushed to disk and renamed last.

    facts go into the manifest beside the list of files. Raises OSError, with nothing but the hidden folder changed,
    when the disk is full or not writable.
    """
    final = step_folder(root, step)
    hidden = root / f".saving-{final.name}"
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    try:
        fill(hidden)
        files = sorted(p for p in hidden.rglob("*") if p.is_file())
        listing = {p.relative_to(hidden).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
        manifest = {"format": FORMAT, "step": step, **facts, "files": listing}
        (hidden / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        for path in (*hidden.rglob("*"), hidden):
            _flush(path)
        if final.exists():  # an earlier attempt at this step that did not verify, or a repeated save
            shutil.rmtree(final)
        os.rename(hidden, final)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    _flush(root)
    point(root / "latest", final.name)
    return final


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def set_aside(root: Path, taken: Path | None) -> None:
    """Rename the checkpoints after the one that a run goes on from, which did not verify, to `damaged-step-...`."""
    for path in checkpoints(root):
        if taken is None or number(path) > number(taken):
            target = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)


def prune(root: Path, keep: int, newest: Path) -> None:
    """Remove old checkpoints: the newest `keep`, the one just written, the last of each stage and the best stay."""
    best = (root / "best").resolve()
    for path in checkpoints(root)[:-keep]:
        if path.resolve() in (best, newest.resolve()):
            continue
        try:
            if json.loads((path / MANIFEST).read_text())["complete"]:
                continue
        except (OSError, ValueError, KeyError):
            pass  # damaged: nothing that a reader would take
        shutil.rmtree(path)
