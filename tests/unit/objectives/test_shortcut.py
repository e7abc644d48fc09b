"""Shortcut models against a Gaussian's flow in closed form, and broken on purpose."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scaletrain.diffusion.denoiser import Denoiser
from scaletrain.diffusion.path import Flow
from scaletrain.objectives import shortcut
from tests.unit.objectives.jumping import TWO, Knows, made, small, teacher_of, trained

PLAIN = {"type": "shortcut", "path": "flow", "prediction": "velocity", "weighting": "plain"}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_the_exact_flow_answers_all_targets_but_those_of_the_finest_jumps() -> None:
    objective = made({**PLAIN, "finest": 16})
    teacher = objective.teacher({"teacher": teacher_of(objective)})
    student, wrong = (objective.denoiser(Knows(Flow(), wrong)) for wrong in (0.0, 0.05))
    for model, is_right in ((student, True), (wrong, False)):
        jumps = objective.jumps(model, teacher, 1.5 + torch.randn(500, 2))
        error = (Knows(Flow())(jumps.z, jumps.t, jumps.s) - (jumps.eps - jumps.x0)).abs().amax(1)
        finest = jumps.t - jumps.s < 1.5 / 16
        assert finest.any()
        assert (error[~finest].max() < 1e-4) == is_right
        assert 1e-4 < error[finest].max() < 0.2


def test_the_target_is_the_mean_of_two_half_steps() -> None:
    """Frans et al., equation 4, one sample at a time; half of the finest is told as no step."""
    objective = made({**PLAIN, "finest": 4}, TWO)
    network = small(objective)
    torch.nn.init.normal_(network.last.weight, std=0.1)
    torch.nn.init.normal_(network.conditions.target.weight, std=0.1)
    with torch.no_grad():
        jumps = objective.jumps(objective.denoiser(network), None, torch.randn(90, 2))
        sizes = set()
        for i in range(90):
            z, t, s = (part[i : i + 1] for part in jumps[:3])
            size = float(t - s)
            sizes.add(size)
            half = 0.0 if size == 0.25 else size / 2
            first = network(z, t, target=t - half)
            middle = t - size / 2
            second = network(z - size / 2 * first, middle, target=middle - half)
            torch.testing.assert_close(jumps.eps[i] - jumps.x0[i], ((first + second) / 2)[0], atol=1e-4, rtol=1e-4)
    assert sizes == {1.0, 0.5, 0.25}


def test_it_learns_and_broken_on_purpose_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**PLAIN, "finest": 8, "still": 0.4}
    _, right = trained(made(options, TWO))
    assert right < 0.03
    assert trained(made({**options, "learn": "data"}, TWO))[1] < 0.1

    def whole(student: Denoiser, z: Tensor, t: Tensor, s: Tensor) -> Tensor:  # wrong target: one half step, and no more
        return z if not calls.append(0) and len(calls) % 2 == 0 else step(student, z, t, s)

    calls: list[int] = []
    step = shortcut.ddim_step
    monkeypatch.setattr(shortcut, "ddim_step", whole)
    assert trained(made(options, TWO))[1] > 3 * right + 0.05
