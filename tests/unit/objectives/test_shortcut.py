"""Shortcut models against a Gaussian's flow in closed form, and broken on purpose."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scaletrain.diffusion.denoiser import Denoiser
from scaletrain.diffusion.path import Flow
from scaletrain.diffusion.solvers import ddim_step
from tests.unit.objectives.jumping import TWO, Knows, made, small, teacher_of, trained


class KnowsSizes(Knows):
    """The same, told the logarithm of the size of the jump, 1 to 0 from all of it to half of the finest."""

    def __init__(self, finest: int, wrong: float = 0.0):
        super().__init__(Flow(), wrong)
        self.finest = finest

    def forward(self, z: Tensor, t: Tensor, target: Tensor) -> Tensor:
        size = torch.where(target == 0, 0, 2.0 ** ((target - 1) * math.log2(2 * self.finest)))
        return super().forward(z, t, t - size)


PLAIN = {"type": "shortcut", "path": "flow", "prediction": "velocity", "weighting": "plain"}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_the_exact_flow_answers_all_targets_but_those_of_the_finest_jumps() -> None:
    objective = made({**PLAIN, "finest": 16})
    teacher = objective.teacher({"teacher": teacher_of(objective)})
    student, wrong = (objective.denoiser(KnowsSizes(16, wrong)) for wrong in (0.0, 0.05))
    for model, is_right in ((student, True), (wrong, False)):
        jumps = objective.jumps(model, teacher, 1.5 + torch.randn(500, 2))
        error = (KnowsSizes(16)(jumps.z, jumps.t, jumps.told) - (jumps.eps - jumps.x0)).abs().amax(1)
        finest = jumps.told < 0.3
        assert finest.any()
        assert (error[~finest].max() < 1e-4) == is_right
        assert 1e-4 < error[finest].max() < 0.6


def test_the_target_is_the_mean_of_two_half_steps() -> None:
    """Frans et al., equation 4, one sample at a time; half of the finest is told as none."""
    objective = made({**PLAIN, "finest": 4, "learn": "data"}, TWO)
    network = small(objective)
    torch.nn.init.normal_(network.last.weight, std=0.1)
    torch.nn.init.normal_(network.conditions.target.weight, std=0.1)
    with torch.no_grad():
        jumps = objective.jumps(objective.denoiser(network), None, torch.randn(90, 2))
        sizes = set()
        for i in range(90):
            z, t, told = (part[i : i + 1] for part in jumps[:3])
            level = round(float(told) * 3)  # 1 for a quarter, 2 for a half, 3 for all
            size, half = 2 ** (level - 3), told - 1 / 3
            sizes.add(size)
            first = network(z, t, target=half)
            second = network(z - size / 2 * first, t - size / 2, target=half)
            torch.testing.assert_close(jumps.eps[i] - jumps.x0[i], ((first + second) / 2)[0], atol=1e-4, rtol=1e-4)
    assert sizes == {1.0, 0.5, 0.25}


def test_the_finest_jumps_are_the_teachers() -> None:
    objective = made({**PLAIN, "finest": 2, "prediction": "edm"}, TWO)
    teacher = teacher_of(objective)
    with torch.no_grad():
        student, exact = objective.denoiser(small(objective)), objective.teacher({"teacher": teacher})
        jumps = objective.jumps(student, exact, torch.randn(40, 2))
    for i in range(40):
        z, t, told = (part[i : i + 1] for part in jumps[:3])
        if float(told) == 0.5:
            reached = z
            for now in (t, t - 0.25):
                reached = reached - 0.25 * (reached - teacher(reached, 1 - now, now)) / now
            velocity = jumps.eps[i] - jumps.x0[i]
            torch.testing.assert_close(z[0] - 0.5 * velocity, reached[0], atol=1e-4, rtol=1e-4)
    assert set(jumps.told.tolist()) == {0.5, 1.0}


def test_it_learns_and_broken_on_purpose_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**PLAIN, "prediction": "edm", "finest": 8}
    _, right = trained(made(options, TWO))
    assert right < 0.15
    assert trained(made({**options, "learn": "data"}, TWO))[1] < 0.3
    halves = []
    step = ddim_step

    def first(student: Denoiser, z: Tensor, t: Tensor, s: Tensor) -> Tensor:  # wrong target: the second half is lost
        halves.append(t)
        return step(student, z, t, s) if len(halves) % 2 else z

    monkeypatch.setattr("scaletrain.objectives.shortcut.ddim_step", first)
    broken = made(options, TWO)
    monkeypatch.setattr(broken, "sampler", lambda network: one_step(broken, network))
    assert trained(broken)[1] > 3 * right + 0.05


def one_step(objective: Any, network: nn.Module) -> Any:
    """Return a sampler that is not broken."""

    def draw(noise: Tensor, steps: int, told: Any) -> Tensor:
        assert steps == 1
        one = torch.ones(len(noise))
        return objective.denoiser(network).given(target=one)(noise, one)[0]

    return draw
