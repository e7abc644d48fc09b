"""A disk that fills up and a process that dies while a checkpoint is written: the one before is whole, and is used."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from scaletrain.checkpoint import integrity
from scaletrain.checkpoint.layout import checkpoints, number
from tests.launch import run, start, steps
from tests.recipes.test_recipes import final_weights
from tests.recipes.tiny import overrides

pytestmark = pytest.mark.slow

DIES = """
import os, signal
from scaletrain.objectives.gan import Config, Objective
flush, calls = os.fsync, []
def fsync(descriptor):
    calls.append(descriptor)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    flush(descriptor)
os.fsync = fsync
"""

LIMITED = """
import os, resource
from scaletrain.objectives.gan import Config, Objective
rename = os.rename
def and_then(source, target):
    rename(source, target)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, 16_384))  # the metrics fit, the weights do not
os.rename = and_then
"""


def command(root: Path) -> list[object]:
    """A run of two players that saves at steps 4, 8 and 12."""
    change = ["train.duration=12 steps", "evaluate.every=12 steps", "players.generator.ema={decay: 0.9}"]
    return ["run", "gan/dcgan", *overrides("gan/dcgan", root), *change, "--run", "r", "--root", root]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    run(command(root))
    return root / "r"


def goes_on(root: Path, whole: Path) -> None:
    """Check that what stands there is whole, and that the same command ends as the run that nothing happened to."""
    for checkpoint in checkpoints(root / "r"):
        assert integrity.verify(checkpoint) == []
    run(command(root))
    assert final_weights(root / "r") == final_weights(whole)
    assert steps(root / "r") == steps(whole)
    assert not list((root / "r").glob(".saving-*"))


def flushes(whole: Path) -> int:
    """Return how often a save flushes something: each file and folder, and the run's folder."""
    return len(list((whole / "step-00000012").rglob("*"))) + 2


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_killed_inside_a_save(share: float, whole: Path, tmp_path: Path) -> None:
    """At the first flush of the second save, in the midst of it, and when it has its name but `latest` lags behind."""
    each = flushes(whole)
    (tmp_path / "dies.py").write_text(DIES.format(call=each + 1 + round(share * (each - 1))))
    codes, text = start([*command(tmp_path), "--code", tmp_path / "dies.py"]).finish()
    assert codes == [-9], text
    assert [number(c) for c in checkpoints(tmp_path / "r")] == ([4] if share < 1 else [4, 8])
    goes_on(tmp_path, whole)


def test_a_limit_to_the_size_of_files(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "limited.py").write_text(LIMITED)
    codes, text = start([*command(tmp_path), "--code", tmp_path / "limited.py"]).finish()
    assert codes == [3], text
    assert "interrupted: the checkpoint of step 8 could not be written" in text
    assert "File too large" in text
    assert [number(c) for c in checkpoints(tmp_path / "r")] == [4]
    goes_on(tmp_path, whole)


@pytest.fixture
def small_disk(tmp_path: Path, whole: Path) -> Iterator[Path]:
    """A disk with room for two checkpoints and a half."""
    size = sum(p.stat().st_size for p in (whole / "step-00000012").rglob("*"))
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(2.5 * size)}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(whole: Path, small_disk: Path) -> None:
    codes, text = start([*command(small_disk), "checkpoint.keep=3"]).finish()
    assert codes == [3], text
    assert "interrupted: the checkpoint of step 12 could not be written" in text
    assert "No space left" in text
    assert "Make room in" in text
    assert [number(c) for c in checkpoints(small_disk / "r")] == [4, 8]
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    goes_on(small_disk, whole)
