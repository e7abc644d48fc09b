"""Prepared data that is kept between runs, by content, and shared by the processes of one run."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scaletrain.errors import UserError


def cache_root() -> Path:
    """Return the folder of the cache: `SCALETRAIN_CACHE`, or `~/.cache/scaletrain`."""
    return Path(os.environ.get("SCALETRAIN_CACHE") or Path.home() / ".cache" / "scaletrain")


def content_key(*parts: object) -> str:
    """Return a name for the content that these parts determine. Their `repr` must not depend on the process."""
    return hashlib.sha256("\0".join(map(repr, parts)).encode()).hexdigest()[:32]


def cached(kind: str, key: str, write: Callable[[Path], None]) -> Path:
    """Return the folder `<cache>/<kind>/<key>`; where there is none, let `write` fill it first.

    A folder with its final name is complete: it is filled under another name, flushed to disk and renamed. Processes
    that ask for the same folder at once wait for the first one. Raises UserError when the cache cannot be written.
    """
    folder = cache_root() / kind / key
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _fill(folder, write)
    except OSError as error:
        raise UserError(f"the cache cannot be written: {error}. Set SCALETRAIN_CACHE to another folder.") from error
    return folder


def mapped(path: str | Path, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Map a file of numbers, (n,), for reading: its pages are the system's, and take no memory of the process."""
    if not os.path.getsize(path):
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, "r"))  # the class itself makes every index and slice slow


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes, and between threads, where the file system has locks."""
    from filelock import FileLock

    with contextlib.ExitStack() as held:
        # Some cluster file systems have no locks: there, each process does the work itself.
        with contextlib.suppress(NotImplementedError):
            held.enter_context(FileLock(path))
        yield


def _fill(folder: Path, write: Callable[[Path], None]) -> None:
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write(partial)
        for file in partial.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        partial.chmod(0o755)  # mkdtemp hides it from the other users of a shared cache
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first, with the same content
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
