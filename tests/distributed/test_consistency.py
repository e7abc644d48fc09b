"""Students that call themselves twice, or differentiate forward, on two processes as on one, by every engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.engines import ENGINES, assert_close, tensors
from tests.launch import metrics, run, start, steps
from tests.recipes.tiny import overrides

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def losses(folder: Path) -> list[float]:
    return [r["loss"] for r in metrics(folder) if r["kind"] == "train"]


@pytest.mark.parametrize(
    ("method", "more"),
    [("consistency", ["objective.target_decay=0.5"]), ("scm", ["objective.warmup=4"]), ("lcm", [])],
)
def test_two_processes_are_as_one(method: str, more: list[str], tmp_path: Path) -> None:
    own = ["train.duration=6 steps", "players.student.optimizer={type: sgd, lr: 0.05}", "checkpoint.every=6 steps"]
    name = f"distill/{method}_gmm"
    words = ["run", name, *overrides(name, tmp_path), *own, *more, "--root", tmp_path]
    run([*words, "--run", "one"], 1)
    for engine in ENGINES:
        if (method, engine) == ("scm", "zero3"):  # whose linear layers do not differentiate forward
            continue
        run([*words, "--run", engine], 2, variables=ENGINES[engine])
        assert len(losses(tmp_path / engine)) == 6
        assert losses(tmp_path / engine) == pytest.approx(losses(tmp_path / "one"), rel=1e-4), engine
        if engine in ("ddp", "fsdp2"):
            assert_close(tmp_path / engine / "latest", tmp_path / "one" / "latest", rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_target_is_resumed_bit_for_bit(engine: str, tmp_path: Path) -> None:
    name = "distill/consistency_gmm"
    own = ["train.duration=12 steps", "checkpoint.every=4 steps", "objective.target_decay=0.9"]
    words = ["run", name, *overrides(name, tmp_path), *own, "--root", tmp_path]
    run([*words, "--run", "whole"], 2, variables=ENGINES[engine])
    killed = start([*words, "--run", "killed"], 2, variables=ENGINES[engine])
    killed.stop_when(lambda: len(steps(tmp_path / "killed")) >= 6)
    run([*words, "--run", "killed"], 2, variables=ENGINES[engine])
    whole = tensors(tmp_path / "whole" / "latest")
    assert any("target" in key for key in whole)
    for key, tensor in tensors(tmp_path / "killed" / "latest").items():
        assert torch.equal(tensor, whole[key]), key
