"""What can be wrong with a stream: told by name with exit status 2, with what was trained until then saved."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.launch import Run, metrics, run, start, steps
from tests.recipes.test_bad_input import refused
from tests.recipes.test_recipes import final_weights
from tests.recipes.tiny import make_networks, overrides, text

pytestmark = pytest.mark.slow


def pairs(count: int, seed: int) -> list[dict[str, str]]:
    draw = random.Random(seed)
    return [{"prompt": text(draw, 5), "completion": " " + text(draw, draw.randint(1, 20))} for _ in range(count)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two shards of each kind, and a network with its tokenizer."""
    make_networks(tmp_path)
    for kind in ("parquet", "jsonl"):
        (tmp_path / kind).mkdir()
    for shard in range(2):
        rows = pairs(300, shard)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "parquet" / f"{shard}.parquet", row_group_size=20)
        (tmp_path / "jsonl" / f"{shard}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def command(data: Path, source: str, *changes: str) -> list[object]:
    own = [w for w in overrides("lm/lora", data) if not w.startswith(("data.train=", "checkpoint.every", "evaluate."))]
    own += [f"data.train={source}", "data.holdout=0", "data.packing=true", "data.shuffle=40", "evaluate.samples=0"]
    return ["lm/lora", *own, "train.duration=60 steps", "checkpoint.every=1000 steps", *changes]


def stream(data: Path, kind: str) -> str:
    return f"{{path: {data}/{kind}, stream: true}}"


def told(life: Run) -> str:
    codes, printed = life.finish()
    assert codes == [2] * len(codes), printed
    assert "Traceback" not in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("fault", ["vanishes", "is cut"])
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.distributed)])
def test_a_shard_fails_in_mid_run(fault: str, processes: int, data: Path, tmp_path: Path) -> None:
    """The run stops where it is, says which shard, and goes on from there when the shard is whole again."""
    words = ["run", *command(data, stream(data, "parquet")), "--root", tmp_path]
    run([*words, "--run", "whole"], processes)
    life = start([*words, "--run", "parts"], processes)
    parts, shard = tmp_path / "parts", data / "parquet" / "1.parquet"
    life.wait(lambda: max(steps(parts), default=0) >= 3)
    kept = shard.read_bytes()
    if fault == "vanishes":
        shard.unlink()
    else:
        with shard.open("r+b") as file:
            file.truncate(len(kept) // 3)
    message = told(life)
    assert "1.parquet" in message
    assert "is saved" in message
    reached = max(steps(parts))
    assert reached < 60
    assert (parts / "latest").resolve().name == f"step-{int(reached):08d}"
    shard.write_bytes(kept)
    run([*words, "--run", "parts"], processes)
    assert steps(parts) == list(range(1, 61))
    assert [r["loss"] for r in metrics(parts)] == [r["loss"] for r in metrics(tmp_path / "whole")]
    assert final_weights(parts) == final_weights(tmp_path / "whole")


def test_a_line_that_is_no_object(data: Path, tmp_path: Path) -> None:
    path = data / "jsonl" / "1.jsonl"
    rows = path.read_text().splitlines()
    rows[200] = '["no object"]'
    path.write_text("\n".join(rows) + "\n")
    message = told(start(["run", *command(data, stream(data, "jsonl")), "--root", tmp_path]))
    assert "1.jsonl line 201" in message


def test_shards_with_other_columns(data: Path, tmp_path: Path) -> None:
    other = pa.Table.from_pylist([{"prompt": "a", "answer": "b"}])
    pq.write_table(other, data / "parquet" / "2.parquet")
    message = refused(command(data, stream(data, "parquet")), tmp_path)
    assert "2.parquet" in message
    assert "completion" in message


def test_empty_shards(data: Path, tmp_path: Path) -> None:
    """One is passed over; when all are, there is nothing to train on."""
    empty = pa.Table.from_pylist(pairs(1, 9)).slice(0, 0)
    pq.write_table(empty, data / "parquet" / "2.parquet")
    printed = run(["run", *command(data, stream(data, "parquet"), "train.duration=2 steps"), "--root", tmp_path])
    assert "2.parquet" in printed
    for shard in (0, 1):
        (data / "parquet" / f"{shard}.parquet").unlink()
    shutil.rmtree(tmp_path / "lm-lora")
    assert "parquet" in refused(command(data, stream(data, "parquet")), tmp_path)


def test_weights_that_sum_to_nothing(data: Path, tmp_path: Path) -> None:
    first, second = (stream(data, kind).rstrip("}") for kind in ("jsonl", "parquet"))
    assert "all weights are 0" in refused(command(data, f"[{first}, weight: 0}}, {second}, weight: 0}}]"), tmp_path)
    assert "weight" in refused(command(data, f"[{first}, weight: 1}}, {second}}}]"), tmp_path)


STORE = '''
"""The language model's objective, and a store that refuses."""

import fsspec
from fsspec.spec import AbstractFileSystem

from scaletrain.objectives.causal_lm import Config, Objective


class Refusing(AbstractFileSystem):
    protocol = "refusing"

    def info(self, path, **kwargs):
        return {"name": path, "size": 1000, "type": "file", "mtime": 0}

    def _open(self, path, *args, **kwargs):
        raise OSError("503 slow down")


fsspec.register_implementation("refusing", Refusing)
'''


def test_a_store_that_refuses(data: Path, tmp_path: Path) -> None:
    (data / "store.py").write_text(STORE)
    url = "refusing://bucket/rows.parquet"
    root = tmp_path / "r"
    message = told(
        start(["run", *command(data, f"{{path: '{url}', stream: true}}"), "--code", data / "store.py", "--root", root])
    )
    assert url in message
    assert "after 3 retries: 503 slow down" in message
    assert not root.exists()


def test_a_resume_with_something_else(data: Path, tmp_path: Path) -> None:
    """Another global batch, another tokenizer, other data: refused, with the way to insist."""
    words = ["run", *command(data, stream(data, "jsonl"), "checkpoint.every=1 steps"), "--root", tmp_path]
    life = start(words)
    life.stop_when(lambda: max(steps(tmp_path / "lm-lora"), default=0) >= 4)

    assert "train.global_batch" in (line := told(start([*words, "train.global_batch=16"])))
    assert "--extend" in line

    with (data / "jsonl" / "1.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "a cat", "completion": " sat"}) + "\n")
    assert "data.train changed" in (line := told(start(words)))
    assert "--extend" in line

    path = data / "llama" / "tokenizer.json"
    path.write_text(path.read_text().replace('"fish"', '"fowl"'))
    assert "data.train and the tokenizer changed" in told(start(words))
    run([*words, "--extend"])
    assert steps(tmp_path / "lm-lora") == list(range(1, 61))
