"""Every way to distil a sampler: on two processes as on one, by every engine, in every precision; and killed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.distributed.engines import ENGINES, assert_close, tensors
from tests.launch import metrics, run, start, steps
from tests.recipes.test_recipes import final_weights
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
FORWARD = ("scm", "meanflow")
"""Those that differentiate networks forward, which ZeRO-3 cannot."""
FOLLOWERS = {"dmd2": ["fake_score", "critic"], "adversarial": ["critic"]}
"""Players beside the student."""
LIMITS = {
    "fp32": {"ddp": 1e-5, "fsdp2": 1e-5, "zero2": 1e-5, "zero3": 1e-5},
    "bf16": {"ddp": 1e-5, "fsdp2": 5e-3, "zero2": 1e-5, "zero3": 5e-3},
    "fp16": {"ddp": 5e-3},
}
"""Of the relative error of every loss. See TOLERANCE in test_engines.py; gradients in fp16 are scaled by the number of
processes, too, and small ones rounded accordingly."""


def recipe(
    folder: Path,
    methods: list[str],
    precision: str = "fp32",
    scale: float = 512.0,
    duration: int = 6,
    every: int = 1000,
) -> Path:
    """Write a recipe of a stage for each method, of so many steps: students of a mixture, which is frozen.

    scale: of losses in fp16, at first; it doubles after three steps. every: of checkpoints, in steps.
    """
    player = {"optimizer": {"type": "sgd", "lr": 0.05}, "clip": 1.0, "ema": {"decay": 0.9}}
    player |= {"scaler": {"initial": scale, "interval": 3}}
    each = {"path": "flow", "condition": "label", "compare_samples": 64}
    tree: dict[str, Any] = {
        "objective": {"type": methods[-1]},
        "networks": {
            "student": {"type": "point_denoiser", "config": {"hidden": [8, 8]}},
            "teacher": {"type": "mixture", "frozen": True, "config": {"modes": "ring", "count": 4}},
        },
        "players": {"student": player},
        "data": {"train": "noise:64"},
        "train": {"duration": f"{duration} steps", "global_batch": 8, "micro_batch": 2, "precision": precision},
        "evaluate": {"samples": 0},
        "checkpoint": {"every": f"{every} steps"},
        "log": {"every": 1},
        "stages": [
            {
                "name": name,
                "objective": {"type": name, **each, **METHODS[name]},
                "players": dict.fromkeys(FOLLOWERS.get(name, []), player),
                "networks": {"critic": {"config": {"hidden": [8, 8]}}} if name in FOLLOWERS else {},
            }
            for name in methods
        ],
    }
    path = folder / "methods.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def of_stage(folder: Path, stage: str) -> list[dict[str, float]]:
    """Return the training records of a stage."""
    return [r for r in metrics(folder) if r["kind"] == "train" and r["stage"] == stage]


def losses(folder: Path, stage: str) -> list[float]:
    """Return the losses of all players of a stage."""
    return [v for r in of_stage(folder, stage) for k, v in sorted(r.items()) if k.rpartition("/")[2] == "loss"]


@pytest.mark.parametrize("precision", LIMITS)
def test_two_processes_are_as_one(precision: str, tmp_path: Path) -> None:
    run(["run", recipe(tmp_path, [*METHODS], precision), "--root", tmp_path, "--run", "one"])
    found, allowed = {}, {}
    for engine, limit in LIMITS[precision].items():
        able = [name for name in METHODS if engine != "zero3" or name not in FORWARD]  # which come last
        words = ["run", recipe(tmp_path, able, precision), "--root", tmp_path, "--run", engine]
        run(words, 2, variables=ENGINES[engine])
        for name in able:
            here, there = (torch.tensor(losses(tmp_path / n, name), dtype=torch.float64) for n in ("one", engine))
            assert len(here) >= 6
            assert here.isfinite().all(), name
            found[engine, name] = float(((there - here) / here).abs().max())
            allowed[engine, name] = pytest.approx(0, abs=limit)
        if precision == "fp32" and engine in ("ddp", "fsdp2"):
            assert_close(tmp_path / engine / "latest", tmp_path / "one" / "latest", rtol=1e-4, atol=1e-6)
    assert found == allowed


@pytest.mark.parametrize("name", FORWARD)
def test_forward_differentiation_is_refused_under_zero_3(name: str, tmp_path: Path) -> None:
    """Before the first stage, which would do."""
    words = ["run", recipe(tmp_path, ["progressive", name]), "--root", tmp_path, "--run", "r"]
    codes, printed = start(words, 2, variables=ENGINES["zero3"]).finish()
    assert codes == [2, 2], printed
    assert f"objective.type: {name} differentiates networks forward, which zero3 cannot" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "r").exists()


def test_half_precision_finds_its_scale(tmp_path: Path) -> None:
    """From one at which every gradient overflows."""
    words = ["run", recipe(tmp_path, [*METHODS], "fp16", scale=2.0**20, duration=14), "--root", tmp_path]
    run([*words, "--run", "r"])
    for name in METHODS:
        assert all(map(math.isfinite, losses(tmp_path / "r", name))), name
        records = of_stage(tmp_path / "r", name)
        counts = [key for key in records[0] if key.rpartition("/")[2] == "skipped"]
        assert len(counts) == 1 + len(FOLLOWERS.get(name, []))
        for key in counts:
            skipped = [r[key] for r in records if key in r]
            assert 1 <= skipped[0] <= skipped[-1] < len(skipped) - 1, (name, key, skipped)


def test_killed_in_each_stage_is_bit_identical(tmp_path: Path) -> None:
    words = ["run", recipe(tmp_path, [*METHODS], every=2), "--root", tmp_path]
    run([*words, "--run", "whole"])
    parts = tmp_path / "parts"
    for name in METHODS:
        life = start([*words, "--run", "parts"])
        codes, printed = life.stop_when(lambda name=name: len(of_stage(parts, name)) >= 3)  # type: ignore[misc]
        assert codes == [-9], printed
        assert len(of_stage(parts, name)) < 6
    run([*words, "--run", "parts"])
    assert steps(parts) == steps(tmp_path / "whole")
    assert final_weights(parts) == final_weights(tmp_path / "whole")


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_target_is_resumed_bit_for_bit(engine: str, tmp_path: Path) -> None:
    name = "distill/consistency_gmm"
    own = ["train.duration=12 steps", "checkpoint.every=4 steps", "objective.target_decay=0.9"]
    words = ["run", name, *overrides(name, tmp_path), *own, "--root", tmp_path]
    run([*words, "--run", "whole"], 2, variables=ENGINES[engine])
    killed = start([*words, "--run", "killed"], 2, variables=ENGINES[engine])
    killed.stop_when(lambda: len(steps(tmp_path / "killed")) >= 6)
    run([*words, "--run", "killed"], 2, variables=ENGINES[engine])
    whole = tensors(tmp_path / "whole" / "latest")
    assert any("target" in key for key in whole)
    for key, tensor in tensors(tmp_path / "killed" / "latest").items():
        assert torch.equal(tensor, whole[key]), key
