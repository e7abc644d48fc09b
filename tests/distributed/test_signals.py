"""SIGTERM to one of two ranks: both save the same step and exit 3; the run goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from scaletrain.checkpoint import layout, reader
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


SLOW = """
import os, time
from scaletrain.objectives.gan import Config, Objective
flush = os.fsync
def fsync(descriptor):
    time.sleep(0.05)
    flush(descriptor)
os.fsync = fsync
"""


def test_a_signal_to_one_rank_while_a_checkpoint_is_being_written(tmp_path: Path) -> None:
    """Both ranks save the same step after the one in flight, and exit 3."""
    (tmp_path / "slow.py").write_text(SLOW)
    command = ["run", "gan/dcgan", *overrides("gan/dcgan", tmp_path), "checkpoint.every=20 steps", "checkpoint.keep=9"]
    command += ["train.duration=60 steps", "--root", tmp_path]
    run([*command, "--run", "whole"], 2)
    folder = tmp_path / "parts"
    started = start([*command, "--run", "parts", "--code", tmp_path / "slow.py"], 2)
    started.wait(lambda: any(folder.glob(".saving-step-00000020")))
    pid = started.ranks[1].pid
    assert pid is not None
    os.kill(pid, signal.SIGTERM)
    codes, text = started.finish()
    assert codes == [3, 3], text
    found = [layout.number(checkpoint) for checkpoint in layout.checkpoints(folder)]
    assert found[0] == 20
    assert len(found) == 2
    assert found[1] == max(steps(folder)) < 60
    run([*command, "--run", "parts"], 2)
    assert final_weights(folder) == final_weights(tmp_path / "whole")
    assert steps(folder) == steps(tmp_path / "whole")
