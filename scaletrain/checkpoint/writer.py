"""Writing a checkpoint so that a folder with its final name is complete, whatever happens while it is written."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from scaletrain.checkpoint.integrity import sealed, sha256, verify
from scaletrain.checkpoint.layout import FORMAT, MANIFEST, checkpoints, number, point, step_folder

log = logging.getLogger("scaletrain")


def write(root: Path, step: int, fill: Callable[[Path], None], facts: Mapping[str, Any], begun: bool = False) -> Path:
    """Write one checkpoint: `fill` writes files into a hidden folder, which is flushed to disk and renamed last.

    facts go into the manifest beside the list of files. begun: that folder is there, with files in it. Raises OSError,
    with nothing but that folder changed, when the disk is full, not writable, or does not give back what was written.
    """
    hidden = hidden_folder(root, step) if begun else begin(root, step)
    try:
        fill(hidden)
        return complete(hidden, step, facts)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise


def begin(root: Path, step: int) -> Path:
    """Make the hidden folder that a checkpoint is written into."""
    hidden = hidden_folder(root, step)
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    return hidden


def hidden_folder(root: Path, step: int) -> Path:
    """Return where the files of a checkpoint stand until it is complete."""
    return root / f".saving-{step_folder(root, step).name}"


def complete(hidden: Path, step: int, facts: Mapping[str, Any]) -> Path:
    """Give a hidden folder its manifest and its name. Raises OSError.

    Every byte is read back from the disk before, so that what has the name was good at least once.
    """
    root, final = hidden.parent, step_folder(hidden.parent, step)
    files = sorted(p for p in hidden.rglob("*") if p.is_file())
    listing = {p.relative_to(hidden).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
    manifest = {"format": FORMAT, "step": step, **facts, "files": listing}
    (hidden / MANIFEST).write_text(json.dumps(sealed(manifest), indent=2) + "\n")
    for path in (*hidden.rglob("*"), hidden):
        _flush(path)
    faults = verify(hidden)
    if faults:
        raise OSError(f"what was written does not read back: {'; '.join(faults)}")
    if final.exists():  # an earlier attempt at this step that did not verify, or a repeated save
        _discard(final)
    os.rename(hidden, final)
    _flush(root)
    point(root / "latest", final.name)
    return final


def _flush(path: Path) -> None:
    """Have a file or folder on the disk, and out of the system's cache where that is known how."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _discard(path: Path) -> None:
    """Remove a checkpoint; first its name, so that one which is half removed is never taken for one."""
    hidden = path.with_name(f".saving-old-{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def set_aside(root: Path, taken: Path | None) -> None:
    """Rename the checkpoints after the one that a run goes on from, which did not verify, to `damaged-step-...`.

    `latest` then points to that one.
    """
    for path in checkpoints(root):
        if taken is None or number(path) > number(taken):
            target = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)
    if taken is not None:
        point(root / "latest", taken.name)


def facts_of(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint, verified or not; nothing when it cannot be read."""
    try:
        content = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}  # damaged: nothing that a reader would take
    return content if isinstance(content, dict) else {}


def superfluous(found: Sequence[tuple[str, Mapping[str, Any]]], keep: int) -> list[str]:
    """Return which of some checkpoints may go; found: names and manifests, oldest first.

    The newest `keep` stay, the newest of those that were the best, the last of each stage, and every n-th (`kept`).
    """
    best = next((name for name, facts in reversed(found) if facts.get("best")), None)
    return [name for name, facts in found[:-keep] if name != best and not (facts.get("complete") or facts.get("kept"))]


def prune(root: Path, keep: int, newest: Path, in_use: Collection[str] = ()) -> None:
    """Have `best` point to the best, and remove old checkpoints by `superfluous`. One that will not go is told.

    newest: the one just written, which is known to be good and stays, as do those whose names are `in_use`.
    """
    found = [(path.name, facts_of(path)) for path in checkpoints(root)]
    best = next((name for name, facts in reversed(found) if facts.get("best")), None)
    if best is not None:
        point(root / "best", best)
    for name in superfluous(found, keep):
        if name != newest.name and name not in in_use:
            try:
                _discard(root / name)
            except OSError as error:
                log.warning("%s could not be removed: %s", root / name, error)
