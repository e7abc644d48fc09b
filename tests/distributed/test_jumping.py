"""Students that call themselves for their targets, and differentiate forward, on two processes as on one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.engines import ENGINES, assert_close
from tests.launch import metrics, run
from tests.recipes.tiny import overrides

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize("method", ["ctm", "shortcut", "meanflow"])
def test_two_processes_jump_as_one(method: str, tmp_path: Path) -> None:
    own = ["train.duration=6 steps", "players.student.optimizer={type: sgd, lr: 0.05}", "checkpoint.every=6 steps"]
    name = f"distill/{method}_gmm"
    words = ["run", name, *overrides(name, tmp_path), *own, "--root", tmp_path]
    run([*words, "--run", "one"], 1)
    for engine in ("ddp", "fsdp2", "zero2"):
        run([*words, "--run", engine], 2, variables=ENGINES[engine])
        losses = [[r["loss"] for r in metrics(tmp_path / n) if r["kind"] == "train"] for n in ("one", engine)]
        assert len(losses[0]) == 6
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
        if engine != "zero2":
            assert_close(tmp_path / engine / "latest", tmp_path / "one" / "latest", rtol=1e-4, atol=1e-6)
