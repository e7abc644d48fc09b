"""A run that hangs says where, on every rank, and ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from scaletrain.checkpoint.layout import checkpoints
from tests.launch import start, steps

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

OBJECTIVE = '''
"""A family whose second rank sleeps in its fifth step."""

import os
import time
from typing import final

import torch

from scaletrain.config import Strict
from scaletrain.data.dataset import TensorDataset
from scaletrain.objectives import base
from scaletrain.player import Term


class Config(Strict):
    """None."""


@final
class Objective(base.Objective[Config]):
    """Hangs."""

    taken = 0

    def examples(self, rows, training, window=False):
        return TensorDataset({"x": torch.ones(40, 2)})

    def networks(self):
        return {"model": base.completed(self.recipe, "model", "mlp", inputs=2, outputs=1)}

    def counts(self, turn, batch):
        return {"samples": len(batch["x"])}

    def loss(self, turn, networks, batch):
        self.taken += 1
        if self.taken == 5 and os.environ.get("RANK") == "1":
            self.sleep_for_ever()
        return {"loss": Term(networks["model"](batch["x"]).square().sum(), per="samples")}

    def sleep_for_ever(self):
        time.sleep(10_000)
'''


def test_stacks_of_every_rank_and_status_1(tmp_path: Path) -> None:
    (tmp_path / "sleepy.py").write_text(OBJECTIVE)
    (tmp_path / "r.yaml").write_text(
        "{objective: {type: sleepy}, data: {train: 'sklearn:iris'}, checkpoint: {every: 2 steps}, log: {every: 1},"
        " train: {duration: 20 steps, global_batch: 4, watchdog: 0.05}}"
    )
    words = ["run", tmp_path / "r.yaml", "--code", tmp_path / "sleepy.py", "--root", tmp_path, "--run", "r"]
    codes, printed = start(words, 2).finish(60)
    assert codes == [1, 1], printed
    assert "no step for" in printed
    stacks = [(tmp_path / "r" / "stacks" / f"rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert "sleep_for_ever" in stacks[1]
    assert "sleep_for_ever" not in stacks[0]
    assert "in update" in stacks[0] or "in backward" in stacks[0]
    assert max(steps(tmp_path / "r")) == 4
    assert [path.name for path in checkpoints(tmp_path / "r")][-1] == "step-00000004"
