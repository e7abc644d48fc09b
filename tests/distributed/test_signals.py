"""SIGTERM to one of two ranks: both save the same step and exit 3; the run goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from scaletrain.checkpoint import reader
from tests.launch import run, start, steps
from tests.recipes.test_recipes import final_weights
from tests.recipes.tiny import overrides

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.mark.parametrize(("processes", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_saves_and_exits_3(processes: int, number: int, tmp_path: Path) -> None:
    command = ["run", "gan/dcgan", *overrides("gan/dcgan", tmp_path), "checkpoint.every=1000 steps"]
    command += ["train.duration=60 steps", "--root", tmp_path]
    run([*command, "--run", "whole"], processes)
    started = start([*command, "--run", "parts"], processes)
    while max(steps(tmp_path / "parts"), default=0) < 5:
        time.sleep(0.002)
    pid = started.ranks[-1].pid
    assert pid is not None
    os.kill(pid, number)
    codes, text = started.finish()
    assert codes == [3] * processes, text
    assert text.count("run the same command again") == 1
    saved = reader.newest(tmp_path / "parts")
    assert saved is not None
    assert not reader.manifest(saved)["complete"]
    assert reader.manifest(saved)["step"] == max(steps(tmp_path / "parts"))
    run([*command, "--run", "parts"], processes)
    assert final_weights(tmp_path / "parts") == final_weights(tmp_path / "whole")
    assert steps(tmp_path / "parts") == steps(tmp_path / "whole")
