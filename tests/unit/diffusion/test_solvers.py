"""Samplers: their orders of convergence on a mixture, against scipy; the flow and the reverse process of a Gaussian."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from scaletrain.diffusion.denoiser import Denoiser
from scaletrain.diffusion.path import Path
from scaletrain.diffusion.reading import Reading
from scaletrain.diffusion.solvers import Solver, ancestral_step, ddim_step, implied_x0, sample, solve
from scaletrain.networks.mixture import Config, Mixture
from tests.unit.diffusion.closed_forms import MEAN, PATHS, STD, gaussian

ORDERS: dict[Solver, int] = {"ddim": 1, "euler": 1, "heun": 2, "dpmpp_2m": 2}
MIXTURE = Mixture(Config(count=5, radius=2.0, sigma=0.5))
RANGE = {"cosine": (0.85, 0.3), "flow": (0.85, 0.3), "edm": (6.0, 0.5), "trig": (1.3, 0.4), "linear": (0.7, 0.2)}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def exact(path: Path) -> Denoiser:
    return Denoiser(MIXTURE, Reading(path=path, prediction="exact"))


def normal(path: Path) -> Denoiser:
    """The best denoiser of a Gaussian."""

    def network(z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return gaussian(z, alpha[:, None], sigma[:, None])[0]

    return Denoiser(network, Reading(path=path, prediction="exact"))


def flow(path: Path, z: Tensor, begin: float, end: float) -> Tensor:
    """Follow dz/dt = f z − g²/2 ∇ log p(z), with f and g² by finite differences of α and σ, and p written out."""
    means = MIXTURE.means.double().numpy()

    def at(t: float) -> np.ndarray:
        return np.array([float(v) for v in path.alpha_sigma(torch.tensor(t, dtype=torch.float64))])

    def slope(t: float, flat: np.ndarray) -> np.ndarray:
        points, h = flat.reshape(-1, 2), 1e-4
        alpha, sigma = at(t)
        alpha_, sigma_ = (8 * (at(t + h) - at(t - h)) - (at(t + 2 * h) - at(t - 2 * h))) / (12 * h)
        f = alpha_ / alpha  # Kingma et al., 2021: f = d log α/dt, g² = dσ²/dt − 2 f σ²
        g2 = 2 * sigma * sigma_ - 2 * f * sigma**2
        apart = alpha * means - points[:, None]
        variance = alpha**2 * 0.25 + sigma**2
        log = -(apart**2).sum(2) / (2 * variance)
        share = np.exp(log - log.max(1, keepdims=True))
        score = (share[..., None] * apart).sum(1) / share.sum(1, keepdims=True) / variance
        return (f * points - g2 / 2 * score).ravel()

    found = solve_ivp(slope, (begin, end), z.numpy().ravel(), method="DOP853", rtol=1e-11, atol=1e-12)
    return torch.tensor(found.y[:, -1]).view(-1, 2)


@pytest.mark.parametrize("name", RANGE)
def test_solvers_converge_to_the_probability_flow_in_their_orders(name: str) -> None:
    path, (begin, end) = PATHS[name], RANGE[name]
    at = torch.full((12,), begin, dtype=torch.float64)
    z = path.noisy(MIXTURE.draw(12).double(), torch.randn(12, 2, dtype=torch.float64), at)
    target, _ = exact(path)(flow(path, z, begin, end), torch.full((12,), end, dtype=torch.float64))
    for solver, order in ORDERS.items():
        errors = []
        for steps in (40, 80, 160):
            grid = [begin + (end - begin) * i / steps for i in range(steps + 1)]
            made = solve(exact(path), z, [*grid, path.first], solver)  # the last step answers x₀ at `end`
            errors.append(float((made - target).norm()))
        found = [math.log2(a / b) for a, b in pairwise(errors)]
        assert found[1] == pytest.approx(order, abs=0.12), f"{solver}: {found}, errors {errors}"


@pytest.mark.parametrize("solver", ORDERS)
@pytest.mark.parametrize("name", ["cosine", "flow", "edm", "trig", "discrete"])
def test_many_steps_follow_the_flow_of_a_gaussian_from_end_to_end(name: str, solver: Solver) -> None:
    """It is affine: what is as many standard deviations from the mean stays so."""
    path, noise = PATHS[name], torch.randn(20, 2)
    made = sample(normal(path), noise, 400, solver)
    alpha, sigma = path.alpha_sigma(torch.tensor(path.last, dtype=torch.float64))
    exact = MEAN + STD * (sigma * noise - alpha * MEAN) / torch.hypot(alpha * STD, sigma)
    bound = 6e-3 if ORDERS[solver] == 1 else 2e-3
    if name == "discrete":  # of which the last step, to x₀, is from σ = 0.02, a fifth of the data's
        bound += 6e-3
    torch.testing.assert_close(made, exact.float(), rtol=0, atol=bound)


@pytest.mark.parametrize("name", PATHS)
def test_one_step_is_the_prediction_at_pure_noise(name: str) -> None:
    path, noise = PATHS[name], torch.randn(5, 2)
    x0, _ = exact(path)(path.start(noise), torch.full((5,), path.last))
    for solver in (*ORDERS, "ancestral"):
        torch.testing.assert_close(sample(exact(path), noise, 1, solver), x0)
    for solver in (*ORDERS, "ancestral"):
        assert sample(exact(path), noise, 4, solver).isfinite().all()


@pytest.mark.parametrize("name", PATHS)
def test_an_ancestral_step_draws_from_the_gaussian_between(name: str) -> None:
    """z at s given z at t and x₀, by conditioning their joint Gaussian."""
    path = PATHS[name]
    t, s = (path.time_at(torch.full((7,), v, dtype=torch.float64)) for v in (-2.0, 1.0))
    z, x0 = torch.randn(2, 7, 2, dtype=torch.float64)
    (alpha, sigma), (alpha_s, sigma_s) = path.at(t, z), path.at(s, z)
    # given x₀: Var z_s = σ_s², Var z_t = σ², and their covariance is (α / α_s) σ_s², as z_t only adds noise to z_s
    slope = alpha / alpha_s * sigma_s**2 / sigma**2
    mean = alpha_s * x0 + slope * (z - alpha * x0)
    std = (sigma_s**2 - slope * alpha / alpha_s * sigma_s**2).sqrt()
    torch.manual_seed(1)
    found = ancestral_step(Denoiser(lambda *_: x0, Reading(path=path, prediction="exact")), z, t, s)
    torch.manual_seed(1)
    torch.testing.assert_close(found, mean + std * torch.randn_like(z))


@pytest.mark.parametrize("name", ["cosine", "flow", "edm"])
def test_ancestral_samples_of_a_gaussian_have_its_moments(name: str) -> None:
    """The answer is the mean of x₀ alone, so that steps must be many."""
    made = sample(normal(PATHS[name]), torch.randn(4000, 2), 300, "ancestral").double()
    torch.testing.assert_close(made.mean(0), MEAN, rtol=0, atol=0.03)
    torch.testing.assert_close(made.std(0), STD, rtol=0.06, atol=0)


@pytest.mark.parametrize("name", PATHS)
def test_implied_x0_leads_where_the_teacher_went(name: str) -> None:
    path = PATHS[name]
    t, middle, end = (path.time_at(torch.full((30,), v, dtype=torch.float64)) for v in (-1.0, 0.0, 1.0))
    z = path.noisy(*torch.randn(2, 30, 2, dtype=torch.float64), t)
    reached = ddim_step(exact(path), ddim_step(exact(path), z, t, middle), middle, end)
    x0 = implied_x0(path, z, t, reached, end)
    student = Denoiser(lambda *_: x0, Reading(path=path, prediction="exact"))
    torch.testing.assert_close(ddim_step(student, z, t, end), reached)
