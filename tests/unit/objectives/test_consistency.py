"""Consistency in discrete time: its boundary, its targets on a Gaussian in closed form, and what breaks it."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scaletrain.config import Recipe
from scaletrain.data.sources import Rows
from scaletrain.data.tables import ArrayTable
from scaletrain.diffusion.consistency import stops, to_data
from scaletrain.diffusion.denoiser import Denoiser
from scaletrain.diffusion.intervals import Even, Near
from scaletrain.diffusion.path import EDM, Cosine, Discrete, Flow, Linear, Path, Trig
from scaletrain.diffusion.prediction import Prediction
from scaletrain.diffusion.reading import Reading
from scaletrain.diffusion.solvers import ddim_step, implied_x0
from scaletrain.errors import UserError
from scaletrain.explain import decode
from scaletrain.finished import evaluate
from scaletrain.networks.point_denoiser import Config, PointDenoiser
from scaletrain.player import Player
from scaletrain.recipe import objective_of
from tests.launch import metrics, run
from tests.recipes.tiny import overrides
from tests.unit.objectives.small import GAUSSIAN, TURN, draws, flowed, made, networks, trained

PATHS = [Cosine(), Linear(), EDM(), Flow(), Trig(data_std=0.7), Discrete(alphas_cumprod=[0.999, 0.9, 0.5, 0.1, 0.01])]
KINDS: tuple[Prediction, ...] = ("eps", "x0", "v", "velocity", "edm")


def odd(z: Tensor, t: Tensor) -> Tensor:
    """A network that says something."""
    return torch.sin(3 * z) + t[:, None]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.type)
@pytest.mark.parametrize("kind", KINDS)
def test_data_are_left_as_they_are_at_the_first_time(path: Path, kind: Prediction) -> None:
    x = torch.randn(8, 2, dtype=torch.float64)
    student = Denoiser(odd, Reading(path=path, prediction=kind, data_std=0.7))
    if kind != "x0":
        near = torch.full((8,), path.first + 1e-9, dtype=torch.float64)
        torch.testing.assert_close(to_data(student, x, near), x, rtol=0, atol=1e-6)
    if path.alpha_sigma(torch.tensor(path.first))[1] > 0:
        first = torch.full((8,), path.first, dtype=torch.float64)
        torch.testing.assert_close(to_data(student, x, first), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.type)
def test_the_aim_is_what_makes_the_student_agree_with_its_target(path: Path) -> None:
    objective = made({"type": "consistency", "path": path.model_dump()}, GAUSSIAN)
    target = Denoiser(odd, objective.signature.reading)
    t = torch.linspace(0.3, 1, 9, dtype=torch.float64) * path.last
    s, z, y = t / 2, torch.randn(9, 2, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    s = torch.where(t < 0.5 * path.last, path.first, s.clamp(min=path.first))
    aim = objective.aim(target, z, t, y, s)
    says = Denoiser(lambda z, t: aim, Reading(path=path, prediction="x0"))  # one that answers so
    expected = torch.where((s <= path.first)[:, None], y, to_data(target, y, s))
    torch.testing.assert_close(to_data(says, z, t), expected, rtol=0, atol=1e-9)


def test_distilled_targets_on_a_gaussian_are_its_flow() -> None:
    objective = made({"type": "consistency", "solver_steps": 400, "prediction": "v"}, GAUSSIAN)
    path = objective.signature.reading.path

    def knows(z: Tensor, t: Tensor) -> Tensor:  # the consistency function, as v
        first = torch.full_like(t, path.first)
        x0 = implied_x0(path, z, t, flowed(path, z, t, first), first)
        return Reading(path=path, prediction="v").joined(x0, z, t)

    t = torch.tensor([0.2, 0.5, 0.8, 1.0], dtype=torch.float64)
    s, z = (t - 0.25).clamp(min=0), torch.randn(4, 2, dtype=torch.float64)
    teacher = objective.teacher(networks(objective))
    y = objective.along_flow(teacher, z, t, s)
    torch.testing.assert_close(y, flowed(path, z, t, s), rtol=0, atol=2e-3)  # 400 steps of DDIM
    exact = flowed(path, z, t, s)
    aim = objective.aim(objective.denoiser(knows), z, t, exact, s)
    first = torch.full_like(t, path.first)
    torch.testing.assert_close(aim, implied_x0(path, z, t, flowed(path, z, t, first), first), rtol=0, atol=1e-9)
    loss = objective.difference(objective.denoiser(knows), objective.denoiser(knows), z, t, exact, s)
    assert float(loss.abs().max()) < 1e-12


def test_one_step_of_the_teacher_is_that_of_its_solver() -> None:
    objective = made({"type": "consistency", "solver": "heun", "path": "edm"}, GAUSSIAN)
    teacher = objective.teacher(networks(objective))
    t, s = torch.full((5,), 2.0, dtype=torch.float64), torch.full((5,), 1.0, dtype=torch.float64)
    z = 3 * torch.randn(5, 2, dtype=torch.float64)
    slope = (z - teacher(z, t)[0]) / 2.0  # Karras et al., algorithm 1, on α = 1 and σ = t
    guess = z - slope
    expected = z - (slope + (guess - teacher(guess, s)[0]) / 1.0) / 2
    torch.testing.assert_close(objective.along_flow(teacher, z, t, s), expected)


def test_trained_targets_are_of_the_same_data_and_noise() -> None:
    objective = made({"type": "consistency", "learns_from": "data"}, GAUSSIAN)
    nets = networks(objective, noisy=True)
    seen: list[Tensor] = []
    aim = objective.aim
    objective.aim = lambda target, z, t, y, s: (seen.extend([z, t, y, s]), aim(target, z, t, y, s))[1]
    objective.loss(TURN, nets, draws(16))
    z, t, y, s = seen
    path = objective.signature.reading.path
    (alpha, sigma), (alpha_s, sigma_s) = path.at(t, z), path.at(s, z)
    whole = alpha * sigma_s - sigma * alpha_s
    x0, eps = (sigma_s * z - sigma * y) / whole, (alpha * y - alpha_s * z) / whole
    assert float((x0 - torch.tensor([1.5, 0.0])).norm(dim=1).median()) < 1.5  # of the Gaussian
    torch.testing.assert_close(path.noisy(x0, eps, s), y, rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", ["consistency", "scm"])
def test_data_alone_will_do(method: str) -> None:
    found = {"objective": {"type": method, "learns_from": "data"}, "data": {"train": "points.jsonl"}}
    objective = objective_of(decode(Recipe, found))
    points = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
    objective.prepare(Rows([ArrayTable("set", {"point": points})]), None)
    assert list(objective.networks()) == ["student"]
    nets = {"student": PointDenoiser(Config(hidden=[8, 8]))}
    assert objective.loss(TURN, nets, {"point": torch.from_numpy(points)})["loss"].sum.isfinite()


def test_targets_have_no_gradient() -> None:
    objective = made({"type": "consistency", "huber": 0.0, "weighting": "x0"}, GAUSSIAN)
    nets = networks(objective, noisy=True)
    torch.manual_seed(1)
    objective.loss(TURN, nets, draws(32))["loss"].sum.backward()
    gradient = [p.grad.clone() for p in nets["student"].parameters() if p.grad is not None]
    # by hand: Σ 2/D (x₀ − aim) ∂x₀/∂w with the aim held
    torch.manual_seed(1)
    x0, _ = objective.data(draws(32))
    t, s = objective.between(32, x0.device)
    student, teacher = objective.student(nets), objective.teacher(nets)
    z = student.path.noisy(x0, torch.randn_like(x0), t)
    y = ddim_step(teacher, z, t, s)
    with torch.no_grad():
        ends = to_data(student, y, s)
        ends[s <= 0] = y[s <= 0]
        aim = implied_x0(student.path, z, t, ends, torch.zeros_like(t))
    nets["student"].zero_grad()
    (student(z, t)[0] - aim).square().mean(1).sum().backward()
    own = [p.grad for p in nets["student"].parameters() if p.grad is not None]
    for ours, theirs in zip(gradient, own, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_pseudo_huber() -> None:
    plain, robust = (made({"type": "consistency", "huber": c}, GAUSSIAN) for c in (0.0, 0.1))
    nets = networks(plain, noisy=True)
    z, y, t = torch.randn(6, 2), torch.randn(6, 2), torch.linspace(0.3, 1, 6)
    e, found = (o.difference(o.student(nets), o.student(nets), z, t, y, t / 2) for o in (plain, robust))
    torch.testing.assert_close(found, torch.sqrt(e + 0.01) - 0.1)


# --- times ------------------------------------------------------------------------------------------------------------


def test_even_intervals_are_parts_of_the_grid_and_double() -> None:
    path = EDM()
    even = Even(count=4, most=16, double_every=10)
    assert [even.parts(u) for u in (0, 9, 10, 20, 500)] == [4, 4, 8, 16, 16]
    t, s = even.draw(1000, path, 0, 1.0, torch.device("cpu"))
    assert ((t > s) & (s >= path.first * (1 - 1e-5)) & (t <= path.last)).all()
    share = (t ** (1 / 7) - path.first ** (1 / 7)) / (path.last ** (1 / 7) - path.first ** (1 / 7))
    earlier = (s ** (1 / 7) - path.first ** (1 / 7)) / (path.last ** (1 / 7) - path.first ** (1 / 7))
    torch.testing.assert_close(earlier, (share - 0.25).clamp(min=0), rtol=0, atol=1e-4)
    assert float(share.std()) == pytest.approx(12**-0.5, rel=0.01)  # even
    on_grid, _ = Even(count=4, on_grid=1.0).draw(1000, Cosine(), 0, 1.0, torch.device("cpu"))
    assert sorted(set(on_grid.tolist())) == [0.25, 0.5, 0.75, 1.0]


def test_near_intervals_are_those_of_easy_consistency_tuning() -> None:
    path, near = EDM(), Near(every=10, most=4)
    for updates, stage in ((0, 1), (9, 1), (10, 2), (1000, 4)):
        t, s = near.draw(500, path, updates, 0.5, torch.device("cpu"))  # then levels are σ
        adjusted = 1 + 8 * torch.sigmoid(-t)
        expected = (t * (1 - adjusted / 2**stage)).clamp(min=path.first)
        torch.testing.assert_close(s, torch.minimum(expected, t), rtol=1e-3, atol=1e-6)
    assert float(t.log().median()) == pytest.approx(-1.1, abs=0.1)
    twice, _ = near.draw(500, path, 0, 1.0, torch.device("cpu"))
    assert float(twice.log().median()) == pytest.approx(-1.1 + torch.log(torch.tensor(2.0)).item(), abs=0.1)


# --- samples ----------------------------------------------------------------------------------------------------------


def test_samples_follow_algorithm_1() -> None:
    objective = made({"type": "consistency", "highest": 0.6}, GAUSSIAN)
    nets, noise = networks(objective, noisy=True), torch.randn(5, 2)
    student = objective.student(nets)
    assert stops(student.path, 4, 0.6) == pytest.approx([1.0, 0.6, 0.4, 0.2])
    assert stops(student.path, 4, None) == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert stops(student.path, 1, 0.6) == [1.0]
    torch.manual_seed(3)
    found = objective.sampler(nets["student"])(noise, 3, {})
    torch.manual_seed(3)
    z = student.path.start(noise)
    for now, then in ((1.0, 0.6), (0.6, 0.3), (0.3, None)):
        x = to_data(student, z, torch.full((5,), now))
        if then:
            z = student.path.noisy(x, torch.randn(5, 2), torch.full((5,), then))
    torch.testing.assert_close(found, x, rtol=0, atol=1e-3)  # of this path, next to no noise is left at the first time


def test_samples_without_fresh_noise_follow_from_the_first() -> None:
    objective = made({"type": "consistency", "fresh": False}, GAUSSIAN)
    nets, noise = networks(objective, noisy=True), torch.randn(5, 2)
    torch.manual_seed(3)
    one = objective.sampler(nets["student"])(noise, 4, {})
    torch.manual_seed(4)
    torch.testing.assert_close(objective.sampler(nets["student"])(noise, 4, {}), one)


# --- the network of the targets ---------------------------------------------------------------------------------------


def test_a_target_is_an_average_of_the_student() -> None:
    objective = made({"type": "consistency", "target_decay": 0.75}, GAUSSIAN)
    assert objective.networks()["target"].config == objective.networks()["student"].config
    assert not objective.networks()["target"].frozen  # so that it is saved
    nets = networks(objective, noisy=True)
    nets["target"] = networks(objective, seed=5, noisy=True)["student"]
    weight, other = nets["student"].last.weight, nets["target"].last.weight
    player = Player("student", {}, {}, None, None, updates=1)  # type: ignore[arg-type]
    objective.after_update(player, nets)
    assert torch.equal(other, weight)
    before = other.detach().clone()
    with torch.no_grad():
        weight += 1
    player.updates = 2
    objective.after_update(player, nets)
    torch.testing.assert_close(other, before + 0.25)
    state = objective.state_dict()
    fresh = made({"type": "consistency", "target_decay": 0.75}, GAUSSIAN)
    fresh.load_state_dict(state)
    assert fresh.state_dict() == {"updates": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("consistency", "objective.intervals={type: even, count: 2, most: 64, double_every: 1}"),
        ("scm", "objective.warmup=9"),
    ],
)
def test_a_run_is_evaluated_at_the_update_that_it_was_at(method: str, option: str, tmp_path: FilePath) -> None:
    name = f"distill/{method}_gmm"
    own = ["data.eval=noise:64", "evaluate.every=6 steps", "train.duration=6 steps", "players.student.ema=null", option]
    run(["run", name, *overrides(name, tmp_path), *own, "--root", tmp_path, "--run", "r"])
    said = [r["loss"] for r in metrics(tmp_path / "r") if r["kind"] == "evaluate"]
    found, *_ = evaluate(tmp_path / "r")
    assert found["loss"] == pytest.approx(said[-1], rel=1e-6)


def test_a_target_gives_the_targets() -> None:
    objective = made({"type": "consistency", "target_decay": 0.9}, GAUSSIAN)
    nets = networks(objective, noisy=True)
    losses = []
    for seed in (0, 5):
        nets["target"] = networks(objective, seed=seed, noisy=True)["student"]
        torch.manual_seed(1)
        losses.append(float(objective.loss(TURN, nets, draws(32))["loss"].sum.detach()))
    assert losses[0] != losses[1]


# --- what users can get wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"solver": "heun", "path": "flow"}, "about data without noise"),
        ({"prediction": "x0", "path": "flow"}, "leave them as they are"),
        ({"learns_from": "data", "solver_steps": 2}, "objective.solver_steps"),
        ({"intervals": {"type": "even", "count": 8, "most": 16}}, "belong together"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        made({"type": "consistency", **options}, GAUSSIAN)


# --- broken on purpose ------------------------------------------------------------------------------------------------


SETTING = {"type": "consistency", "intervals": {"type": "even", "count": 3, "on_grid": 0.7}, "solver_steps": 4}
WHOLE: dict[str, float] = {}


def whole() -> dict[str, float]:
    if not WHOLE:
        WHOLE.update(trained(SETTING, 400))
    return WHOLE


def test_it_learns() -> None:
    assert whole()["energy_distance"] < 0.1
    assert whole()["on_mode"] > 0.6
    assert whole()["modes"] == 3


def no_boundary(objective: Any) -> None:
    objective.aim = lambda target, z, t, y, s: target(y, s)[0].detach()  # f⁻ at the first time, too


def no_stop_gradient(objective: Any) -> None:
    def difference(student: Denoiser, target: Denoiser, z: Tensor, t: Tensor, y: Tensor, s: Tensor) -> Tensor:
        return (to_data(student, z, t) - to_data(target, y, s)).square().mean(1)

    objective.difference = difference


def wrong_target(objective: Any) -> None:
    objective.along_flow = lambda teacher, z, t, s: z  # the teacher does not go anywhere


@pytest.mark.parametrize("broken", [no_boundary, no_stop_gradient, wrong_target])
def test_broken_it_does_not_learn(broken: Any) -> None:
    found = trained(SETTING, 200, broken=broken)
    assert found["on_mode"] < whole()["on_mode"] - 0.15
