"""CTM against a Gaussian's flow in closed form, and broken on purpose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from scaletrain.diffusion.denoiser import Denoiser
from scaletrain.diffusion.path import AnyPath, Cosine, Flow, Trig
from scaletrain.objectives import ctm
from tests.unit.objectives.jumping import TWO, Knows, draws, flowed, made, small, teacher_of, trained

PLAIN = {"type": "ctm", "path": "flow", "prediction": "velocity", "weighting": "plain", "learn": "teacher"}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def loss(objective: Any, student: Any, count: int = 400) -> float:
    networks = {"student": student, "teacher": teacher_of(objective)}
    return float(objective.loss(objective.turns[0], networks, draws(count))["loss"].sum) / count


@pytest.mark.parametrize("sampled", [0.0, 0.5])
def test_the_exact_flow_has_no_loss_and_others_have(sampled: float, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = made({**PLAIN, "teacher_steps": 64, "solver_steps": 8, "solver": "heun", "sampled": sampled})
    assert loss(objective, Knows(Flow())) < 1e-6  # what the solver leaves
    assert loss(objective, Knows(Flow(), wrong=0.05)) > 1e-3

    def solved(teacher: Denoiser, z: Tensor, grid: Tensor, start: Tensor, end: Tensor) -> Tensor:
        return flowed(Flow(), z, grid[start], grid[end])

    monkeypatch.setattr(objective, "solved", solved)
    assert loss(objective, Knows(Flow())) < 1e-9


@pytest.mark.parametrize("path", [Cosine(), Flow(), Trig()], ids=lambda p: p.type)
@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_the_solver_goes_along_the_flow_to_where_each_sample_is_to_go(path: AnyPath, solver: str) -> None:
    options = {**PLAIN, "path": path.model_dump(), "prediction": "v", "solver": solver}
    objective = made({**options, "teacher_steps": 128, "solver_steps": 128}, TWO)
    teacher = objective.teacher({"teacher": teacher_of(objective)})
    grid = torch.tensor(path.grid(128))
    start, end = torch.tensor([0, 10, 64, 30]), torch.tensor([128, 100, 65, 30])
    z = torch.randn(4, 2)
    found = objective.solved(teacher, z, grid, start, end)
    for i in range(3):

        def slope(t: float, y: Any) -> Any:
            return teacher.velocity(torch.tensor(y).double()[None], torch.tensor([t]).double())[0].numpy()

        last = max(float(grid[end[i]]), 1e-4)
        exact = solve_ivp(slope, (float(grid[start[i]]), last), z[i].double().numpy(), rtol=1e-6).y[:, -1]
        torch.testing.assert_close(
            found[i].double(), torch.tensor(exact), atol=0.05 if solver == "ddim" else 5e-3, rtol=0
        )
    assert torch.equal(found[3], z[3])


def test_the_target_is_the_solver_and_then_the_student(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written out for the straight path, one sample at a time."""
    objective = made({**PLAIN, "teacher_steps": 8, "solver_steps": 3}, TWO)
    student, teacher = small(objective), teacher_of(objective)
    torch.nn.init.normal_(student.last.weight, std=0.1)
    torch.nn.init.normal_(student.conditions.target.weight, std=0.1)
    taken = []
    solved = objective.solved

    def watched(of: Denoiser, z: Tensor, grid: Tensor, start: Tensor, end: Tensor) -> Tensor:
        taken.append((start, end))
        return solved(of, z, grid, start, end)

    monkeypatch.setattr(objective, "solved", watched)
    with torch.no_grad():
        jumps = objective.jumps(
            objective.denoiser(student), objective.teacher({"teacher": teacher}), torch.randn(60, 2)
        )
        ((start, end),) = taken
        for i in range(60):
            z, t = jumps.z[i : i + 1], 1 - int(start[i]) / 8
            assert float(jumps.t[i]) == t
            for n in range(int(start[i]), int(end[i])):
                now = torch.tensor([1 - n / 8])
                x0 = teacher(z, 1 - now, now)
                z = z - (z - x0) / now / 8
            u, s = 1 - end[i : i + 1] / 8, jumps.told[i : i + 1]
            z = z - (u - s) * student(z, u, target=s) if u > s else z
            velocity = jumps.eps[i] - jumps.x0[i]
            torch.testing.assert_close(jumps.z[i] - (t - s) * velocity, z[0], atol=1e-4, rtol=1e-4)
    assert {int(n) for n in end - start} == {1, 2, 3}


def test_it_learns_and_broken_on_purpose_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**PLAIN, "prediction": "edm", "teacher_steps": 16, "solver_steps": 4, "sampled": 0.5}
    _, right = trained(made(options, TWO))
    assert right < 0.1
    still = made(options, TWO)
    monkeypatch.setattr(still, "solved", lambda teacher, z, grid, start, end: z)  # wrong target: the solver stays
    assert trained(still)[1] > 3 * right + 0.05
    # no boundary: the student's answer is taken for where the jump leads, whatever s is
    monkeypatch.setattr(ctm, "ddim_jump", lambda student, z, t, s: student(z, t)[0])
    assert trained(made(options, TWO))[1] > 3 * right + 0.05
