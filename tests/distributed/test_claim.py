"""Two starts of one run: the second is refused while the first lives, and goes on when it is gone."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.launch import run, start, steps

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_a_folder_is_trained_in_by_one_run_at_a_time(tmp_path: Path) -> None:
    words = ["run", "vision/cnn", "data.train.rows=200", "train.duration=30 steps", "train.global_batch=8"]
    words += ["log.every=1", "checkpoint.every=2 steps", "data.workers=1", "--root", tmp_path, "--run", "r"]
    first = start(words)
    first.wait(lambda: max(steps(tmp_path / "r"), default=0) >= 3)
    assert first.ranks[0].pid is not None
    os.kill(first.ranks[0].pid, signal.SIGSTOP)
    codes, printed = start(words).finish()
    assert codes == [2], printed
    assert f"PID {first.ranks[0].pid}" in printed
    assert "is training in" in printed
    first.ranks[0].kill()  # its data workers may live on for a moment
    run(words)
    assert steps(tmp_path / "r") == list(range(1, 31))
