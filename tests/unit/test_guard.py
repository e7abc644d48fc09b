"""Updates that would do harm: told from the usual ones, left out, or undone with the data that led to them."""

from __future__ import annotations

import gc
import json
import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from scaletrain.config import GuardSpec
from scaletrain.errors import UserError
from scaletrain.guard import Spikes
from scaletrain.recipe import load, load_code
from scaletrain.runs import train

OBJECTIVE = '''
"""Regression with rows that ruin it: `poison` is added to the target of row 100."""

from typing import final

import torch

from scaletrain.config import Strict
from scaletrain.data.dataset import TensorDataset
from scaletrain.objectives import base
from scaletrain.player import Term


class Config(Strict):
    """poison: what is wrong with row 100."""

    poison: float = 0.0


@final
class Objective(base.Objective[Config]):
    """Least squares."""

    def examples(self, rows, training, window=False):
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(4000, 4, generator=draw)
        y = x.sum(1, keepdim=True) + 0.1 * torch.randn(4000, 1, generator=draw)
        y[100] += self.config.poison
        return TensorDataset({"x": x, "y": y})

    def networks(self):
        return {"model": base.completed(self.recipe, "model", "mlp", inputs=4, outputs=1)}

    def counts(self, turn, batch):
        return {"samples": len(batch["x"])}

    def loss(self, turn, networks, batch):
        return {"loss": Term((networks["model"](batch["x"]) - batch["y"]).square().sum(), per="samples")}
'''


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "poisoned.py").write_text(OBJECTIVE)
    (tmp_path / "r.yaml").write_text(
        "{objective: {type: poisoned}, data: {train: 'sklearn:iris'}, train: {duration: 200 steps, global_batch: 20},"
        " players: {model: {optimizer: {type: adamw, lr: 0.01}, ema: {decay: 0.9}}},"
        " checkpoint: {every: 30 steps}, log: {every: 1}}"
    )
    load_code(tmp_path / "poisoned.py")
    return tmp_path / "r.yaml"


def run(recipe: Path, name: str, *overrides: str) -> Path:
    return train(load(str(recipe), list(overrides)), name, recipe.parent)


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [r for r in found if r["kind"] == kind]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "latest" / "networks" / "model" / "model.safetensors")


POISON = "objective.poison=1e4"


def test_what_stands_out_is_told() -> None:
    draw = np.random.default_rng(0)
    spikes = Spikes(GuardSpec(spike="skip"), history := [])
    for _ in range(500):
        assert spikes.find(2 + 0.1 * draw.standard_normal(), float(np.exp(0.3 * draw.standard_normal()))) == ""
    before = json.dumps(history)
    assert "loss, 4, stands out" in spikes.find(4.0, 1.0)
    assert "gradient norm, 50, stands out" in spikes.find(2.0, 50.0)
    assert json.dumps(history) == before  # what stands out is not remembered
    assert [len(values) for values in history] == [128, 128]
    assert Spikes(GuardSpec(), json.loads(before)).find(4.0, 1.0)  # goes on from a checkpoint


