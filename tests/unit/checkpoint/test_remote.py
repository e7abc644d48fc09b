"""A run whose checkpoints are copied to a store, and go on elsewhere."""

from __future__ import annotations

import logging
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from scaletrain.checkpoint.layout import checkpoints, number
from scaletrain.checkpoint.remote import Remote
from scaletrain.checkpoint.writer import write
from scaletrain.errors import UserError
from tests.recipes.test_recipes import final_weights
from tests.unit.test_snapshot import run


class Flaky(MemoryFileSystem):
    """A store in memory that refuses while `refuses` is set or after `left` files, and waits for `gate`."""

    protocol = "shaky"
    refuses = False
    gate: threading.Event | None = None
    left = gets = 1_000_000
    watch: Callable[[], None] = staticmethod(lambda: None)
    sent: ClassVar[list[str]] = []

    def get_file(self, rpath: str, lpath: str, **kwargs: Any) -> None:
        Flaky.watch()
        Flaky.gets -= 1
        if Flaky.gets < 0:
            raise ConnectionError("the store is away")
        super().get_file(rpath, lpath, **kwargs)

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        Flaky.left -= 1
        if Flaky.refuses or Flaky.left < 0:
            raise ConnectionError("the store is away")
        if Flaky.gate:
            Flaky.gate.wait(5)
        Flaky.sent.append(rpath.rpartition("/")[2])
        super().put_file(lpath, rpath, **kwargs)


fsspec.register_implementation("shaky", Flaky, clobber=True)


