"""Paths, predictions and the sampler against closed forms; the two objectives against formulas written out here."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from scaletrain.config import Recipe
from scaletrain.data.dataset import TensorDataset
from scaletrain.diffusion.denoiser import Denoiser
from scaletrain.diffusion.path import Cosine, stratified
from scaletrain.diffusion.prediction import Prediction, Weighting, from_x0, to_eps, to_x0, weight
from scaletrain.diffusion.solvers import ddim_step, implied_x0, sample
from scaletrain.errors import UserError
from scaletrain.objectives import diffusion, progressive
from scaletrain.objectives.base import Data, RunView
from scaletrain.player import Turn

KINDS: tuple[Prediction, ...] = ("eps", "x0", "v")
PATH = Cosine()
TURN = Turn("train", "model")


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_cosine_path_preserves_variance_and_spans_log_snr_20_to_minus_20() -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha, sigma = PATH.alpha_sigma(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t))
    log_snr = 2 * torch.log(alpha / sigma)
    # Salimans & Ho's code: -2 log tan(a t + b), a + b and b the angles at which it is -20 and 20
    b = math.atan(math.exp(-10))
    a = math.atan(math.exp(10)) - b
    np.testing.assert_allclose(log_snr, -2 * np.log(np.tan(a * t.numpy() + b)), rtol=1e-9, atol=1e-12)
    assert log_snr[0] == pytest.approx(20)
    assert log_snr[-1] == pytest.approx(-20)
    for end in PATH.alpha_sigma(torch.tensor([0.0, 1.0])):
        assert (end > 0).all()  # in fp32 too


@pytest.mark.parametrize("kind", KINDS)
def test_every_prediction_gives_back_x0_and_eps(kind: Prediction) -> None:
    x0, eps, t = draw(50, 3), draw(50, 3), torch.rand(50, dtype=torch.float64)
    alpha, sigma = PATH.at(t, x0)
    z = PATH.noisy(x0, eps, t)
    told = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[kind]
    torch.testing.assert_close(from_x0(kind, x0, z, alpha, sigma), told)
    torch.testing.assert_close(to_x0(kind, told, z, alpha, sigma), x0)
    torch.testing.assert_close(to_eps(kind, told, z, alpha, sigma), eps)


@pytest.mark.parametrize("kind", KINDS)
def test_conversions_hold_off_the_variance_preserving_circle(kind: Prediction) -> None:
    x0, eps, alpha, sigma = draw(9, 2), draw(9, 2), torch.tensor(0.6), torch.tensor(1.7)
    z = alpha * x0 + sigma * eps
    told = from_x0(kind, x0, z, alpha, sigma)
    torch.testing.assert_close(to_x0(kind, told, z, alpha, sigma), x0)
    torch.testing.assert_close(to_eps(kind, told, z, alpha, sigma), eps)


WEIGHTS = {
    "snr": lambda snr: snr,
    "snr_plus_one": lambda snr: snr + 1,
    "truncated_snr": lambda snr: max(snr, 1.0),
    "min_snr": lambda snr: min(snr, 5.0),
}


@pytest.mark.parametrize("weighting", WEIGHTS)
def test_loss_is_the_weighted_x0_error_whatever_the_network_predicts(weighting: Weighting) -> None:
    x0, wrong, t = draw(40, 3), draw(40, 3), torch.linspace(0.05, 0.95, 40, dtype=torch.float64)
    z = PATH.noisy(x0, draw(40, 3), t)
    alpha, sigma = PATH.at(t, z)
    factor = [
        WEIGHTS[weighting]((a / s) ** 2)
        for a, s in zip(alpha.flatten().tolist(), sigma.flatten().tolist(), strict=True)
    ]
    expected = torch.tensor(factor) * ((wrong - x0) ** 2).mean(1)
    for kind in KINDS:
        answer = from_x0(kind, wrong, z, alpha, sigma)
        loss = Denoiser(lambda z, t, answer=answer: answer, PATH, kind).loss(z, t, x0, weighting)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)


def test_plain_losses_have_weight_one() -> None:
    alpha, sigma = PATH.alpha_sigma(torch.rand(20, dtype=torch.float64))
    one = torch.ones(20, dtype=torch.float64)
    torch.testing.assert_close(weight("snr", "eps", alpha, sigma), one)
    torch.testing.assert_close(weight("snr_plus_one", "v", alpha, sigma), one)


# --- a Gaussian, whose posterior mean and probability flow have a closed form -----------------------------------------

MEAN, STD = torch.tensor([0.3, -0.5]), torch.tensor([0.4, 0.1])


def gaussian(kind: Prediction, clip: bool = False) -> Denoiser:
    """The best denoiser of N(MEAN, diag STD²): x̂₀ = m + α s² / (α² s² + σ²) (z − α m)."""

    def network(z: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = PATH.at(t, z)
        x0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (z - alpha * MEAN)
        eps = sigma / (alpha**2 * STD**2 + sigma**2) * (z - alpha * MEAN)
        return {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0}[kind]

    return Denoiser(network, PATH, kind, clip)


@pytest.mark.parametrize("kind", KINDS)
def test_denoiser_is_the_posterior_mean(kind: Prediction) -> None:
    t = torch.full((1,), 0.4)
    alpha, sigma = (float(x) for x in PATH.alpha_sigma(t))
    z = torch.tensor([[0.7, -0.2]])
    x0, eps = gaussian(kind)(z, t)
    for d in range(2):  # integrate p(x0 | z) on a grid
        grid = np.linspace(-4, 4, 20001)
        log = -((grid - float(MEAN[d])) ** 2) / (2 * float(STD[d]) ** 2)
        log -= (float(z[0, d]) - alpha * grid) ** 2 / (2 * sigma**2)
        posterior = np.exp(log - log.max())
        assert float(x0[0, d]) == pytest.approx((grid * posterior).sum() / posterior.sum(), rel=1e-4)
    torch.testing.assert_close(alpha * x0 + sigma * eps, z)


@pytest.mark.parametrize("kind", ["x0", "v"])
def test_many_ddim_steps_follow_the_probability_flow(kind: Prediction) -> None:
    noise = torch.randn(20, 2)
    made = sample(gaussian(kind), noise, 512)
    torch.testing.assert_close(made, MEAN + STD * noise, rtol=0, atol=5e-3)  # the flow of a Gaussian is affine


def test_ddim_step_tends_to_the_ode() -> None:
    denoiser = gaussian("v")

    def slope(t: float, z: np.ndarray) -> np.ndarray:  # dz/dt = α'(t) x0 + σ'(t) ε along the flow
        h = 1e-3
        x0, eps = denoiser(torch.tensor(z, dtype=torch.float32)[None], torch.tensor([t]))
        (a1, s1), (a0, s0) = (PATH.alpha_sigma(torch.tensor(u, dtype=torch.float64)) for u in (t + h, t - h))
        return ((a1 - a0) / (2 * h) * x0 + (s1 - s0) / (2 * h) * eps)[0].double().numpy()

    z = torch.tensor([[0.7, -0.2]])
    exact = solve_ivp(slope, (0.8, 0.5), z[0].numpy(), rtol=1e-6).y[:, -1]
    steps = torch.linspace(0.8, 0.5, 201)
    for t, s in pairwise(steps):
        z = ddim_step(denoiser, z, t[None], s[None])
    np.testing.assert_allclose(z[0], exact, atol=2e-3)


def test_one_step_sample_is_the_prediction_at_pure_noise() -> None:
    noise = torch.randn(5, 2)
    torch.testing.assert_close(sample(gaussian("v"), noise, 1), gaussian("v")(noise, torch.ones(5))[0])


def test_clip_keeps_x0_in_range_and_z_consistent() -> None:
    z, t = 5 * torch.randn(200, 2), torch.full((200,), 0.5)
    alpha, sigma = PATH.at(t, z)
    loose, _ = gaussian("v")(z, t)
    x0, eps = gaussian("v", clip=True)(z, t)
    assert (loose.abs() > 1).any()
    torch.testing.assert_close(x0, loose.clamp(-1, 1))
    torch.testing.assert_close(alpha * x0 + sigma * eps, z)


def test_implied_x0_leads_where_the_teacher_went() -> None:
    teacher, z, t = gaussian("v"), torch.randn(30, 2), torch.full((30,), 0.5)
    middle, end = torch.full((30,), 0.375), torch.full((30,), 0.25)
    reached = ddim_step(teacher, ddim_step(teacher, z, t, middle), middle, end)
    x0 = implied_x0(PATH, z, t, reached, end)
    student = Denoiser(lambda z, t: x0, PATH, "x0")
    torch.testing.assert_close(ddim_step(student, z, t, end), reached, rtol=1e-4, atol=1e-5)


def test_stratified_times_fill_every_stratum() -> None:
    t = stratified(16, torch.device("cpu"))
    assert sorted((t * 16).long().tolist()) == list(range(16))
    means = torch.stack([stratified(16, torch.device("cpu"))[0] for _ in range(2000)])
    assert float(means.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(means.var()) == pytest.approx(1 / 12, abs=0.01)


# --- the objectives ---------------------------------------------------------------------------------------------------


def recipe(**networks: dict[str, object]) -> Recipe:
    return Recipe.model_validate(
        {"objective": {"type": "x"}, "data": {"train": "sklearn:digits"}, "networks": networks}
    )


def test_diffusion_loss_is_the_plain_v_loss() -> None:
    objective = diffusion.Objective(diffusion.Config(), recipe())
    x0 = torch.rand(6, 1, 4, 4) * 2 - 1
    torch.manual_seed(5)
    term = objective.loss(TURN, {"model": lambda z, t: 0.5 * z}, {"image": x0})["loss"]  # type: ignore[dict-item]
    torch.manual_seed(5)
    t = (torch.rand(1) + torch.arange(6) / 6) % 1
    eps = torch.randn_like(x0)
    expected = 0.0
    for i in range(6):
        phi = math.atan(math.exp(-10)) + float(t[i]) * (math.pi / 2 - 2 * math.atan(math.exp(-10)))
        z = math.cos(phi) * x0[i] + math.sin(phi) * eps[i]
        expected += float(((0.5 * z - (math.cos(phi) * eps[i] - math.sin(phi) * x0[i])) ** 2).mean())
    assert term.per == "images"
    assert float(term.sum) == pytest.approx(expected, rel=1e-3)


TEACHER = {"type": "unet", "frozen": True, "from": "stage:teacher/model"}


def test_a_student_that_knows_the_flow_has_no_loss_and_others_have() -> None:
    """At one step, the student's target is the end of the teacher's path from z: known for a Gaussian in many steps."""
    config = progressive.Config(steps=1, teacher_steps=256)
    objective = progressive.Objective(config, recipe(teacher=TEACHER))
    teacher = gaussian("v").network

    def student(z: Tensor, t: Tensor) -> Tensor:  # z_1 is noise, from which the flow leads to m + s z
        assert (t == 1).all()
        return from_x0("v", MEAN + STD * z, z, *PATH.at(t, z))

    batch = {"image": MEAN + STD * torch.randn(64, 2)}
    networks = {"student": student, "teacher": teacher}
    right = objective.loss(TURN, networks, batch)["loss"]  # type: ignore[arg-type]
    networks["student"] = teacher
    wrong = objective.loss(TURN, networks, batch)["loss"]  # type: ignore[arg-type]
    assert right.per == "images"
    assert float(right.sum) / 64 < 1e-4
    assert float(wrong.sum) / 64 > 0.05


def test_student_trains_at_its_own_steps_only_and_teacher_takes_its_own() -> None:
    config = progressive.Config(steps=4, teacher_steps=8)
    objective = progressive.Objective(config, recipe(teacher=TEACHER))
    seen: dict[str, list[float]] = {"student": [], "teacher": []}

    def network(name: str):  # type: ignore[no-untyped-def]
        def call(z: Tensor, t: Tensor) -> Tensor:
            seen[name] += t.tolist()
            return torch.zeros_like(z)

        return call

    networks = {name: network(name) for name in seen}
    objective.loss(TURN, networks, {"image": torch.randn(400, 1, 2, 2)})
    assert {round(8 * t, 4) for t in seen["student"]} == {2, 4, 6, 8}
    assert {round(8 * t, 4) for t in seen["teacher"]} == {1, 2, 3, 4, 5, 6, 7, 8}
    counts = np.bincount((4 * np.array(seen["student"])).round().astype(int))
    assert (counts[1:] == 100).all()


@pytest.mark.parametrize(("steps", "teacher_steps"), [(4, 6), (4, 4), (8, 4)])
def test_steps_must_divide(steps: int, teacher_steps: int) -> None:
    with pytest.raises(UserError, match="teacher_steps"):
        progressive.Objective(progressive.Config(steps=steps, teacher_steps=teacher_steps), recipe(teacher=TEACHER))


@pytest.mark.parametrize("teacher", [{"from": "stage:teacher/model"}, {"type": "unet", "frozen": True}])
def test_teacher_must_be_frozen_and_trained(teacher: dict[str, object]) -> None:
    with pytest.raises(UserError, match="frozen: true"):
        progressive.Objective(progressive.Config(steps=1, teacher_steps=2), recipe(teacher=teacher))


class _Dot(torch.nn.Module):
    """Answers v such that x̂₀ = a fixed factor of z at time 1."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return from_x0("v", self.factor * z, z, *PATH.at(t, z))


