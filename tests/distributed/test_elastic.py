"""A run that goes on with other numbers of processes takes the same samples in the same order, each once an epoch."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from tests.launch import metrics, run, start, steps
from tests.recipes.test_bad_stream import pairs
from tests.recipes.tiny import make_networks, overrides

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

OBJECTIVE = '''
"""Regression on rows that are streamed; notes which rows each micro-batch had. Slow enough to be interrupted."""

import os
import time
from typing import final

import numpy as np
import torch

from scaletrain.config import Strict
from scaletrain.data.dataset import Dataset
from scaletrain.objectives import base
from scaletrain.player import Term


class Config(Strict):
    """notes: a folder."""

    notes: str


class Lines(Dataset):
    """x and its row number."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def order(self, lanes, shuffle, *seed):
        return self.rows.order(lanes, shuffle, *seed)

    def example(self, index, rng):
        return {**self.rows.row(index), "noise": rng.standard_normal()}

    def collate(self, examples):
        return {k: torch.tensor([float(e[k]) for e in examples]) for k in ("n", "x", "noise")}


@final
class Objective(base.Objective[Config]):
    """Least squares with noise on the input, and dropout."""

    step = 0

    def examples(self, rows, training, window=False):
        return Lines(rows)

    def networks(self):
        return {"model": base.completed(self.recipe, "model", "mlp", inputs=1, outputs=1)}

    def counts(self, turn, batch):
        return {"samples": len(batch["x"])}

    def loss(self, turn, networks, batch):
        with open(f"{self.config.notes}/{os.getpid()}", "a") as file:
            file.write(" ".join(str(int(n)) for n in batch["n"]) + "\\n")
        time.sleep(0.005)
        x = torch.nn.functional.dropout((batch["x"] + 0.1 * batch["noise"])[:, None], 0.2)
        return {"loss": Term((networks["model"](x) - batch["x"][:, None]).square().sum(), per="samples")}
'''
ROWS, BATCH = 960, 8


@pytest.fixture
def command(tmp_path: Path) -> list[object]:
    (tmp_path / "streamed.py").write_text(OBJECTIVE)
    (tmp_path / "rows").mkdir()
    for shard in range(4):
        own = range(shard * ROWS // 4, (shard + 1) * ROWS // 4)
        table = pa.table({"n": list(own), "x": [i / ROWS for i in own]})
        pq.write_table(table, tmp_path / "rows" / f"{shard}.parquet", row_group_size=17)
    (tmp_path / "r.yaml").write_text(
        f"{{objective: {{type: streamed, notes: {tmp_path}/notes}}, log: {{every: 1}},"
        f" data: {{train: {{path: {tmp_path}/rows, stream: true}}, shuffle: 100}},"
        f" train: {{duration: {ROWS // BATCH} steps, global_batch: {BATCH}, micro_batch: 2}}}}"
    )
    return ["run", tmp_path / "r.yaml", "--code", tmp_path / "streamed.py", "--root", tmp_path]


def noted(folder: Path) -> list[int]:
    """Return the rows that were trained on since the last call, in any order."""
    found = [int(n) for path in (folder / "notes").iterdir() for n in path.read_text().split()]
    for path in (folder / "notes").iterdir():
        path.unlink()
    return found


def test_1_2_4_1_processes(command: list[object], tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    run([*command, "--run", "whole"])
    assert sorted(noted(tmp_path)) == list(range(ROWS))

    parts = tmp_path / "parts"
    seen: list[int] = []
    for processes, until in ((1, 30), (2, 55), (4, 80)):
        life = start([*command, "--run", "parts"], processes)
        codes, printed = life.stop_when(lambda until=until: max(steps(parts), default=0) >= until, signal.SIGTERM)
        assert codes == [3] * processes, printed
        seen += noted(tmp_path)
    run([*command, "--run", "parts"])
    seen += noted(tmp_path)
    assert sorted(seen) == list(range(ROWS))
    assert steps(parts) == list(range(1, ROWS // BATCH + 1))
    losses = [[r["loss"] for r in metrics(folder) if r["kind"] == "train"] for folder in (parts, tmp_path / "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    weights = [
        load_file(folder / "latest" / "networks" / "model" / "model.safetensors")
        for folder in (parts, tmp_path / "whole")
    ]
    for name, tensor in weights[1].items():
        torch.testing.assert_close(weights[0][name], tensor, rtol=1e-5, atol=1e-6)
    assert json.loads((parts / "latest" / "manifest.json").read_text())["complete"]


def test_packs_of_a_mixture_of_streams_on_2_1_4_2_processes(tmp_path: Path) -> None:
    """The lanes' cursors are gathered from all ranks, and each lane goes on where another process left it."""
    make_networks(tmp_path)
    for name in ("a", "b"):
        lines = [json.dumps(row) + "\n" for row in pairs(300, ord(name))]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    own = ("data.train=", "checkpoint.every", "evaluate.", "train.")
    words: list[object] = ["run", "lm/lora", *(w for w in overrides("lm/lora", tmp_path) if not w.startswith(own))]
    sources = [
        f"{{path: {tmp_path}/{n}.jsonl, stream: true, weight: {w}}}" for n, w in (("a", "{0: 1, 20: 3}"), ("b", 1))
    ]
    words += [f"data.train=[{', '.join(sources)}]", "data.holdout=0", "data.packing=true", "data.shuffle=40"]
    words += ["train.duration=80 steps", "train.global_batch=8", "train.micro_batch=2", "log.every=1"]
    words += ["evaluate.samples=0", "checkpoint.every=1000 steps", "--root", tmp_path]
    run([*words, "--run", "whole"])
    parts = tmp_path / "parts"
    for processes, until in ((2, 20), (1, 35), (4, 50)):
        life = start([*words, "--run", "parts"], processes)
        codes, printed = life.stop_when(lambda until=until: max(steps(parts), default=0) >= until, signal.SIGTERM)
        assert codes == [3] * processes, printed
    run([*words, "--run", "parts"], 2)
    assert steps(parts) == list(range(1, 81))
    found = [[r for r in metrics(folder) if r["kind"] == "train"] for folder in (parts, tmp_path / "whole")]
    assert [r["loss"] for r in found[0]] == pytest.approx([r["loss"] for r in found[1]], rel=1e-5)
    assert [r["seen"] for r in found[0]] == [r["seen"] for r in found[1]]
