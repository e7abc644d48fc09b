"""The arithmetic of a stage, and what happens between steps: patience, the best checkpoint, retention, samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from scaletrain.checkpoint.layout import checkpoints
from scaletrain.config import Duration
from scaletrain.data.dataset import TensorDataset
from scaletrain.errors import UserError
from scaletrain.objectives.base import Data
from scaletrain.player import Turn
from scaletrain.position import steps_of, windows_before
from scaletrain.recipe import load, load_code
from scaletrain.runs import train

GAN = (Turn("critic", "critic", repeats=5), Turn("generator", "generator"), Turn("r1", "critic", every=16))


def test_position_in_the_data_is_what_the_turns_took() -> None:
    taken = 0
    for step in range(200):
        assert windows_before(GAN, step) == taken
        taken += sum(turn.repeats for turn in GAN if step % turn.every == 0)


@pytest.mark.parametrize(
    ("duration", "steps"),
    [("7 steps", 7), ("1 epochs", 13), ("2 epochs", 25), ("96 samples", 12), ("97 samples", 13), ("800 tokens", 20)],
)
def test_durations(duration: str, steps: int) -> None:
    dataset = TensorDataset({"x": torch.zeros(100)})
    dataset.tokens_per_example = 5.0
    assert steps_of(Duration.parse(duration), (Turn("t", "m"),), Data(dataset), 8) == steps


def test_epochs_count_the_samples_of_all_turns() -> None:
    data = Data(TensorDataset({"x": torch.zeros(100)}))
    assert steps_of(Duration.parse("1 epochs"), (Turn("a", "m", repeats=4), Turn("b", "m")), data, 10) == 2
    with pytest.raises(UserError, match="no tokens"):
        steps_of(Duration.parse("5 tokens"), GAN, data, 10)


TINY = [
    "objective.size=null",
    "networks.model.config.architecture=resnet18",
    "networks.model.config.features=8",
    "data.train.rows=100",
    "train.global_batch=10",
    "log.every=1",
]


def run(folder: Path, *overrides: str) -> Path:
    return train(load("vision/cnn", [*TINY, *overrides]), "r", folder, observers=None)


def records(folder: Path, kind: str) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r for r in found if r["kind"] == kind]


@pytest.mark.slow
def test_patience_stops_and_the_stage_counts_as_complete(tmp_path: Path) -> None:
    change = ["players.model.optimizer.lr=1e-12", "evaluate.every=2 steps", "evaluate.patience=2"]
    folder = run(tmp_path, "train.duration=40 steps", *change)
    assert len(records(folder, "evaluate")) == 3
    assert records(folder, "train")[-1]["step"] == 6
    assert json.loads((folder / "summary.json").read_text())["status"] == "done"
    assert json.loads((folder / "latest" / "manifest.json").read_text())["complete"]


@pytest.mark.slow
@pytest.mark.parametrize("lr", ["3e-2", "1e-12"])  # with the second nothing changes, and the first of equals stays best
def test_the_best_checkpoint_is_kept(lr: str, tmp_path: Path) -> None:
    change = ["checkpoint.best=accuracy", "checkpoint.keep=1", "checkpoint.every=1 steps", "evaluate.every=2 steps"]
    change += [f"players.model.optimizer.lr={lr}", "networks.model.config.norm=group"]
    folder = run(tmp_path, "train.duration=12 steps", *change)
    found = records(folder, "evaluate")
    accuracy = [r["accuracy"] for r in found]
    best = found[accuracy.index(max(accuracy))]["step"]
    assert (folder / "best").resolve().name == f"step-{int(best):08d}"
    assert {p.name for p in checkpoints(folder)} == {f"step-{int(s):08d}" for s in (best, 12)}


@pytest.mark.slow
def test_an_average_is_what_is_evaluated(tmp_path: Path) -> None:
    """With a decay of almost 1 and no warm-up the average stays at the first weights, whatever is learned."""
    change = ["players.model.ema={decay: 0.9999999, warmup: false}", "evaluate.every=3 steps"]
    folder = run(tmp_path, "train.duration=9 steps", "players.model.optimizer.lr=1e-2", *change)
    losses = [r["loss"] for r in records(folder, "evaluate")]
    assert max(losses) - min(losses) < 1e-4
    trained = [r["loss"] for r in records(folder, "train")]
    assert max(trained) - min(trained) > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("change", ["train.recompute=true", "players.model.optimizer.type=sgd"])
def test_precisions_and_recomputation_learn(precision: str, change: str, tmp_path: Path) -> None:
    folder = run(
        tmp_path, "train.duration=25 steps", f"train.precision={precision}", "players.model.optimizer.weight_decay=0",
        "players.model.schedule={type: constant}", "players.model.optimizer.lr=1e-2", change,
    )  # fmt: skip
    losses = [r["loss"] for r in records(folder, "train")]
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.slow
def test_recomputation_changes_nothing(tmp_path: Path) -> None:
    plain = records(run(tmp_path / "a", "train.duration=5 steps"), "train")
    again = records(run(tmp_path / "b", "train.duration=5 steps", "train.recompute=true"), "train")
    assert [r["loss"] for r in plain] == [r["loss"] for r in again]


RARE = '''
"""A family with a turn that is taken every third step only."""

from typing import final

import torch

from scaletrain.config import Strict
from scaletrain.data.dataset import TensorDataset
from scaletrain.objectives import base
from scaletrain.player import Term, Turn


class Config(Strict):
    """None."""


@final
class Objective(base.Objective[Config]):
    """Two turns of one player."""

    turns = (Turn("usual", "model"), Turn("rare", "model", every=3))

    def examples(self, rows, training, window=False):
        return TensorDataset({"x": torch.randn(40, 2, generator=torch.Generator().manual_seed(0))})

    def networks(self):
        return {"model": base.completed(self.recipe, "model", "mlp", inputs=2, outputs=1)}

    def counts(self, turn, batch):
        return {"samples": len(batch["x"])}

    def loss(self, turn, networks, batch):
        return {"loss": Term(networks["model"](batch["x"]).square().sum(), per="samples")}
'''


def test_figures_of_rare_turns_reach_the_log(tmp_path: Path) -> None:
    """log.every 4 and every 3 fall on the same step once in twelve; each record has the newest figures of both."""
    (tmp_path / "rare_turns.py").write_text(RARE)
    (tmp_path / "r.yaml").write_text("{objective: {type: rare_turns}, data: {train: 'sklearn:iris'}}")
    load_code(tmp_path / "rare_turns.py")
    recipe = load(str(tmp_path / "r.yaml"), ["train.duration=24 steps", "log.every=4", "train.global_batch=4"])
    found = records(train(recipe, "r", tmp_path), "train")
    assert [r["step"] for r in found] == [4, 8, 12, 16, 20, 24]
    assert all({"usual/loss", "rare/loss"} <= set(r) for r in found)
