"""Reflow on two processes, which make pairs in turns, is that on one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.engines import ENGINES, assert_close
from tests.launch import run
from tests.recipes.tiny import overrides

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2"])
def test_two_processes_learn_from_pairs_as_one(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ["objective.condition=label", "evaluate.batch=4", "data.train=noise:150", "checkpoint.every=100 steps"]
    words = ["run", "distill/reflow_gmm", *overrides("distill/reflow_gmm", tmp_path), *small, "--root", tmp_path]
    made = []
    for name, processes in (("one", 1), ("two", 2)):
        cache = tmp_path / f"cache-{name}"
        monkeypatch.setenv("SCALETRAIN_CACHE", str(cache))
        run([*words, "--run", name], processes, variables=ENGINES[engine] if processes > 1 else None)
        made.append({str(p.relative_to(cache)): p.read_bytes() for p in cache.rglob("made.npy")})
    assert len(made[0]) == 4  # three parts to train on, the last shorter, and one that is held out
    assert made[1] == made[0]
    assert_close(tmp_path / "two" / "latest", tmp_path / "one" / "latest", rtol=1e-4, atol=1e-5)
