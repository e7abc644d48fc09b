"""Runs that are killed with SIGKILL again and again end as the run that nobody disturbed, to the bit."""

from __future__ import annotations

import gzip
import json
import random
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.launch import Run, metrics, run, start, steps
from tests.recipes.test_recipes import final_weights
from tests.recipes.tiny import make_data, make_networks, overrides, text

pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.distributed]
KILLS = 25


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts in three Parquet shards and in two compressed JSON Lines shards, beside the tiny data."""
    folder = tmp_path_factory.mktemp("chaos")
    make_data(folder)
    make_networks(folder)
    draw = random.Random(1)

    def pair() -> dict[str, str]:
        return {"prompt": text(draw, draw.randint(1, 9)), "completion": " " + text(draw, draw.randint(1, 20))}

    for name in ("parquet", "jsonl"):
        (folder / name).mkdir()
    for shard in range(3):
        rows = pa.Table.from_pylist([pair() for _ in range(draw.randint(200, 300))])
        pq.write_table(rows, folder / "parquet" / f"{shard}.parquet", row_group_size=40)
    for shard in range(2):
        lines = "".join(json.dumps(pair()) + "\n" for _ in range(draw.randint(100, 200)))
        (folder / "jsonl" / f"{shard}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return folder


def command_of(name: str, data: Path, root: Path) -> list[object]:
    """Return the command: a streaming, packed, mixed `lm/pretrain` in fp16 with EMA, or another recipe made small."""
    own = overrides(name, data)
    if name == "lm/pretrain":
        streams = [
            {"path": f"{data}/parquet", "stream": True, "weight": 2},
            {"path": f"{data}/jsonl", "stream": True, "weight": {0: 1, 50: 3}},
        ]
        own = [word for word in own if not word.startswith(("data.train=", "objective.tokenizer", "train.duration"))]
        own += [
            f"data.train={yaml.safe_dump(streams, default_flow_style=True, width=1000).strip()}",
            f"objective.tokenizer={{path: {data}/llama}}",
            "data.holdout=0",
            f"data.eval={data}/prompts.jsonl",
            "data.packing=true",
            "data.shuffle=200",
            "train.precision=fp16",
            "players.model.ema.decay=0.9",
            "players.model.scaler.interval=20",
            "train.duration=120 steps",
            "evaluate.every=40 steps",
        ]
    elif name == "quickstart":
        own.append("train.duration=40 steps")
    else:
        own = [word for word in own if not word.startswith("train.duration=")] + ["train.duration=100 steps"]
    return ["run", name, *own, "checkpoint.every=3 steps", "--root", root]


def wait_for(life: Run, folder: Path, draw: random.Random) -> bool:
    """Wait for the moment to kill: while starting, some steps on, or inside a save. Returns whether it came."""
    kind = draw.choice(("start", "steps", "steps", "save", "save"))
    goal = max(steps(folder), default=0) + draw.randint(1, 8)
    delay = draw.uniform(0, 1.0) if kind == "start" else draw.uniform(0, 0.05)
    while kind != "start" and all(rank.exitcode is None for rank in life.ranks):
        if kind == "steps" and max(steps(folder), default=0) >= goal:
            break
        if kind == "save" and max(steps(folder), default=0) >= goal - 1 and list(folder.glob(".saving-*")):
            break
        time.sleep(0.002)
    time.sleep(delay)
    return all(rank.exitcode is None for rank in life.ranks)


@pytest.mark.parametrize("name", ["lm/pretrain", "quickstart", "gan/dcgan"])
def test_killed_at_25_moments_is_bit_identical(name: str, data: Path, tmp_path: Path) -> None:
    command = command_of(name, data, tmp_path)
    run([*command, "--run", "whole"], 2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    draw = random.Random(f"chaos {name}")
    kills = 0
    for _ in range(KILLS):
        life = start([*command, "--run", "parts"], 2)
        if not wait_for(life, parts, draw):
            codes, printed = life.finish()
            assert codes == [0, 0], printed
            break
        for rank in draw.sample(life.ranks, 2):  # one a little before the other, as it happens
            rank.kill()
            time.sleep(draw.uniform(0, 0.02))
        codes, printed = life.finish()
        kills += codes != [0, 0]
    run([*command, "--run", "parts"], 2)
    assert kills >= 0.8 * KILLS, f"only {kills} kills: the run is too short for them"
    assert final_weights(parts) == final_weights(whole)
    assert steps(parts) == steps(whole) == list(range(1, int(max(steps(whole))) + 1))
    losses = [[r.get("loss") for r in metrics(folder) if r["kind"] == "train"] for folder in (parts, whole)]
    assert losses[0] == losses[1]
