"""What the students that jump share, against a Gaussian's flow in closed form and formulas written out here."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from scaletrain.diffusion.denoiser import Denoiser
from scaletrain.diffusion.jumps import any_pairs, ddim_jump, euler_jump, sampler_pairs, travel
from scaletrain.diffusion.path import EDM, AnyPath, Cosine, Flow, Linear, Trig
from scaletrain.diffusion.prediction import Prediction
from scaletrain.diffusion.reading import Reading
from scaletrain.errors import UserError
from tests.unit.objectives.jumping import MEAN, STD, TWO, Knows, draws, flowed, made, small, teacher_of

CPU = torch.device("cpu")
PLAIN = {"path": "flow", "prediction": "velocity", "weighting": "plain"}
METHODS: dict[str, dict[str, Any]] = {
    "ctm": {"type": "ctm", "teacher_steps": 16, **PLAIN},
    "shortcut": {"type": "shortcut", **PLAIN},
    "meanflow": {"type": "meanflow", **PLAIN},
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "velocity", "edm"])
@pytest.mark.parametrize("path", [Cosine(), Linear(), EDM(), Flow(), Trig()], ids=lambda p: p.type)
def test_a_jump_from_a_time_to_itself_leads_nowhere(path: AnyPath, prediction: Prediction) -> None:
    def network(z: Tensor, t: Tensor, target: Tensor) -> Tensor:
        return torch.sin(3 * z) + torch.cos(t + target)[:, None]

    student = Denoiser(network, Reading(path=path, prediction=prediction, data_std=0.7))
    z = torch.randn(50, 2, dtype=torch.float64)
    t = path.first + (path.last - path.first) * torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    torch.testing.assert_close(ddim_jump(student, z, t, t), z)
    torch.testing.assert_close(euler_jump(student, z, t, t), z)


def test_a_jump_where_alpha_is_one_is_that_of_the_paper() -> None:
    student = Denoiser(lambda z, t, target: torch.sin(z), Reading(path=EDM(), prediction="x0"))
    z, t, s = torch.randn(9, 2), torch.full((9,), 3.0), torch.full((9,), 0.4)
    torch.testing.assert_close(ddim_jump(student, z, t, s), 0.4 / 3 * z + (1 - 0.4 / 3) * torch.sin(z))


def test_a_jump_on_the_straight_path_is_a_step_along_the_velocity() -> None:
    student = Denoiser(lambda z, t, target: torch.sin(z), Reading(path=Flow(), prediction="velocity"))
    z, t, s = torch.randn(9, 2), torch.full((9,), 0.75), torch.full((9,), 0.5)
    torch.testing.assert_close(ddim_jump(student, z, t, s), z - 0.25 * torch.sin(z))
    torch.testing.assert_close(euler_jump(student, z, t, s), z - 0.25 * torch.sin(z))


@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("move", [ddim_jump, euler_jump])
def test_travel_ends_in_the_distribution_whatever_noise_is_put_back(move: Any, steps: int, gamma: float) -> None:
    student = Denoiser(Knows(Flow()), Reading(path=Flow(), prediction="velocity"))
    noise = torch.randn(40_000, 2)
    samples = travel(student, move, noise, steps, gamma)
    torch.testing.assert_close(samples.mean(0), MEAN, atol=0.01, rtol=0)
    torch.testing.assert_close(samples.std(0), torch.tensor([STD, STD]), atol=0.01, rtol=0)
    exact = flowed(Flow(), noise, torch.ones(len(noise)), torch.zeros(len(noise)))
    kept = gamma == 0 or steps == 1
    assert torch.allclose(samples, exact, atol=1e-4) == kept


def test_pairs_of_times_are_all_alike() -> None:
    first, last = any_pairs(6000, 3, CPU)
    counts = Counter(zip(first.tolist(), last.tolist(), strict=True))
    assert set(counts) == {(a, b) for a in range(4) for b in range(a + 1, 4)}
    assert max(counts.values()) - min(counts.values()) < 160


def test_sampler_pairs_are_the_jumps_of_samplers() -> None:
    first, last = sampler_pairs(9000, [1, 2, 4], 8, CPU)
    counts = Counter(zip(first.tolist(), last.tolist(), strict=True))
    assert set(counts) == {(0, 8), (0, 4), (4, 8), (0, 2), (2, 4), (4, 6), (6, 8)}
    assert counts[0, 8] == pytest.approx(3000, abs=2)
    assert counts[4, 8] == pytest.approx(1500, abs=150)
    assert counts[6, 8] == pytest.approx(750, abs=120)


@pytest.mark.parametrize("method", METHODS)
def test_samples_have_their_share_in_the_smallest_batches(method: str) -> None:
    objective = made({**METHODS[method], "still": 0.3})
    still = 0
    jumps = objective.jumps

    def watched(student: Denoiser, teacher: Denoiser | None, x0: Tensor) -> Any:
        nonlocal still
        still += 1 - len(x0)
        return jumps(student, teacher, x0)

    objective.jumps = watched
    networks = {"student": Knows(Flow()), "teacher": teacher_of(objective)}
    for _ in range(100):
        with torch.no_grad():
            objective.loss(objective.turns[0], networks, draws(1))
    assert still == pytest.approx(30, abs=15)


@pytest.mark.parametrize("method", METHODS)
def test_adaptive_weights_divide_without_a_gradient(method: str) -> None:
    losses, gradients = [], []
    for power in (0.0, 1.0):
        torch.manual_seed(1)
        objective = made({**METHODS[method], "power": power}, TWO)
        networks = {"student": small(objective), "teacher": teacher_of(objective)}
        torch.manual_seed(2)
        loss = objective.loss(objective.turns[0], networks, draws(1))["loss"].sum
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(networks["student"].last.bias.grad)
    assert losses[1] == pytest.approx(losses[0] / (losses[0] + 1e-3), rel=1e-4)
    torch.testing.assert_close(gradients[1], gradients[0] / (losses[0] + 1e-3))


@pytest.mark.parametrize("method", METHODS)
def test_targets_hold_still(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient is that of an error to targets that another network, of the same weights, makes."""
    objective = made({**METHODS[method], "power": 0.0}, TWO)
    student = small(objective)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    networks = {"student": student, "teacher": teacher_of(objective)}
    caught = []
    jumps = objective.jumps

    def watched(own: Denoiser, teacher: Denoiser | None, x0: Tensor) -> Any:
        found = jumps(objective.denoiser(deepcopy(student)), teacher, x0)
        caught.append(found)
        return found

    def gradient(of: Any) -> Tensor:
        student.zero_grad()
        torch.manual_seed(3)
        monkeypatch.setattr(objective, "jumps", of)
        objective.loss(objective.turns[0], networks, draws(32))["loss"].sum.backward()
        return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])

    torch.testing.assert_close(gradient(jumps), gradient(watched))
    assert len(caught[0].z) in (8, 24)
    right = gradient(jumps)
    monkeypatch.setattr(torch, "no_grad", nullcontext)  # broken on purpose: no stop-gradient
    assert not torch.allclose(gradient(jumps), right, rtol=1e-2)


def test_the_velocity_may_come_from_data_alone() -> None:
    for method in ("shortcut", "meanflow"):
        objective = made({"type": method, "path": "flow", "learn": "data", "size": 8}, None, "sklearn:digits")
        assert not objective.needs_teacher
        assert objective.networks()["student"].config["target"] is True
        assert objective.signature.shape == (1, 8, 8)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(UserError, match=r"networks\.teacher is missing"):
        made({"type": "meanflow", "path": "flow"}, None)
    with pytest.raises(UserError, match=r"networks\.teacher is missing: say whose solver"):
        made({"type": "ctm", "path": "flow"}, None)
    with pytest.raises(UserError, match=r"objective\.finest \(12\) must be a power of 2"):
        made({"type": "shortcut", "finest": 12})
    with pytest.raises(UserError, match=r"objective\.teacher_steps \(18\) must be a multiple of 4"):
        made({"type": "ctm", "sampled": 0.5, "teacher_steps": 18})
