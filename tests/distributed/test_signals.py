"""SIGTERM to one of two ranks: both save the same step and exit 3; the run goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
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
    started.wait(lambda: max(steps(tmp_path / "parts"), default=0) >= 5)
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


def test_a_signal_to_the_whole_group_leaves_workers_to_the_loop(tmp_path: Path) -> None:
    """As launchers do it: SIGTERM to the process group, data workers included."""
    command = ["run", "vision/cnn", *overrides("vision/cnn", tmp_path), "data.workers=2", "train.duration=2000 steps"]
    command += ["checkpoint.every=100000 steps", "evaluate.every=100000 steps", "--root", tmp_path, "--run", "r"]
    started = start(command, own_group=True)
    started.wait(lambda: max(steps(tmp_path / "r"), default=0) >= 5)
    assert started.ranks[0].pid is not None
    os.killpg(started.ranks[0].pid, signal.SIGTERM)
    codes, text = started.finish(60)
    assert codes == [3], text
    assert reader.newest(tmp_path / "r") is not None