def test_report_names_every_student_and_measures_it(tmp_path) -> None:  # type: ignore[no-untyped-def]
    objective = progressive.Objective(
        progressive.Config(steps=1, teacher_steps=2, compare_at=[1], compare_samples=64), recipe(teacher=TEACHER)
    )
    objective._shape = (1, 4, 4)
    rows = {"image": torch.rand(80, 1, 4, 4) * 2 - 1, "label": torch.arange(80) % 2}
    data = Data(TensorDataset(rows), TensorDataset(rows))
    networks = {("s2", "teacher"): _Dot(0.1), ("s2", "student"): _Dot(0.1), ("s1", "student"): _Dot(0.3)}
    options = {
        "teacher": {"type": "diffusion", "steps": 4},
        "s2": {"type": "progressive", "steps": 2, "teacher_steps": 4},
        "s1": {"type": "progressive", "steps": 1, "teacher_steps": 2},
    }
    view = RunView(
        tmp_path, tuple(options), data, torch.device("cpu"), 7, lambda s, n: networks[s, n], options.__getitem__
    )
    report = objective.report(view)
    assert report is not None
    table = report.files["steps.json"]
    assert set(table) == {"floor", "teacher", "student"}
    assert set(table["teacher"]) == {"1", "4"}
    assert set(table["student"]) == {"2", "1"}
    noise = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(7))
    z = noise
    for i in range(4, 0, -1):  # the teacher's four steps written out: x̂₀ = z / 10, ε̂ = (z − α z / 10) / σ
        (a, s), (a2, s2) = (PATH.alpha_sigma(torch.tensor(j / 4)) for j in (i, i - 1))
        z = a2 * 0.1 * z + s2 * (z - a * 0.1 * z) / s
    for who, factor in (("teacher", 0.1), ("student", 0.3)):  # in one step
        rmse = float(((factor * noise).clamp(-1, 1) - z.clamp(-1, 1)).square().mean().sqrt())
        assert table[who]["1"]["rmse_to_teacher"] == pytest.approx(rmse, rel=1e-3)
    assert {"energy_distance", "confident", "smallest_class"} <= set(table["teacher"]["4"])
    assert "same-noise-teacher-4-student-2-1" in report.pictures
    assert "student" in report.text