def test_a_spike_is_rolled_back_and_its_window_passed_over(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end is, to the bit, that of a run which never saw that window; and near that of clean data."""
    rolled = run(recipe, "rolled", POISON, "train.guard.spike=rollback")
    (note,) = records(rolled, "rollback")
    (window,) = note["skipped_windows"]
    assert note["step"] == note["from_step"] // 30 * 30
    assert "stands out" in note["reason"]
    assert [r["step"] for r in records(rolled, "train")] == list(range(1, 201))
    assert json.loads((rolled / "latest" / "manifest.json").read_text())["skipped_windows"] == [window]

    from scaletrain import runs

    build = runs._Run._build
    monkeypatch.setattr(
        runs._Run, "_build", lambda self, stage, saved, skipped, s: build(self, stage, saved, [window], s)
    )
    never = run(recipe, "never", POISON)
    monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(weights(rolled).values(), weights(never).values(), strict=True))

    clean, ruined = run(recipe, "clean"), run(recipe, "ruined", POISON)
    losses = {f.name: np.mean([r["loss"] for r in records(f, "train")[-20:]]) for f in (clean, rolled, ruined)}
    assert losses["rolled"] == pytest.approx(losses["clean"], rel=0.5)
    assert losses["ruined"] > 2 * losses["clean"]


def test_a_spike_before_the_first_checkpoint_goes_back_to_the_beginning(recipe: Path) -> None:
    rolled = run(recipe, "r", POISON, "train.guard.spike=rollback", "checkpoint.every=1000 steps")
    (note,) = records(rolled, "rollback")
    assert note["step"] == 0
    assert [r["step"] for r in records(rolled, "train")] == list(range(1, 201))


def test_a_spike_is_left_out(recipe: Path) -> None:
    folder = run(recipe, "r", POISON, "train.guard.spike=skip")
    (note,) = records(folder, "skip")
    assert records(folder, "train")[-1]["skipped"] == 1
    assert json.loads((folder / "latest" / "training" / "state.json").read_text())["players"]["model"]["updates"] == 199
    assert note["step"] == next(r["step"] for r in records(folder, "train") if r.get("skipped"))


def test_a_spike_stops(recipe: Path) -> None:
    with pytest.raises(UserError, match=r"stands out.*example 100\b.*Nothing was updated"):
        run(recipe, "r", POISON, "train.guard.spike=stop")


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_what_is_not_finite(recipe: Path, policy: str) -> None:
    overrides = ["objective.poison=.nan", f"train.guard.nonfinite={policy}"]
    if policy == "stop":
        with pytest.raises(UserError, match=r"the loss is not finite .*example 100\b"):
            run(recipe, "r", *overrides)
        return
    folder = run(recipe, "r", *overrides)
    assert len(records(folder, policy)) == 1
    assert all(torch.isfinite(w).all() for w in weights(folder).values())


def test_rollbacks_come_to_an_end(recipe: Path) -> None:
    """Where every window is bad, the run stops instead of going round for ever."""
    overrides = ["objective.poison=.nan", "train.guard={nonfinite: rollback, limit: 2}", "train.global_batch=4000"]
    with pytest.raises(UserError, match="not finite"):
        run(recipe, "r", *overrides)


def test_leaving_out_comes_to_an_end(recipe: Path) -> None:
    overrides = ["objective.poison=.nan", "train.guard={nonfinite: skip, limit: 3}", "train.global_batch=4000"]
    with pytest.raises(UserError, match="not finite"):
        run(recipe, "r", *overrides)
    assert len(records(recipe.parent / "r", "skip")) == 3


def test_a_run_that_is_rolled_back_lets_go_of_its_networks_first(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scaletrain import runs

    built: list[weakref.ref[Any]] = []
    build = runs._Run._build

    def watched(*arguments: Any) -> Any:
        assert not any(reference() for reference in built)
        trainer = build(*arguments)
        built.append(weakref.ref(trainer))
        return trainer

    monkeypatch.setattr(runs._Run, "_build", watched)
    gc.disable()
    try:
        run(recipe, "r", POISON, "train.guard.spike=rollback")
    finally:
        gc.enable()
    assert len(built) == 2


def test_a_loss_that_is_not_finite_is_not_remembered() -> None:
    spikes = Spikes(GuardSpec(spike="skip"), history := [])
    for value in [1.0, math.nan, math.inf] * 30:
        assert spikes.find(value, 1.0) == ""
    assert history[0] == [1.0] * 30
    assert "stands out" in spikes.find(5.0, 1.0)


NORMED = '''
"""Pictures of noise, one of which has no value, for a network with BatchNorm."""

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
    """Small logits."""

    def examples(self, rows, training, window=False):
        x = torch.randn(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        x[7] = torch.nan
        return TensorDataset({"x": x})

    def networks(self):
        shape = {"architecture": "resnet18", "features": 8, "channels": 1, "height": 4, "width": 4, "classes": 2}
        return {"model": base.completed(self.recipe, "model", "cnn", **shape)}

    def counts(self, turn, batch):
        return {"samples": len(batch["x"])}

    def loss(self, turn, networks, batch):
        return {"loss": Term(networks["model"](batch["x"]).square().sum(), per="samples")}
'''


def test_an_update_that_is_left_out_leaves_no_trace_in_batchnorm(tmp_path: Path) -> None:
    (tmp_path / "normed.py").write_text(NORMED)
    (tmp_path / "r.yaml").write_text(
        "{objective: {type: normed}, data: {train: 'sklearn:iris'}, log: {every: 1},"
        " train: {duration: 5 steps, global_batch: 8, guard: {nonfinite: skip}}}"
    )
    load_code(tmp_path / "normed.py")
    folder = run(tmp_path / "r.yaml", "r")
    assert len(records(folder, "skip")) == 1
    assert all(torch.isfinite(w).all() for w in weights(folder).values())
