"""fp16 overflow and NaN on one of two ranks: what one rank meets, all know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launch import metrics, run, start

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

CODE = '''
"""A least-squares objective that spoils one micro-batch of one step."""

from typing import final

import torch

from scaletrain.config import NetworkSpec, Strict
from scaletrain.data.dataset import TensorDataset
from scaletrain.objectives import base
from scaletrain.player import Term


class Config(Strict):
    """Which step, by the number of the call, and with what."""

    spoil: float
    at: int


@final
class Objective(base.Objective[Config]):
    """Classify digits; the second micro-batch of step `at` has its loss multiplied."""

    calls = 0

    def examples(self, rows, training, window=False):
        images = torch.stack([torch.as_tensor(rows.row(i)["image"]).float() for i in range(64)])
        labels = torch.tensor([rows.row(i)["label"] for i in range(64)])
        images = torch.nn.functional.pad(images[:, None] / 16, (12, 12, 12, 12))
        return TensorDataset({"image": images, "label": labels})

    def networks(self):
        return {"model": base.completed(self.recipe, "model", "cnn", classes=10, channels=1, height=32, width=32)}

    def counts(self, turn, batch):
        return {"images": len(batch["label"])}

    def loss(self, turn, networks, batch):
        logits = networks["model"](batch["image"])
        loss = torch.nn.functional.cross_entropy(logits.float(), batch["label"], reduction="sum")
        import os

        if self.calls == self.config.at and os.environ.get("RANK", "0") == "1":
            loss = loss * self.config.spoil
        self.calls += 1
        return {"loss": Term(loss, per="images")}
'''


def recipe(folder: Path, **train: object) -> Path:
    (folder / "spoiled.py").write_text(CODE)
    path = folder / "recipe.yaml"
    path.write_text(
        json.dumps(
            {
                "objective": {"type": "spoiled", "spoil": "inf", "at": 6},
                "players": {
                    "model": {
                        "optimizer": {"lr": 1e-2},
                        "schedule": {"type": "linear"},
                        "ema": {"decay": 0.9},
                        "scaler": {"initial": 1024.0},
                    }
                },
                "data": {"train": "sklearn:digits"},
                "train": {"duration": "12 steps", "global_batch": 16, "micro_batch": 8, **train},
                "evaluate": {"samples": 0},
                "log": {"every": 1},
            }
        ).replace('"inf"', ".inf")
    )
    return path


def test_an_overflow_on_one_rank_skips_the_update_on_both(tmp_path: Path) -> None:
    path = recipe(tmp_path, precision="fp16")
    run(["run", path, "--code", tmp_path / "spoiled.py", "--root", tmp_path, "--run", "r"], processes=2)
    records = metrics(tmp_path / "r")
    assert [r["skipped"] for r in records] == [0] * 6 + [1] * 6
    assert [r["scale"] for r in records] == [1024.0] * 7 + [512.0] * 5
    rates = [r["lr"] for r in records]
    assert rates[5] == rates[6], "the schedule holds still at the update that was skipped"
    assert rates[:6] + rates[7:] == sorted(rates[:6] + rates[7:], reverse=True)
    assert all(r["loss"] < 10 for i, r in enumerate(records) if i != 6)
    state = json.loads((tmp_path / "r" / "latest" / "training" / "state.json").read_text())
    assert state["players"]["model"]["updates"] == 11
    assert state["players"]["model"]["skipped"] == 1


def test_a_nan_under_bf16_names_step_rank_and_samples_and_stops_before_the_update(tmp_path: Path) -> None:
    path = recipe(tmp_path, precision="bf16")
    arguments = ["run", path, "objective.spoil=.nan", "checkpoint.every=1 steps"]
    arguments += ["--code", tmp_path / "spoiled.py", "--root", tmp_path, "--run", "r"]
    codes, text = start(arguments, processes=2).finish()
    assert codes == [2, 2], text
    assert "Traceback" not in text
    for part in ("step 6", "rank 1: example ", "Nothing was updated"):
        assert part in text
    assert "rank 0:" not in text
    assert (tmp_path / "r" / "latest").resolve().name == "step-00000006"
