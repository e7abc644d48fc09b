"""Going on with a finished run, or with data that changed: only when the user says so."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from scaletrain.errors import UserError
from scaletrain.recipe import load, load_code
from scaletrain.runs import train

OBJECTIVE = '''
"""Regression of `y` on `x`."""

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
    """Least squares."""

    def examples(self, rows, training, window=False):
        return TensorDataset({k: torch.tensor(list(rows.column(k)))[:, None] for k in ("x", "y")})

    def networks(self):
        return {"model": base.completed(self.recipe, "model", "mlp", inputs=1, outputs=1)}

    def counts(self, turn, batch):
        return {"samples": len(batch["x"])}

    def loss(self, turn, networks, batch):
        return {"loss": Term((networks["model"](batch["x"]) - batch["y"]).square().sum(), per="samples")}
'''


def write(path: Path, rows: int, slope: float = 2.0) -> None:
    path.write_text("".join(json.dumps({"x": i / rows, "y": slope * i / rows}) + "\n" for i in range(rows)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "slope.py").write_text(OBJECTIVE)
    load_code(tmp_path / "slope.py")
    write(tmp_path / "rows.jsonl", 60)
    (tmp_path / "r.yaml").write_text(
        f"{{objective: {{type: slope}}, data: {{train: '{tmp_path}/rows.jsonl'}}, log: {{every: 1}},"
        " train: {duration: 20 steps, global_batch: 4}, players: {model: {schedule: {type: linear}}}}"
    )
    return tmp_path


def run(folder: Path, *overrides: str, extend: bool = False) -> Path:
    return train(load(str(folder / "r.yaml"), list(overrides)), "r", folder, extend=extend)


def steps(folder: Path) -> list[int]:
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [r["step"] for r in found if r["kind"] == "train"]


def test_a_finished_run_goes_on_when_asked(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(folder)
    with pytest.raises(UserError, match=r"differ: train\.duration.*or say --extend"):
        run(folder, "train.duration=30 steps")
    with caplog.at_level(logging.WARNING, "scaletrain"):
        found = run(folder, "train.duration=30 steps", extend=True)
    assert "player model goes on at update 20 of its linear schedule over 30 updates: lr 0.000333, after 5e-05" in (
        caplog.text
    )
    assert steps(found) == list(range(1, 31))
    run(folder, "train.duration=30 steps")  # is what the folder's recipe says now
    with pytest.raises(UserError, match="30 steps are done"):
        run(folder, "train.duration=30 steps", extend=True)
    with pytest.raises(UserError, match=r"differ: seed\. Give"):
        run(folder, "train.duration=30 steps", "seed=5", extend=True)


def test_data_that_changed_are_refused(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(folder)
    write(folder / "rows.jsonl", 60, slope=-1.0)  # as many rows, other values
    shutil.rmtree(max((folder / "r").glob("step-*")))  # as if it had been killed on the way
    with pytest.raises(UserError, match=r"data\.train changed since .*fingerprints differ.*--extend"):
        run(folder)
    with caplog.at_level(logging.WARNING, "scaletrain"):
        run(folder, extend=True)
    assert "data.train" in caplog.text
    assert steps(folder / "r") == list(range(1, 21))
