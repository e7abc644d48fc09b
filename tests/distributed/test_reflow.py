"""Reflow on two processes, which make pairs in turns, is that on one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.ahead import assert_same_work
from tests.distributed.engines import ENGINES
from tests.recipes.tiny import overrides

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2"])
def test_two_processes_learn_from_pairs_as_one(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ["objective.condition=label", "evaluate.batch=4", "data.train=noise:150", "checkpoint.every=100 steps"]
    words = ["run", "distill/reflow_gmm", *overrides("distill/reflow_gmm", tmp_path), *small, "--root", tmp_path]
    assert_same_work(words, "made", ENGINES[engine], tmp_path, monkeypatch)
