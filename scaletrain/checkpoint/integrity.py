"""Whether a checkpoint's bytes are those that its manifest lists, and are of a kind that executes nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaletrain.checkpoint.layout import FORMAT, MANIFEST

_PICKLES = frozenset((".bin", ".ckpt", ".dill", ".distcp", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"))
"""Endings under which libraries keep pickles; `.metadata` is torch.distributed.checkpoint's."""


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest with the SHA-256 of its own values, so that a change of any of them shows."""
    content: dict[str, Any] = json.loads(json.dumps({key: manifest[key] for key in manifest if key != "sha256"}))
    return {**content, "sha256": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def verify(folder: Path) -> list[str]:
    """Check a checkpoint against its manifest. Returns what is wrong, one line each; nothing when it is whole.

    A pickle is a fault even where the manifest lists it: whoever can put one there can list it too.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text())
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in content["files"].items()}
        # Earlier formats have no seal; that they are not read any more is for the reader to say.
        changed = (content["format"] == FORMAT or "sha256" in content) and content != sealed(content)
    except FileNotFoundError:
        return [f"{MANIFEST}: missing"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST}: cannot be read ({type(error).__name__}: {error})"]
    if changed:
        return [f"{MANIFEST}: its content changed (SHA-256 differs)"]
    faults = []
    for name, (size, digest) in files.items():
        try:
            fault = _fault(folder / name, size, digest)
        except OSError as error:  # a bad sector, most often
            fault = f"cannot be read ({error.strerror or error})"
        faults += [f"{name}: {fault}"] if fault else []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            faults.append(f"{name}: a link, and no file of this checkpoint")
        elif path.is_file() and name not in (*files, MANIFEST):
            faults.append(f"{name}: not in the manifest")
    return faults


def _fault(path: Path, size: int, digest: str) -> str | None:
    """Say what is wrong with one file."""
    if not path.is_file():
        return "missing"
    if is_pickle(path):
        return "a pickle, which can run code when it is read, and is never part of a checkpoint"
    if path.stat().st_size != size:
        return f"{path.stat().st_size} bytes instead of {size}"
    return None if sha256(path) == digest else "its bytes changed (SHA-256 differs)"


def is_pickle(path: Path) -> bool:
    """Say whether a file is a pickle, or an archive that may hold one, by its name or by its first bytes."""
    if path.name == ".metadata" or path.suffix.lower() in _PICKLES:
        return True
    with path.open("rb") as file:
        head = file.read(9)
    if path.suffix == ".safetensors":  # the length of a JSON object in 8 bytes, then the object
        return len(head) == 9 and head[8:] != b"{"
    return head[:1] == b"\x80" or head[:4] == b"PK\x03\x04"
