"""Every way to distil a sampler, on two processes as on one, by every engine and in every precision; and killed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.distributed.engines import ENGINES, assert_close, tensors
from tests.launch import metrics, run, start, steps
from tests.recipes.tiny import overrides

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SCALES = {"scales": [1.0, 4.0], "guidance": 2.0}
METHODS: dict[str, dict[str, Any]] = {
    "progressive": {"steps": 2, "teacher_steps": 8},
    "dmd2": {"steps": 2, "every": 2, "adversarial": 0.1, "r1": 0.1},
    "adversarial": {"steps": 2, "r1": 0.1},
    "reflow": {"teacher_steps": 4},
    "consistency": {"target_decay": 0.5, "intervals": {"type": "even", "count": 4}},
    "ctm": {"sampled": 0.5},
    "shortcut": {"finest": 8},
    "guided": {"steps": 2, **SCALES},
    "lcm": {"intervals": {"type": "even", "count": 4}, **SCALES},
    "scm": {"warmup": 4},
    "meanflow": {"whole": 0.5},
}
"""Each goes on from the student of the one before, and may tell it more."""
EACH = {"path": "flow", "condition": "label", "compare_samples": 64}
FORWARD = ("scm", "meanflow")
"""Those that differentiate networks forward, which ZeRO-3 cannot."""
RELATIVE = {"fp32": {}, "bf16": {"fsdp2": 5e-3, "zero3": 5e-3}, "fp16": {"fsdp2": 5e-3}}
"""Where more than 1e-5 of a loss is allowed: FSDP2 gathers biases in half precision, too, where autocast leaves them in
fp32; DeepSpeed's linear layer under ZeRO-3 adds the bias after the product was rounded."""


def recipe(folder: Path, methods: list[str], precision: str = "fp32") -> Path:
    """Write a recipe of a stage of six steps for each method: students of a mixture, which is frozen."""
    optimizer = {"optimizer": {"type": "sgd", "lr": 0.05}, "clip": 1.0, "ema": {"decay": 0.9}}
    followers = {"dmd2": ["fake_score", "critic"], "adversarial": ["critic"]}
    tree: dict[str, Any] = {
        "objective": {"type": methods[-1]},
        "networks": {
            "student": {"type": "point_denoiser", "config": {"hidden": [8, 8]}},
            "teacher": {"type": "mixture", "frozen": True, "config": {"modes": "ring", "count": 4}},
        },
        "players": {"student": optimizer},
        "data": {"train": "noise:64"},
        "train": {"duration": "6 steps", "global_batch": 8, "micro_batch": 2, "precision": precision},
        "evaluate": {"samples": 0},
        "checkpoint": {"every": "6 steps", "keep": 100},
        "log": {"every": 1},
        "stages": [
            {
                "name": name,
                "objective": {"type": name, **EACH, **METHODS[name]},
                "players": dict.fromkeys(followers.get(name, []), optimizer),
                "networks": {"critic": {"config": {"hidden": [8, 8]}}} if name in followers else {},
            }
            for name in methods
        ],
    }
    path = folder / f"{precision}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def losses(folder: Path) -> dict[str, list[float]]:
    """Return the losses of each stage, of all players."""
    found: dict[str, list[float]] = {}
    for r in metrics(folder):
        found.setdefault(str(r["stage"]), []).extend(
            v for k, v in sorted(r.items()) if r["kind"] == "train" and k.rpartition("/")[2] == "loss"
        )
    return found


@pytest.mark.parametrize("precision", RELATIVE)
def test_two_processes_are_as_one(precision: str, tmp_path: Path) -> None:
    words = ["run", recipe(tmp_path, [*METHODS], precision), "--root", tmp_path]
    run([*words, "--run", "one"])
    expected = losses(tmp_path / "one")
    assert [*expected] == [*METHODS]
    for name, values in expected.items():
        assert len(values) >= 6, name
        assert all(map(math.isfinite, values)), name
    found, allowed = {}, {}
    for engine in ("ddp", "fsdp2", "zero2", "zero3"):
        left = [name for name in METHODS if engine != "zero3" or name not in FORWARD]  # they come last
        run(["run", recipe(tmp_path, left, precision), *words[2:], "--run", engine], 2, variables=ENGINES[engine])
        for name, values in losses(tmp_path / engine).items():
            there, here = torch.tensor([values, expected[name]], dtype=torch.float64)
            found[engine, name] = float(((there - here) / here).abs().max())
            allowed[engine, name] = pytest.approx(0, abs=RELATIVE[precision].get(engine, 1e-5))
        if engine in ("ddp", "fsdp2") and precision == "fp32":
            assert_close(tmp_path / engine / "latest", tmp_path / "one" / "latest", rtol=1e-4, atol=1e-6)
    assert found == allowed
