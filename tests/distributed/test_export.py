"""Whole networks that engines hold in parts, their weights rounded in training, too: trained alike, exported whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from scaletrain.export.run import Form, export_run
from scaletrain.finished import FinishedStage
from tests.distributed.engines import ENGINES
from tests.launch import metrics, run
from tests.recipes.tiny import make_data, overrides

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
IDS = torch.arange(2, 30)[None]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    make_data(folder)
    return folder


def train(data: Path, engine: str) -> Path:
    words = ["run", "lm/qat", *overrides("lm/qat", data), "players.model.optimizer.lr=0.01", "evaluate.samples=0"]
    words += ["train.duration=4 steps", "checkpoint.every=4 steps", "--root", data, "--run", engine]
    run(words, 2, variables=ENGINES[engine])
    return data / engine


@pytest.fixture(scope="module")
def losses(data: Path) -> list[float]:
    """Under DDP."""
    return [record["loss"] for record in metrics(train(data, "ddp")) if record["kind"] == "train"]


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_rounded_training_in_parts_and_its_exports(engine: str, data: Path, losses: list[float]) -> None:
    folder = train(data, engine)
    found = [record["loss"] for record in metrics(folder) if record["kind"] == "train"]
    assert found[0] == pytest.approx(losses[0], rel=1e-6)
    assert found == pytest.approx(losses, rel=1e-3)  # sums in another order round some weights to the other side
    (own,) = export_run(folder, data / f"{engine}-float")
    assert "max |difference| of logits 0 " in own.notes[-1]
    (own,) = export_run(folder, data / f"{engine}-int4", Form(quantize="int4"))
    trained = FinishedStage.open(folder).networks(torch.device("cpu"))["model"]
    loaded = AutoModelForCausalLM.from_pretrained(own.path).eval()
    with torch.no_grad():
        expected = trained(input_ids=IDS).logits
        torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-6)
