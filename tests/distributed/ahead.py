"""Work before the training, by one process and by two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.distributed.engines import assert_close
from tests.launch import run


def assert_same_work(
    words: Sequence[object], array: str, engine: Mapping[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run a command on one process and on two of an engine, each with a cache of its own, and compare what they keep of
    this name, byte by byte, and the weights.
    """
    made = []
    for name, processes in (("one", 1), ("two", 2)):
        cache = folder / f"cache-{name}"
        monkeypatch.setenv("SCALETRAIN_CACHE", str(cache))
        run([*words, "--run", name], processes, variables=engine if processes > 1 else None)
        made.append({str(p.relative_to(cache)): p.read_bytes() for p in cache.rglob(f"{array}.npy")})
    assert len(made[0]) == 4  # three parts to train on, the last shorter, and one that is held out
    assert made[1] == made[0]
    assert_close(folder / "two" / "latest", folder / "one" / "latest", rtol=1e-4, atol=1e-5)
