"""Every prediction on every path against a Gaussian's closed form; the weights of errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from scaletrain.diffusion.denoiser import Denoiser
from scaletrain.diffusion.path import EDM, Cosine, Path
from scaletrain.diffusion.prediction import Prediction, Weighting
from scaletrain.diffusion.reading import Reading
from tests.unit.diffusion.closed_forms import PATHS, gaussian

KINDS: tuple[Prediction, ...] = ("eps", "x0", "v", "score", "velocity", "edm")
D = 0.7  # the standard deviation of the data that `edm` is told
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def answers(path: Path, x0: Tensor, eps: Tensor, t: Tensor) -> dict[Prediction, Tensor]:
    """Return what a network of each kind answers, written out."""
    alpha, sigma = (value[:, None] for value in path.alpha_sigma(t))
    alpha_, sigma_ = (value[:, None] for value in path.slopes(t))
    z = alpha * x0 + sigma * eps
    s2 = alpha**2 * D**2 + sigma**2  # F of Karras et al., 2022, equation 7, with α
    skip, out = alpha * D**2 / s2, sigma * D / s2.sqrt()
    return {
        "eps": eps,
        "x0": x0,
        "v": alpha * eps - sigma * x0,
        "score": -eps / sigma,
        "velocity": alpha_ * x0 + sigma_ * eps,
        "edm": (x0 - skip * z) / out,
    }


def times(path: Path, dtype: torch.dtype) -> Tensor:
    """Return times of log SNR −1.5 to 1.5: there no conversion makes rounding more than 2.2 times as large."""
    return path.time_at(torch.linspace(-1.5, 1.5, 60, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PATHS)
def test_every_prediction_means_the_same(name: str, kind: Prediction, dtype: torch.dtype) -> None:
    """x₀, ε, v, score and velocity of a Gaussian agree whatever the network predicts, on every path."""
    path, bound = PATHS[name], TOLERANCE[dtype]
    t = times(path, dtype)
    z = path.noisy(torch.randn(60, 2, dtype=dtype), torch.randn(60, 2, dtype=dtype), t)
    alpha, sigma = (value[:, None] for value in path.alpha_sigma(t.double()))
    exact = answers(path, *gaussian(z.double(), alpha, sigma), t.double())
    reading = Reading(path=path, prediction=kind, data_std=D)
    denoiser = Denoiser(lambda z, t: exact[kind].to(dtype), reading)
    x0, eps = denoiser(z, t)
    found = answers(path, x0, eps, t) | {"velocity": denoiser.velocity(z, t)}
    found |= {other: reading.joined(x0, z, t, other) for other in ("v", "edm")}
    for other, value in found.items():
        assert value.dtype == dtype
        error = (value.double() - exact[other]).abs().max() / exact[other].abs().max().clamp(min=1)
        assert error < bound, other


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PATHS)
def test_joined_and_split_are_inverse_and_parts_are_what_they_say(name: str, kind: Prediction) -> None:
    path = PATHS[name]
    t, x0, eps = times(path, torch.float64), *torch.randn(2, 60, 2, dtype=torch.float64)
    z, reading = path.noisy(x0, eps, t), Reading(path=path, prediction=kind, data_std=D)
    a, b = reading.parts(t, z)
    torch.testing.assert_close(a * x0 + b * eps, answers(path, x0, eps, t)[kind])
    torch.testing.assert_close(reading.joined(x0, z, t), answers(path, x0, eps, t)[kind])
    for found, given in zip(reading.split(reading.joined(x0, z, t), z, t), (x0, eps), strict=True):
        torch.testing.assert_close(found, given)


@pytest.mark.parametrize("kind", ["x0", "v", "velocity", "edm"])
@pytest.mark.parametrize("name", PATHS)
def test_x0_is_told_where_there_is_no_signal_left(name: str, kind: Prediction) -> None:
    """At the last time of any path in fp32, of `flow` and `trig` without any."""
    path = PATHS[name]
    t, x0, eps = torch.full((9,), path.last), *torch.randn(2, 9, 2)
    if isinstance(path, EDM):
        eps /= 80  # so that z is of one scale in both
    alpha, sigma = (value[:, None] for value in path.alpha_sigma(t))
    reading = Reading(path=path, prediction=kind, data_std=D)
    a, b = reading.parts(t, x0)
    found, _ = reading.split(a * x0 + b * eps, alpha * x0 + sigma * eps, t)
    torch.testing.assert_close(found, x0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["eps", "v", "velocity", "edm"])
@pytest.mark.parametrize("name", ["cosine", "flow", "trig"])
def test_eps_is_told_where_there_is_no_noise(name: str, kind: Prediction) -> None:
    path, t, (x0, eps) = PATHS[name], torch.zeros(9), torch.randn(2, 9, 2)
    z, reading = path.noisy(x0, eps, t), Reading(path=path, prediction=kind, data_std=D)
    a, b = reading.parts(t, x0)
    for found, given in zip(reading.split(a * x0 + b * eps, z, t), (x0, eps), strict=True):
        torch.testing.assert_close(found, given, rtol=1e-4, atol=1e-4)


def test_edm_is_the_preconditioning_of_karras_et_al() -> None:
    t, z = torch.tensor([0.01, 0.5, 3.0, 80.0]), torch.randn(4, 2)
    seen = []

    def network(z: Tensor, t: Tensor) -> Tensor:
        seen.extend([z, t])
        return torch.sin(z)

    x0, _ = Denoiser(network, Reading(path=EDM(), prediction="edm", data_std=0.5))(z, t)
    sigma = t[:, None]
    into = z / (sigma**2 + 0.25).sqrt()  # table 1: c_in, c_noise, c_skip, c_out
    torch.testing.assert_close(seen[0], into)
    torch.testing.assert_close(seen[1], t.log() / 4)
    expected = 0.25 / (sigma**2 + 0.25) * z + sigma * 0.5 / (sigma**2 + 0.25).sqrt() * torch.sin(into)
    torch.testing.assert_close(x0, expected)


# --- weights ----------------------------------------------------------------------------------------------------------

WEIGHTS = {
    "x0": lambda snr: 1.0,
    "snr": lambda snr: snr,
    "snr_plus_one": lambda snr: snr + 1,
    "truncated_snr": lambda snr: max(snr, 1.0),
    "min_snr": lambda snr: min(snr, 5.0),
    "p2": lambda snr: snr / (1 + snr),
}


@pytest.mark.parametrize("weighting", WEIGHTS)
@pytest.mark.parametrize("name", PATHS)
def test_loss_is_the_weighted_x0_error_whatever_the_network_predicts(name: str, weighting: Weighting) -> None:
    path = PATHS[name]
    t, (x0, eps, wrong) = times(path, torch.float64), torch.randn(3, 60, 2, dtype=torch.float64)
    z = path.noisy(x0, eps, t)
    factor = torch.tensor([WEIGHTS[weighting](math.exp(v)) for v in path.log_snr(t).tolist()], dtype=torch.float64)
    expected = factor * ((wrong - x0) ** 2).mean(1)
    for kind in KINDS:
        reading = Reading(path=path, prediction=kind, data_std=D)
        denoiser = Denoiser(lambda *_, r=reading: r.joined(wrong, z, t), reading)
        torch.testing.assert_close(denoiser.loss(z, t, x0, weighting), expected)
        torch.testing.assert_close(denoiser.loss(z, t, x0, weighting, eps), expected)


@pytest.mark.parametrize(
    ("name", "kind", "weighting"),
    [("cosine", "eps", "snr"), ("cosine", "v", "snr_plus_one"), ("edm", "x0", "x0"), ("flow", "score", "plain")],
)
def test_plain_losses_have_weight_one(name: str, kind: Prediction, weighting: Weighting) -> None:
    path, (x0, eps, answer) = PATHS[name], torch.randn(3, 60, 2, dtype=torch.float64)
    t = times(path, torch.float64)
    loss = Denoiser(lambda z, t: answer, Reading(path=path, prediction=kind)).loss(
        path.noisy(x0, eps, t), t, x0, weighting, eps
    )
    torch.testing.assert_close(loss, (answer - answers(path, x0, eps, t)[kind]).square().mean(1))


@pytest.mark.parametrize("weighting", ["plain", *WEIGHTS])
def test_a_velocity_can_be_trained_at_both_ends(weighting: Weighting) -> None:
    """Uniform times meet 0 now and then: SNR is infinite there, and the loss is not."""
    x0, eps, t = torch.randn(2).expand(3, 2), torch.randn(2).expand(3, 2), torch.tensor([0.0, 1e-6, 1.0])
    for name in ("flow", "trig"):
        path = PATHS[name]
        denoiser = Denoiser(lambda z, t: torch.zeros_like(z), Reading(path=path, prediction="velocity"))
        loss = denoiser.loss(path.noisy(x0, eps, path.last * t), path.last * t, x0, weighting, eps)
        assert loss.isfinite().all()
        torch.testing.assert_close(loss[0], loss[1], rtol=1e-4, atol=1e-8)


def test_the_default_reading_is_v_on_the_cosine_path() -> None:
    assert Reading() == Reading(path=Cosine(), prediction="v")
