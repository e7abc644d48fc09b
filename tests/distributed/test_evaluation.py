"""Evaluation by source and of generated answers: the same on two processes, also where weights are held in parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.engines import ENGINES
from tests.launch import metrics, run
from tests.recipes.tiny import make_data

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One source has fewer batches than there are processes, the other does not divide among them."""
    folder = tmp_path_factory.mktemp("evaluation")
    make_data(folder)
    rows = (folder / "prompts.jsonl").read_text().splitlines(keepends=True)
    (folder / "one.jsonl").write_text(rows[0])
    (folder / "five.jsonl").write_text("".join(rows[1:6]))
    return folder


def evaluated(data: Path, name: str, processes: int, engine: str) -> dict[str, float]:
    words = ["run", "lm/lora", f"networks.model={{type: causal_lm, path: {data}/llama}}", "data.seq_len=48"]
    words += [f"data.train={data}/five.jsonl", f"data.eval=[{data}/one.jsonl, {data}/five.jsonl]", "data.holdout=0"]
    words += ["train.duration=20 steps", "train.global_batch=2", "players.model.optimizer.lr=1e-2", "evaluate.batch=2"]
    words += ["objective.judge={rows: 9, max_new_tokens: 12}", "evaluate.metric=loss@five", "checkpoint.best=f1@five"]
    run([*words, "--root", data, "--run", name], processes, variables=ENGINES[engine])
    record = metrics(data / name)[-1]
    assert json.loads((data / name / "summary.json").read_text())["metrics"].items() <= record.items()
    return {k: v for k, v in record.items() if k not in ("kind", "step", "stage")}


@pytest.fixture(scope="module")
def alone(data: Path) -> dict[str, float]:
    return evaluated(data, "alone", 1, "ddp")


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"])
def test_metrics_are_those_of_one_process(engine: str, alone: dict[str, float], data: Path) -> None:
    assert {"loss@one", "loss@five", "rougeL@one", "f1@five", "f1"} <= alone.keys()
    assert alone["f1@five"] > 0
    assert evaluated(data, engine, 2, engine) == pytest.approx(alone, rel=1e-3)
