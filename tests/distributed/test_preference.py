"""Preferences are learned alike however the global batch is cut, and by engines that hold weights in parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.engines import ENGINES, assert_close
from tests.launch import metrics, run
from tests.recipes.tiny import make_data, overrides

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
FIGURES = ("loss", "margin", "accuracy", "divergence", "grad_norm")
DRIVEN = ["objective.loss.desirable_weight=8"]
"""What has KTO move away from the reference, so that the divergence counts."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preferences")
    make_data(folder)
    return folder


def train(data: Path, recipe: str, name: str, processes: int, *changes: str, engine: str = "ddp") -> Path:
    """Train six steps of ragged pairs, unpacked."""
    own = ["players.model.optimizer.lr=0.01", "train.duration=6 steps", "evaluate.samples=0", "evaluate.every=6 steps"]
    own += ["checkpoint.every=6 steps", "data.packing=false", "data.holdout=0.1"]
    own += DRIVEN if recipe == "lm/kto" else []
    words = ["run", recipe, *overrides(recipe, data), *own, *changes, "--root", data, "--run", f"{recipe[3:]}-{name}"]
    run(words, processes, variables=ENGINES[engine])
    return data / f"{recipe[3:]}-{name}"


def figures(folder: Path) -> list[float]:
    return [record[name] for record in metrics(folder) for name in FIGURES if name in record]


@pytest.fixture(scope="module")
def whole(data: Path) -> dict[str, Path]:
    """One process, one micro-batch."""
    return {name: train(data, f"lm/{name}", "whole", 1, "train.micro_batch=8") for name in ("dpo", "kto")}


def test_there_is_a_divergence(whole: dict[str, Path]) -> None:
    assert max(record["divergence"] for record in metrics(whole["kto"]) if "divergence" in record) > 0.1


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_the_same_however_the_batch_is_cut(name: str, processes: int, data: Path, whole: dict[str, Path]) -> None:
    micro = f"train.micro_batch={8 // 2 // processes}"
    cut = train(data, f"lm/{name}", f"cut-{processes}", processes, micro)
    expected = figures(whole[name])
    assert len(expected) == (6 * 4 + 3 if name == "dpo" else 6 * 5 + 4)
    assert figures(cut) == pytest.approx(expected, rel=2e-4, abs=1e-5)
    assert_close(cut / "latest", whole[name] / "latest", rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_engines_that_hold_weights_in_parts(name: str, engine: str, data: Path, whole: dict[str, Path]) -> None:
    parts = train(data, f"lm/{name}", engine, 2, "train.micro_batch=2", engine=engine)
    assert figures(parts) == pytest.approx(figures(whole[name]), rel=2e-4, abs=1e-5)
    assert_close(parts / "latest", whole[name] / "latest", rtol=1e-3, atol=1e-5)
