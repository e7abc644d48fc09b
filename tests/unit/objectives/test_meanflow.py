"""MeanFlow against finite differences and a Gaussian's flow in closed form, and broken on purpose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from scaletrain.diffusion.denoiser import Denoiser
from scaletrain.diffusion.path import EDM, AnyPath, Cosine, Flow, Trig
from scaletrain.diffusion.prediction import Prediction
from scaletrain.diffusion.reading import Reading
from scaletrain.errors import UserError
from scaletrain.explain import decode
from scaletrain.networks import point_denoiser, unet
from scaletrain.objectives import meanflow
from scaletrain.recipe import objective_of
from tests.unit.objectives.jumping import Knows, draws, made, teacher_of, trained

PLAIN = {"type": "meanflow", "path": "flow", "prediction": "velocity", "weighting": "plain", "power": 0.0}
POINTS = decode(point_denoiser.Config, {"dim": 3, "hidden": [16, 16], "target": True, "fastest": 6})
PICTURES = decode(
    unet.Config, {"height": 8, "width": 8, "features": [8, 16], "middle": 1, "target": True, "fastest": 6}
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("path", "prediction"), [(Flow(), "velocity"), (Flow(), "edm"), (Cosine(), "v"), (EDM(), "edm"), (Trig(), "eps")]
)
@pytest.mark.parametrize("pictures", [False, True])
def test_the_jvp_is_that_of_finite_differences(path: AnyPath, prediction: Prediction, pictures: bool) -> None:
    network = unet.build(PICTURES) if pictures else point_denoiser.build(POINTS)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    student = Denoiser(network.double(), Reading(path=path, prediction=prediction, data_std=0.7))
    z, v = torch.randn(2, 4, *((1, 8, 8) if pictures else (3,)), dtype=torch.float64)
    t = path.first + (path.last - path.first) * torch.tensor([0.2, 0.5, 0.7, 0.9]).double()
    s, step = 0.5 * (t + path.first), 1e-5 * path.last

    def u(sign: int) -> Tensor:
        return student.given(target=path.told(s)).velocity(z + sign * step * v, t + sign * step)

    found = meanflow.rate(student, z, t, s, v)
    assert not found.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(found, (u(1) - u(-1)) / (2 * step), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("whole", [0.0, 0.5])
@pytest.mark.parametrize("path", [Flow(), Cosine()], ids=lambda p: p.type)
def test_the_exact_average_velocity_has_no_loss_and_others_have(path: AnyPath, whole: float) -> None:
    objective = made({**PLAIN, "path": path.type, "whole": whole})
    for wrong, right in ((0.0, True), (0.05, False)):
        networks = {"student": Knows(path, wrong), "teacher": teacher_of(objective)}
        loss = float(objective.loss(objective.turns[0], networks, draws(400))["loss"].sum) / 400
        assert (loss < 1e-8) == right
        assert (loss > 1e-3) == (not right)


def test_from_data_the_exact_average_velocity_is_the_mean_of_the_targets() -> None:
    objective = made({**PLAIN, "learn": "data"})
    x0 = teacher_of(objective).draw(200_000)
    jumps = objective.jumps(objective.denoiser(Knows(Flow())), None, x0)
    left = jumps.eps - jumps.x0 - Knows(Flow())(jumps.z, jumps.t, jumps.told)
    for feature in (torch.ones_like(jumps.z), jumps.z, jumps.t[:, None], (jumps.t * jumps.told)[:, None]):
        mean = (left * feature).mean(0)
        assert (mean.abs() < 4 * (left * feature).std(0) / len(x0) ** 0.5).all()


def test_it_learns_and_broken_on_purpose_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**PLAIN, "prediction": "edm", "whole": 0.5, "power": 0.5}
    exact = meanflow.rate

    def figure() -> float:
        return trained(made(options), steps=300, lr=2e-3)[1]

    right = figure()
    assert right < 0.15
    wrong: Any
    for wrong in (
        lambda *inputs: torch.zeros_like(inputs[1]),  # no derivative: the velocity itself
        lambda *inputs: -exact(*inputs),
        lambda student, z, t, s, v: exact(student, z, t, s, torch.zeros_like(v)),  # the time's part alone
    ):
        monkeypatch.setattr(meanflow, "rate", wrong)
        assert figure() > 2 * right + 0.05


def test_compiled_networks_are_refused() -> None:
    recipe = made(PLAIN).recipe
    compiled = recipe.model_copy(update={"train": recipe.train.model_copy(update={"compile": "network"})})
    with pytest.raises(UserError, match=r"train\.compile: meanflow differentiates forward"):
        objective_of(compiled)
