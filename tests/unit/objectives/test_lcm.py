"""Latent consistency: the guided target against the teacher's two calls, what the student is told, and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from scaletrain.config import AdapterSpec, NetworkSpec
from scaletrain.errors import UserError
from scaletrain.networks.build import build, save
from scaletrain.networks.mixture import Mixture
from tests.unit.objectives.small import TURN, draws, made, networks

LCM = {"type": "lcm", "condition": "label"}
SCALED = {**LCM, "scales": [1.0, 4.0], "guidance": 2.0}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def observed(objective: Any, nets: dict[str, Any]) -> dict[str, Tensor]:
    """Return what the loss compared, and what the student was told of it."""
    seen: dict[str, Tensor] = {}
    difference = objective.difference

    def watch(student: Any, target: Any, z: Tensor, t: Tensor, y: Tensor, s: Tensor) -> Tensor:
        assert all(torch.equal(student.told[k], target.told[k]) for k in student.told)
        seen.update(student.told, z=z, t=t, y=y, s=s)
        found: Tensor = difference(student, target, z, t, y, s)
        return found

    objective.difference = watch
    objective.loss(TURN, nets, draws(32))
    return seen


@pytest.mark.parametrize("options", [SCALED, {**LCM, "guidance": 3.0}])
def test_the_guided_step_is_made_of_the_teachers_two_calls(options: dict[str, Any]) -> None:
    objective = made(options)
    nets = networks(objective, noisy=True)
    seen = observed(objective, nets)
    z, t, s, path = seen["z"].double(), seen["t"].double(), seen["s"].double(), objective.signature.reading.path
    scale = seen.get("guidance", torch.full((32,), 3.0))[:, None]
    (alpha, sigma), (alpha_s, sigma_s) = path.at(t, z), path.at(s, z)
    mixture = nets["teacher"]
    assert isinstance(mixture, Mixture)
    with_, without = (mixture(z, *path.alpha_sigma(t), label) for label in (seen["label"], None))
    x0 = without + scale * (with_ - without)  # Ho & Salimans, 2021, equation 6
    expected = alpha_s * x0 + sigma_s * (z - alpha * x0) / sigma
    torch.testing.assert_close(seen["y"].double(), expected, rtol=1e-3, atol=1e-4)


def test_scales_are_spread_over_their_range() -> None:
    objective = made(SCALED)
    scale = observed(objective, networks(objective))["guidance"]
    assert ((scale >= 1) & (scale <= 4)).all()
    assert float(scale.std()) > 0.6
    assert objective.signature.guidance == (1.0, 4.0)
    assert objective.networks()["student"].config["guidance"] is True
    assert "guidance" not in made({**LCM, "guidance": 3.0}).networks()["student"].config


def test_times_are_one_fiftieth_of_the_path_apart() -> None:
    objective = made(LCM)
    seen = observed(objective, networks(objective))
    torch.testing.assert_close(seen["s"], (seen["t"] - 1 / 50).clamp(min=0), rtol=0, atol=1e-6)


def test_samples_are_drawn_at_the_recipes_scale() -> None:
    objective = made(SCALED)
    nets, told = networks(objective, noisy=True), []
    torch.nn.init.normal_(nets["student"].conditions.guidance.weight)
    nets["student"].register_forward_pre_hook(lambda module, args, kwargs: told.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        noise = torch.randn(4, 2)
        objective.sampler(nets["student"])(noise, 2, objective.conditions(noise))
    assert len(told) == 2
    assert all(torch.equal(kwargs["guidance"], torch.full((4,), 2.0)) for kwargs in told)


# --- LCM-LoRA ---------------------------------------------------------------------------------------------------------

DENOISERS: dict[str, dict[str, Any]] = {
    "point_denoiser": {"dim": 2, "hidden": [16, 16], "classes": 3},
    "unet": {"height": 8, "width": 8, "features": [8, 16], "middle": 1, "time_features": 16, "classes": 3},
}


@pytest.mark.parametrize(
    ("type_", "targets"), [("point_denoiser", None), ("point_denoiser", ["first"]), ("unet", ["conv1", "conv2"])]
)
def test_only_the_adapter_is_trained_and_saved(type_: str, targets: list[str] | None, tmp_path: Path) -> None:
    base = NetworkSpec(type=type_, config=DENOISERS[type_])
    teacher: Any = build("teacher", base)
    torch.nn.init.normal_(teacher.last.weight)  # at first it is 0
    spec = NetworkSpec(type=type_, adapter=AdapterSpec(type="lora", r=4, targets=targets))
    student = build("student", spec, base=build_as(teacher, base))
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)
    shape = (2, 2) if type_ == "point_denoiser" else (2, 1, 8, 8)
    z, t, label = torch.randn(shape), torch.rand(2), torch.tensor([0, 3])
    for name, p in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    save(student, spec, tmp_path)
    assert all("lora" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    again = build("student", spec, base=build_as(teacher, base), saved=tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(z, t, label=label), student(z, t, label=label))
        assert not torch.equal(teacher(z, t, label=label), student(z, t, label=label))


def build_as(teacher: Any, spec: NetworkSpec) -> Any:
    """Return a copy of a network."""
    copied = build("teacher", spec)
    copied.load_state_dict(teacher.state_dict())
    return copied


# --- what users can get wrong -----------------------------------------------------------------------------------------


def test_bad_options_are_refused() -> None:
    with pytest.raises(UserError, match="no range above 0"):
        made({**LCM, "scales": [3.0, 1.0]})
    with pytest.raises(UserError, match="not one of the scales"):
        made({**LCM, "scales": [1.0, 4.0], "guidance": 5.0})
    with pytest.raises(UserError, match="no condition to be guided by"):
        made({"type": "lcm", "guidance": 3.0})
    with pytest.raises(UserError, match="train_also"):
        made(SCALED, adapter={"type": "lora"})
    made({**LCM, "guidance": 2.0}, adapter={"type": "lora"})
    made(SCALED, adapter={"type": "lora", "train_also": ["conditions.guidance"]})
