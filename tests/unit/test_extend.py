"""Going on with a finished run, or with data that changed: only when the user says so."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from scaletrain.assemble import prepare
from scaletrain.crew import Crew, Progress
from scaletrain.data.mixture import Mixture
from scaletrain.engine.world import World
from scaletrain.errors import UserError
from scaletrain.recipe import load, load_code, objective_of, stages
from scaletrain.runs import train
from scaletrain.trainer import Trainer

OBJECTIVE = '''
"""Regression of `y` on `x`."""

from typing import final

import torch

from scaletrain.config import Strict
from scaletrain.data.dataset import TensorDataset
from scaletrain.errors import UserError
from scaletrain.objectives import base
from scaletrain.player import Term


class Config(Strict):
    """None."""


@final
class Objective(base.Objective[Config]):
    """Least squares; a negative `x` cannot be learned from."""

    def examples(self, rows, training, window=False):
        return TensorDataset({k: torch.tensor(list(rows.column(k)))[:, None] for k in ("x", "y")})

    def networks(self):
        return {"model": base.completed(self.recipe, "model", "mlp", inputs=1, outputs=1)}

    def counts(self, turn, batch):
        if (batch["x"] < 0).any():
            raise UserError("x is negative")
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


def test_the_watchdog_may_change_without_a_word(folder: Path) -> None:
    run(folder)
    run(folder, "train.watchdog=2")
    assert steps(run(folder, "train.watchdog=null")) == list(range(1, 21))


def test_the_last_stage_is_extended(folder: Path) -> None:
    two = "stages=[{name: one, train: {duration: 5 steps}}, {name: two, train: {duration: %d steps}}]"
    run(folder, two % 10)
    with pytest.raises(UserError, match=r"differ: stages\.1\.train\.duration.*or say --extend"):
        run(folder, two % 15)
    assert steps(run(folder, two % 15, extend=True)) == list(range(1, 21))
    with pytest.raises(UserError, match=r"differ: stages\.0\.train\.duration\. Give"):
        run(folder, (two % 15).replace("duration: 5", "duration: 6"), extend=True)


def test_sources_that_are_mixed_from_now_on_are_other_data(folder: Path) -> None:
    """A stream's cursors are by source."""
    write(folder / "more.jsonl", 30)
    paths = [f"{folder}/{name}.jsonl" for name in ("rows", "more")]
    facts = []
    for weight in ("", ", weight: 1"):
        recipe = load(str(folder / "r.yaml"), [f"data.train=[{', '.join(f'{{path: {p}{weight}}}' for p in paths)}]"])
        (stage,) = stages(recipe)
        facts.append(prepare(objective_of(stage.recipe), stage.recipe).facts["data.train"])
    assert facts[0] != facts[1]


def test_holdout_is_of_all_rows_together_where_they_are_not_weighted(folder: Path) -> None:
    write(folder / "few.jsonl", 5)
    sources = f"data.train=['{folder}/rows.jsonl', '{folder}/few.jsonl']"
    (stage,) = stages(load(str(folder / "r.yaml"), [sources, "data.holdout=0.05"]))
    data = prepare(objective_of(stage.recipe), stage.recipe)
    assert data.eval is not None
    assert (len(data.train), len(data.eval)) == (62, 3)


def test_a_mixture_is_not_cut_into_other_micro_batches(folder: Path) -> None:
    """Its order is by lanes, in memory, too."""
    sources = f"data.train=[{{path: {folder}/rows.jsonl, weight: 1}}]"
    recipe = load(str(folder / "r.yaml"), [sources])
    (stage,) = stages(recipe)
    objective = objective_of(stage.recipe)
    data = prepare(objective, stage.recipe)
    assert isinstance(data.train, Mixture)
    trainer = Trainer.__new__(Trainer)
    trainer.crew = Crew(objective, data, None, {})  # type: ignore[arg-type]
    trainer.progress, trainer.world = Progress(batch=[4, 4]), World(torch.device("cpu"))
    assert trainer._layout(recipe.train).micro_batch == 4
    trainer.world.size = 2
    with pytest.raises(UserError, match=r"in micro-batches of 4, and 2 process.es. would have 2"):
        trainer._layout(recipe.train)


def test_a_fault_after_a_save_does_not_save_again(folder: Path) -> None:
    """That would replace a checkpoint which is kept by one that is not."""
    path = folder / "rows.jsonl"
    lines = path.read_text().splitlines()
    lines[0] = json.dumps({"x": -1.0, "y": 0.0})
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"x is negative What was trained until step \d+ is saved"):
        run(folder, "checkpoint.every=1 steps", "checkpoint.keep_every=1 steps", "train.guard.spike=off")
    assert json.loads((folder / "r" / "latest" / "manifest.json").read_text())["kept"]
