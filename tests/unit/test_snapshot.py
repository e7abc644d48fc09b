"""A small run of two players with an average: what its checkpoints hold, and what becomes of a damaged one."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from scaletrain.callbacks.base import Observer
from scaletrain.checkpoint import reader, writer
from scaletrain.checkpoint.layout import checkpoints
from scaletrain.cli import app
from scaletrain.errors import Interrupted
from scaletrain.recipe import load
from scaletrain.runs import train
from tests.recipes.tiny import overrides

FILES = [
    "manifest.json",
    "networks/critic/config.json",
    "networks/critic/model.safetensors",
    "networks/generator/config.json",
    "networks/generator/model.safetensors",
    "training/critic/shard-00001-of-00001.safetensors",
    "training/generator/shard-00001-of-00001.safetensors",
    "training/state.json",
]


def run(root: Path, *changes: str, observers: Any = None, fresh: bool = False) -> Path:
    """Train the run, or go on with it: 12 steps, saved after 4, 8 and 12."""
    given = [*overrides("gan/dcgan", root), "train.duration=12 steps", "evaluate.every=12 steps"]
    given += ["players.generator.ema={decay: 0.9}", "data.train.rows=40", *changes]
    return train(load("gan/dcgan", given), "r", root, fresh, [] if observers is None else observers)


def contents(checkpoint: Path) -> dict[str, bytes]:
    return {p.relative_to(checkpoint).as_posix(): p.read_bytes() for p in checkpoint.rglob("*") if p.is_file()}


def final(root: Path) -> dict[str, bytes]:
    return contents(root / "r" / "step-00000012")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    run(root)
    return root


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    caplog.set_level(logging.INFO, "scaletrain")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


def test_what_a_checkpoint_holds(whole: Path) -> None:
    folder = whole / "r" / "step-00000012"
    assert sorted(final(whole)) == FILES
    facts = reader.manifest(folder)
    assert facts["complete"]
    assert facts["stage_step"] == 12
    assert set(facts["files"]) == {*FILES} - {"manifest.json"}
    assert reader.state(folder)["players"]["critic"]["updates"] == 12
    weights = load_file(folder / "networks" / "generator" / "model.safetensors")
    average = reader.average(folder, "generator")
    assert average.keys() <= weights.keys()
    assert any(not torch.equal(average[k], weights[k]) for k in average)
    assert reader.average(folder, "critic") == {}


def test_asynchronous_and_synchronous_checkpoints_are_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    run(tmp_path, "checkpoint.asynchronous=false")
    assert [p.name for p in checkpoints(tmp_path / "r")] == ["step-00000008", "step-00000012"]
    for step in ("step-00000008", "step-00000012"):
        assert contents(tmp_path / "r" / step) == contents(whole / "r" / step)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_the_run_goes_on_from_the_one_before(
    name: str, damage: str, whole: Path, tmp_path: Path, messages: Callable[[], str]
) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True, symlinks=True)
    file = tmp_path / "r" / "step-00000012" / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()
    checked = CliRunner().invoke(app, ["verify", str(tmp_path / "r")])
    assert checked.exit_code == 1
    assert "step-00000008: ok" in checked.output
    assert f"step-00000012: DAMAGED\n  {name}: " in checked.output
    run(tmp_path)
    assert f"step-00000012 is damaged and is passed over: {name}" in messages()
    assert (tmp_path / "r" / "damaged-step-00000012").is_dir()
    assert final(tmp_path) == final(whole)


class Slow:
    """Stands in for `write`: waits first, so that the loop meets a save in flight."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0, fail_at: int = 0):
        self.seconds, self.fail_at, self.began = seconds, fail_at, []
        self.write = writer.write
        monkeypatch.setattr("scaletrain.snapshot.write", self)

    def __call__(self, root: Path, step: int, fill: Callable[[Path], None], facts: dict[str, Any]) -> Path:
        self.began.append(step)
        time.sleep(self.seconds)
        if step == self.fail_at:
            raise OSError(28, "No space left on device")
        return self.write(root, step, fill, facts)


def test_what_is_written_late_is_what_was_taken(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop trains on while the save of step 8 sleeps."""
    Slow(monkeypatch, seconds=0.3)
    run(tmp_path)
    assert final(tmp_path) == final(whole)  # the end waited for the last one
    assert contents(tmp_path / "r" / "step-00000008") == contents(whole / "r" / "step-00000008")


@pytest.fixture
def steps_taken() -> tuple[list[int], Any]:
    from scaletrain.callbacks.base import Observer

    class Steps(Observer):
        def step(self, step: int, record: Any) -> None:
            taken.append(step)

    taken: list[int] = []
    return taken, Steps()


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_failed_save_stops_the_run_and_the_same_command_goes_on(
    asynchronous: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps_taken: tuple[list[int], Any]
) -> None:
    taken, observer = steps_taken
    with monkeypatch.context() as patch:
        Slow(patch, fail_at=8)
        expected = r"checkpoint of step 8 could not be written \(.*No space.*Make room in .*same command again"
        with pytest.raises(Interrupted, match=expected):
            run(tmp_path, f"checkpoint.asynchronous={asynchronous}", observers=[observer])
    assert taken[-1] in ((8, 9, 10, 11) if asynchronous == "true" else (8,))  # not at the end: as soon as it is known
    assert [p.name for p in checkpoints(tmp_path / "r")] == ["step-00000004"]
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["status"] == "interrupted"
    run(tmp_path)
    assert final(tmp_path) == final(whole)


def test_a_failed_save_hides_no_other_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: Callable[[], str]
) -> None:
    told = threading.Event()

    def broken(*_: Any) -> Path:
        assert told.wait(20)
        raise RuntimeError("tensors share memory")

    class Fails(Observer):
        def step(self, step: int, record: Any) -> None:
            if step == 4:  # the save of step 3 is in flight
                told.set()
                raise ValueError("the observer is broken")

    monkeypatch.setattr("scaletrain.snapshot.write", broken)
    with pytest.raises(ValueError, match="the observer is broken"):
        run(tmp_path, "checkpoint.every=3 steps", observers=[Fails()])
    assert "the last save failed: tensors share memory" in messages()


def test_one_save_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch, seconds=0.1)
    run(tmp_path, "checkpoint.every=1 steps", "checkpoint.keep=20")
    assert slow.began == list(range(1, 13))
    assert len(checkpoints(tmp_path / "r")) == 12


def test_retention_by_steps(tmp_path: Path) -> None:
    run(tmp_path, "checkpoint.every=2 steps", "checkpoint.keep=1", "checkpoint.keep_every=5 steps")
    assert [int(p.name[5:]) for p in checkpoints(tmp_path / "r")] == [5, 10, 12]


def test_saving_by_minutes(tmp_path: Path, steps_taken: tuple[list[int], Any]) -> None:
    observer = steps_taken[1]
    saved: list[int] = []
    observer.saved = lambda step, seconds: saved.append(step)
    observer.step = lambda step, record: time.sleep(0.05)
    run(
        tmp_path, "checkpoint.every=1000 steps", f"checkpoint.minutes={0.14 / 60}", "checkpoint.keep=9",
        observers=[observer],
    )  # fmt: skip
    assert 3 <= len(saved) <= 6
    assert saved[-1] == 12
