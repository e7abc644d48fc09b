"""Whether a checkpoint's bytes are those that its manifest lists, and are of a kind that executes nothing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from scaletrain.checkpoint.layout import MANIFEST

_PICKLES = frozenset((".bin", ".ckpt", ".dill", ".distcp", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"))
"""Endings under which libraries keep pickles; `.metadata` is torch.distributed.checkpoint's."""


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify(folder: Path) -> list[str]:
    """Check a checkpoint against its manifest. Returns what is wrong, one line each; nothing when it is whole.

    A pickle is a fault even where the manifest lists it: whoever can put one there can list it too.
    """
    try:
        files: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return [f"{MANIFEST}: missing"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{MANIFEST}: cannot be read ({error})"]
    faults = []
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{name}: missing")
        elif is_pickle(path):
            faults.append(f"{name}: a pickle, which can run code when it is read, and is never part of a checkpoint")
        elif path.stat().st_size != expected["bytes"]:
            faults.append(f"{name}: {path.stat().st_size} bytes instead of {expected['bytes']}")
        elif sha256(path) != expected["sha256"]:
            faults.append(f"{name}: its bytes changed (SHA-256 differs)")
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    faults += [f"{name}: not in the manifest" for name in sorted(present - set(files) - {MANIFEST})]
    return faults


def is_pickle(path: Path) -> bool:
    """Say whether a file is a pickle, or an archive that may hold one, by its name or by its first bytes."""
    if path.name == ".metadata" or path.suffix.lower() in _PICKLES:
        return True
    with path.open("rb") as file:
        head = file.read(9)
    if path.suffix == ".safetensors":  # the length of a JSON object in 8 bytes, then the object
        return len(head) == 9 and head[8:] != b"{"
    return head[:1] == b"\x80" or head[:4] == b"PK\x03\x04"
