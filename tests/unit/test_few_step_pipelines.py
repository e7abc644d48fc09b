"""Each family of pipelines distilled by methods that sample in few steps, exported, and sampled by diffusers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scaletrain.export import plain_pipeline as plain
from scaletrain.export.run import Form, export_run
from tests.unit.diffusers_pipelines import COUNT, FAMILIES, SIDE, STEPS, Pipes, distil, texts, write_data

diffusers = pytest.importorskip("diffusers")

CONDITIONAL = [family for family in FAMILIES if family != "unconditional"]
ADAM = {"optimizer": {"type": "adam", "lr": 1e-3}}
METHODS: dict[str, dict[str, Any]] = {
    "lcm": {"objective": {"type": "lcm"}},
    "dmd2": {"objective": {"type": "dmd2", "every": 2}, "players": {"fake_score": ADAM}},
    "criticised": {
        "objective": {"type": "dmd2", "every": 2, "adversarial": 0.1, "r1": 0.1},
        "players": {"fake_score": ADAM, "critic": ADAM},
        "networks": {"critic": {"config": {"features": [8, 8], "time_features": 16}}},
    },
    "adversarial": {
        "objective": {"type": "adversarial"},
        "players": {"critic": ADAM},
        "networks": {"critic": {"config": {"features": [8, 8], "time_features": 16}}},
    },
    "reflow": {"objective": {"type": "reflow", "teacher_steps": 3}},
}


def samples(pipe: Any, family: str, steps: int = STEPS) -> torch.Tensor:
    """Return what a pipeline of diffusers makes of random texts, or of some classes."""
    options = {"num_inference_steps": steps, "guidance_scale": 1.0, "height": 2 * SIDE, "width": 2 * SIDE}
    inputs = {"class_labels": torch.tensor([7, 3])} if family == "dit" else texts(family)
    return plain.samples(pipe, inputs, 0, {**options, "use_resolution_binning": False})


def part_of(pipe: Any) -> Any:
    return pipe.components.get("unet") or pipe.transformer


@pytest.mark.slow
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("method", ["lcm", "dmd2"])
@pytest.mark.parametrize("family", CONDITIONAL)
def test_every_family_is_distilled_exported_and_sampled(
    family: str, method: str, pipes: Pipes, tmp_path: Path
) -> None:
    folder, before = pipes(family)
    run = distil(folder, write_data(tmp_path, family, (4, SIDE, SIDE)), tmp_path, **METHODS[method])
    written = {w.path.name: w for w in export_run(run, tmp_path / "out")}["student"]
    assert "samples of 4 steps from the same noise" in written.notes[0]
    pipe = plain.load(str(written.path), None)
    assert type(pipe) is type(before)
    flow = family in ("stable_diffusion_3", "flux")
    name = "FlowMatchEulerDiscreteScheduler" if flow else "LCMScheduler"
    assert type(pipe.scheduler).__name__ == name
    assert pipe.scheduler.config.get("stochastic_sampling", True)
    old, new = (dict(part_of(p).named_parameters()) for p in (before, pipe))
    assert any(not torch.equal(old[key], new[key]) for key in new)
    assert samples(pipe, family).isfinite().all()