@pytest.fixture(params=["memory", "file", "shaky"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"file://{tmp_path}/store" if request.param == "file" else f"{request.param}://{uuid.uuid4().hex}"


@pytest.fixture
def flaky() -> Iterator[str]:
    yield f"shaky://{uuid.uuid4().hex}"
    Flaky.refuses, Flaky.gate, Flaky.left, Flaky.gets = False, None, 1_000_000, 1_000_000
    Flaky.watch = lambda: None


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    caplog.set_level(logging.INFO, "scaletrain")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


def there(url: str, name: str = "r") -> list[int]:
    """Return the steps that are complete in the store."""
    fs, path = fsspec.core.url_to_fs(url)
    return sorted(int(p.split("/")[-2][5:]) for p in fs.find(f"{path}/{name}") if p.endswith("manifest.json"))


def test_a_new_machine_goes_on_from_the_store(url: str, tmp_path: Path) -> None:
    first, second, whole = (tmp_path / name for name in ("first", "second", "whole"))
    short = ["checkpoint.keep_every=6 steps", "checkpoint.keep=1"]
    run(whole, *short)
    folder = run(first, f"checkpoint.remote={url}", *short)
    assert there(url) == [number(p) for p in checkpoints(folder)] == [6, 12]
    fs, path = fsspec.core.url_to_fs(url)
    fs.rm(f"{path}/r/step-00000012", recursive=True)  # as if the first machine had died after step 6
    run(second, f"checkpoint.remote={url}", *short)
    assert final_weights(second / "r") == final_weights(whole / "r")
    assert there(url) == [6, 12]
    assert (second / "r" / "latest").resolve().name == "step-00000012"


def test_a_damaged_one_in_the_store_is_passed_over(flaky: str, tmp_path: Path, messages: Callable[[], str]) -> None:
    run(tmp_path / "a", f"checkpoint.remote={flaky}")
    fs, path = fsspec.core.url_to_fs(flaky)
    file = f"{path}/r/step-00000012/networks/critic/model.safetensors"
    fs.pipe_file(file, fs.cat_file(file)[:-1])
    run(tmp_path / "b", f"checkpoint.remote={flaky}")
    assert "step-00000012 is damaged and is passed over: networks/critic/model.safetensors" in messages()
    assert final_weights(tmp_path / "b" / "r") == final_weights(tmp_path / "a" / "r")


def test_another_recipe_and_a_fresh_run_are_refused_and_nothing_is_kept(flaky: str, tmp_path: Path) -> None:
    run(tmp_path / "a", f"checkpoint.remote={flaky}")
    with pytest.raises(UserError, match=r"another recipe.*train\.global_batch"):
        run(tmp_path / "b", f"checkpoint.remote={flaky}", "train.global_batch=4")
    assert not (tmp_path / "b" / "r").exists()
    with pytest.raises(UserError, match=f"--fresh: {flaky}/r exists"):
        run(tmp_path / "b", f"checkpoint.remote={flaky}", fresh=True)


def test_a_store_that_refuses_kills_nothing(flaky: str, tmp_path: Path, messages: Callable[[], str]) -> None:
    Flaky.refuses = True
    folder = run(tmp_path, f"checkpoint.remote={flaky}")
    assert [number(p) for p in checkpoints(folder)] == [8, 12]
    assert "cannot write to" in messages()
    assert f"{flaky} lacks the newest checkpoint (ConnectionError: the store is away)" in messages()
    assert there(flaky) == []
    Flaky.refuses = False
    run(tmp_path, f"checkpoint.remote={flaky}")  # finished: nothing is left to do but this
    assert there(flaky) == [12]


def fill(folder: Path) -> None:
    (folder / "a.json").write_text("{}")


def save(root: Path, step: int, **facts: Any) -> Path:
    return write(root, step, fill, {"stage": "main", **facts})


def test_what_is_being_sent_is_in_use_and_the_end_waits_for_it(flaky: str, tmp_path: Path) -> None:
    Flaky.gate = threading.Event()
    remote = Remote(flaky, tmp_path, keep=1)
    save(tmp_path, 1)
    remote.send()
    while not remote.in_use:
        time.sleep(0.001)
    assert remote.in_use == {"step-00000001"}
    assert there(flaky, tmp_path.name) == []
    save(tmp_path, 2)
    remote.send()
    Flaky.gate.set()
    remote.finish()
    assert there(flaky, tmp_path.name) == [2]
    assert not remote.in_use


@pytest.mark.parametrize("files", [0, 1])
def test_what_is_half_sent_is_not_complete_and_is_sent_again(files: int, flaky: str, tmp_path: Path) -> None:
    Flaky.left = files
    remote = Remote(flaky, tmp_path, keep=1)
    save(tmp_path, 1)
    remote.send()
    remote.finish()
    assert not remote.exists()
    Flaky.left = 10
    remote.send()
    remote.finish()
    assert there(flaky, tmp_path.name) == [1]


def test_one_that_retention_removes_meanwhile_is_left_out(flaky: str, tmp_path: Path) -> None:
    remote = Remote(flaky, tmp_path, keep=2)
    path = save(tmp_path, 1)
    save(tmp_path, 2)
    shutil.rmtree(path)
    remote._send(path)
    remote.send()
    remote.finish()
    assert there(flaky, tmp_path.name) == [2]


def test_the_same_step_of_another_attempt_is_replaced(flaky: str, tmp_path: Path) -> None:
    remote = Remote(flaky, tmp_path, keep=2)
    save(tmp_path, 1, attempt=1)
    remote.send()
    remote.finish()
    save(tmp_path, 1, attempt=2)
    remote.send()
    remote.finish()
    assert remote._facts("step-00000001")["attempt"] == 2


def test_a_fetch_that_breaks_off_leaves_nothing_and_a_killed_one_is_begun_anew(flaky: str, tmp_path: Path) -> None:
    source, target = tmp_path / "a" / "r", tmp_path / "b" / "r"
    source.mkdir(parents=True)
    (source / "recipe.yaml").write_text("seed: 0")
    (source / "metrics.jsonl").write_text("{}")
    for step in (1, 2):
        save(source, step, complete=step == 1)
    first = Remote(flaky, source, keep=2)
    first.send()
    first.finish()
    other: list[bool] = []
    Flaky.watch = lambda: other.append(
        bool(checkpoints(target)) or (target.exists() and not (target / "recipe.yaml").exists())
    )
    for left in range(6):  # the recipe, two files of each checkpoint, the metrics
        Flaky.gets = left
        with pytest.raises(UserError, match="away"):
            Remote(flaky, target, keep=2).fetch(lambda _: None)
        assert not target.exists()
    assert not any(other)  # killed at any moment, it leaves a run without a checkpoint: one that is fetched
    half = target / ".saving-fetched" / "step-00000002"
    half.mkdir(parents=True)
    (half / "manifest.json").write_text("{")
    (target / "recipe.yaml").write_text("se")
    Flaky.gets = 6
    assert Remote(flaky, target, keep=2).fetch(lambda _: None)
    assert [number(p) for p in checkpoints(target)] == [1, 2]
    assert sorted(p.name for p in target.iterdir() if not p.name.startswith("step-")) == [
        "latest", "metrics.jsonl", "recipe.yaml"
    ]  # fmt: skip


def test_the_recipe_is_there_before_a_checkpoint_is(flaky: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: 0")
    save(tmp_path, 1)
    Flaky.sent = []
    remote = Remote(flaky, tmp_path, keep=1)
    remote.send()
    remote.finish()
    assert Flaky.sent == ["recipe.yaml", "a.json", "manifest.json"]


@pytest.mark.parametrize("name", ["/{outside}", "../../../{outside}"])
def test_a_store_cannot_write_elsewhere(name: str, flaky: str, tmp_path: Path) -> None:
    source, outside = tmp_path / "a" / "r", tmp_path / "outside"
    source.mkdir(parents=True)
    (source / "recipe.yaml").write_text("seed: 0")
    save(source, 1)
    remote = Remote(flaky, source, keep=1)
    remote.send()
    remote.finish()
    name = name.format(outside=outside if name[0] == "/" else "outside")
    remote._fs.store[f"{remote._root}/step-00000001/{name}"] = remote._fs.store[f"{remote._root}/recipe.yaml"]
    with pytest.raises(UserError, match="is no file of a checkpoint"):
        Remote(flaky, tmp_path / "b" / "r", keep=1).fetch(lambda _: None)
    assert not outside.exists()


def test_an_unknown_kind_of_store(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint.remote: nope://x cannot be used"):
        Remote("nope://x", tmp_path, keep=1)


def test_a_store_that_cannot_be_read(flaky: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, path: str, **kwargs: Any) -> None:
        raise ConnectionError("away")

    monkeypatch.setattr(Flaky, "ls", refuse)
    with pytest.raises(UserError, match=r"shaky://.* cannot be read \(ConnectionError: away\)"):
        run(tmp_path, f"checkpoint.remote={flaky}")
    assert not (tmp_path / "r").exists()
