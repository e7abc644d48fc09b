"""What a family does to weights after an update holds under every engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.engines import ENGINES, tensors
from tests.launch import metrics, run
from tests.recipes.tiny import make_data, overrides

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

CLAMPED = """
import torch
from scaletrain.objectives.causal_lm import Config
from scaletrain.objectives.causal_lm import Objective as Base

class Objective(Base):
    def after_update(self, player, networks):
        with torch.no_grad():
            for parameter in networks["model"].parameters():
                if parameter.dim() > 1:
                    parameter.clamp_(-0.02, 0.02)
"""


def test_weights_that_are_clamped_stay_so(tmp_path: Path) -> None:
    make_data(tmp_path)
    (tmp_path / "clamped.py").write_text(CLAMPED)
    words = ["run", "lm/pretrain", *overrides("lm/pretrain", tmp_path), "objective.type=clamped", "--root", tmp_path]
    words += [
        "--code",
        tmp_path / "clamped.py",
        "train.duration=8 steps",
        "evaluate.every=8 steps",
        "evaluate.samples=0",
    ]
    run([*words, "--run", "one"])
    expected = [r["loss"] for r in metrics(tmp_path / "one")]
    for engine, variables in ENGINES.items():
        run([*words, "--run", engine], 2, variables=variables)
        assert [r["loss"] for r in metrics(tmp_path / engine)] == pytest.approx(expected, rel=1e-4), engine
        weights = tensors(tmp_path / engine / "latest")
        assert max(float(w.abs().max()) for n, w in weights.items() if "networks" in n and w.dim() > 1) <= 0.02
