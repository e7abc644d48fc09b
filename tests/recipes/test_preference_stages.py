"""Finetuning, then preferences, in one run: the reference is what the stage before has left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launch import metrics, run
from tests.recipes.tiny import make_data

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("said", [True, False], ids=["said", "by itself"])
@pytest.mark.parametrize("adapter", [None, {"type": "lora", "r": 4}], ids=["whole", "lora"])
def test_the_reference_is_the_stage_before(adapter: dict[str, Any] | None, said: bool, tmp_path: Path) -> None:
    make_data(tmp_path)
    recipe = {
        "objective": {"type": "causal_lm"},
        "networks": {"model": {"path": str(tmp_path / "llama"), "adapter": adapter}},
        "players": {"model": {"optimizer": {"lr": 0.02}}},
        "data": {"train": str(tmp_path / "prompts.jsonl"), "seq_len": 32},
        "train": {"duration": "4 steps", "global_batch": 8},
        "evaluate": {"samples": 0},
        "log": {"every": 1},
        "stages": [
            {"name": "sft"},
            {
                "name": "dpo",
                "objective": {"type": "preference", "loss": {"type": "dpo", "beta": 1.0}},
                "networks": {"model": {"path": None, "from": "stage:sft/model"}} if said else {},
                "data": {"train": str(tmp_path / "pairs.jsonl")},
            },
        ],
    }
    (tmp_path / "both.yaml").write_text(json.dumps(recipe))
    run(["run", tmp_path / "both.yaml", "--root", tmp_path])
    found = [record for record in metrics(tmp_path / "both") if record["stage"] == "dpo"]
    assert found[0]["reward/chosen"] == pytest.approx(0.0, abs=1e-3)
    assert found[0]["reward/rejected"] == pytest.approx(0.0, abs=1e-3)
    assert found[0]["logp/chosen"] < -1
    assert abs(found[-1]["reward/chosen"]) > 0.01
    assert found[-1]["margin"] > 0
