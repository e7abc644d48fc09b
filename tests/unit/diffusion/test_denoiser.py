"""A denoiser along another path against the closed form there; guidance against two calls; clipping; what is told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from scaletrain.diffusion.denoiser import Denoiser, Guidance
from scaletrain.diffusion.path import Path
from scaletrain.diffusion.prediction import Prediction
from scaletrain.diffusion.reading import Reading
from scaletrain.networks.mixture import Config, Mixture
from tests.unit.diffusion.closed_forms import MEAN, PATHS, STD, gaussian

KINDS: tuple[Prediction, ...] = ("eps", "x0", "v", "score", "velocity", "edm")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def best(reading: Reading, clip: bool = False) -> Denoiser:
    """The best denoiser of the Gaussian, as a network that answers as it is read."""

    def network(z: Tensor, t: Tensor) -> Tensor:
        z = z * reading.scale(*path.at(time(t), z)) if reading.prediction == "edm" else z
        x0, eps = gaussian(z, *path.at(time(t), z))
        a, b = reading.parts(time(t), z)
        return a * x0 + b * eps

    def time(told: Tensor) -> Tensor:
        return (4 * told).exp() if path == PATHS["edm"] else (told + 1) / 1000 if path == PATHS["discrete"] else told

    path = reading.path
    return Denoiser(network, reading, clip)


def test_denoiser_is_the_posterior_mean() -> None:
    t, z = torch.full((1,), 0.4), torch.tensor([[0.7, -0.2]])
    path = PATHS["cosine"]
    alpha, sigma = (float(x) for x in path.alpha_sigma(t))
    x0, eps = best(Reading(path=path))(z, t)
    for d in range(2):  # integrate p(x0 | z) on a grid
        grid = np.linspace(-4, 4, 20001)
        log = -((grid - float(MEAN[d])) ** 2) / (2 * float(STD[d]) ** 2)
        log -= (float(z[0, d]) - alpha * grid) ** 2 / (2 * sigma**2)
        posterior = np.exp(log - log.max())
        assert float(x0[0, d]) == pytest.approx((grid * posterior).sum() / posterior.sum(), rel=1e-4)
    torch.testing.assert_close(alpha * x0 + sigma * eps, z)


@pytest.mark.parametrize("other", PATHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own", PATHS)
def test_along_another_path_is_the_closed_form_there(own: str, kind: Prediction, other: str) -> None:
    path = PATHS[other]
    t = path.time_at(torch.linspace(-4, 4, 40, dtype=torch.float64))
    z = path.noisy(*torch.randn(2, 40, 2, dtype=torch.float64), t)
    denoiser = best(Reading(path=PATHS[own], prediction=kind, data_std=0.7)).along(path)
    assert denoiser.path == path
    x0, eps = gaussian(z, *path.at(t, z))
    for found, exact in zip(denoiser(z, t), (x0, eps), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)
    slopes = [s[:, None] for s in path.slopes(t)]
    torch.testing.assert_close(denoiser.velocity(z, t), slopes[0] * x0 + slopes[1] * eps, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("other", PATHS)
@pytest.mark.parametrize("own", PATHS)
def test_the_answer_makes_z_at_the_ends_of_another_path_too(own: str, other: str, dtype: torch.dtype) -> None:
    """Which may reach further than the network's own: to no noise, or no signal, at all."""
    path = PATHS[other]
    t = torch.tensor([path.first, path.last], dtype=dtype)
    z = path.noisy(*torch.randn(2, 2, 2, dtype=dtype), t)
    x0, eps = best(Reading(path=PATHS[own])).along(path)(z, t)
    assert x0.isfinite().all()
    assert eps.isfinite().all()
    torch.testing.assert_close(path.noisy(x0, eps, t), z)


def test_along_its_own_path_a_network_is_called_as_it_was() -> None:
    denoiser = best(Reading())
    assert denoiser.along(PATHS["cosine"]).other is None
    assert denoiser.along(PATHS["flow"]).along(PATHS["cosine"]) == denoiser


# --- guidance ---------------------------------------------------------------------------------------------------------


def sinusoid(z: Tensor, t: Tensor, label: Tensor) -> Tensor:
    return torch.sin(z + t[:, None] + label[:, None])


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_is_two_calls(kind: Prediction) -> None:
    reading = Reading(path=PATHS["cosine"], prediction=kind, data_std=0.7)
    z, t, label = torch.randn(9, 2), torch.linspace(0.2, 0.8, 9), torch.arange(9) % 3
    plain = Denoiser(sinusoid, reading)
    with_, without = plain.given(label=label), plain.given(label=torch.full((9,), 3))
    null = {"label": torch.tensor(3)}
    for scale in (1.0, 2.5, torch.linspace(0, 4, 9)):
        expected = [
            w + torch.as_tensor(scale).view(-1, 1) * (c - w) for c, w in zip(with_(z, t), without(z, t), strict=True)
        ]
        guided = with_.under(Guidance(scale, null))
        for found, e in zip(guided(z, t), expected, strict=True):
            torch.testing.assert_close(found, e, rtol=1e-4, atol=1e-5)
        alpha, sigma = reading.path.slopes(t)
        velocity = alpha[:, None] * expected[0] + sigma[:, None] * expected[1]
        torch.testing.assert_close(guided.velocity(z, t), velocity, rtol=1e-4, atol=1e-4)
        x0, _ = guided.along(PATHS["edm"])(z / alpha_of(reading.path, t), PATHS["edm"].time_at(reading.path.log_snr(t)))
        torch.testing.assert_close(x0, expected[0], rtol=1e-3, atol=1e-4)


def alpha_of(path: Path, t: Tensor) -> Tensor:
    return path.alpha_sigma(t)[0][:, None]


def test_guidance_holds_within_its_interval_only() -> None:
    z, t, label = torch.randn(5, 2), torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]), torch.zeros(5, dtype=torch.long)
    plain = Denoiser(sinusoid, Reading()).given(label=label)
    null = {"label": torch.tensor(3)}
    within = plain.under(Guidance(3.0, null, low=0.3, high=0.7))(z, t)[0]
    torch.testing.assert_close(within[1:4], plain.under(Guidance(3.0, null))(z, t)[0][1:4])
    torch.testing.assert_close(within[[0, 4]], plain(z, t)[0][[0, 4]])


def test_a_mixture_is_guided_by_its_modes() -> None:
    """Against the guided score, ∇ log p(z) + w (∇ log p(z | k) − ∇ log p(z)), of densities by autograd."""
    mixture = Mixture(Config(count=5, radius=2.0, sigma=0.5)).double()
    path, label = PATHS["cosine"], torch.arange(5)
    t, z = torch.full((5,), 0.5, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    alpha, sigma = (v[:, None] for v in path.alpha_sigma(t))
    log = -(z[:, None] - alpha[:, None] * mixture.means).square().sum(2) / (2 * (alpha**2 * 0.25 + sigma**2))
    of_all = torch.autograd.grad(torch.logsumexp(log, 1).sum(), z, retain_graph=True)[0]
    of_one = torch.autograd.grad(log.diagonal().sum(), z)[0]
    z = z.detach()
    exact = Denoiser(mixture, Reading(path=path, prediction="exact")).given(label=label)
    _, eps = exact.under(Guidance(3.0, {"label": 5}))(z, t)
    torch.testing.assert_close(-eps / sigma, of_all + 3 * (of_one - of_all))


# --- the rest ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["cosine", "flow"])
def test_clip_keeps_x0_in_range_and_z_consistent(other: str) -> None:
    path = PATHS[other]
    z, t = 5 * torch.randn(200, 2), torch.full((200,), 0.5)
    loose, _ = best(Reading()).along(path)(z, t)
    x0, eps = best(Reading(), clip=True).along(path)(z, t)
    assert (loose.abs() > 1).any()
    torch.testing.assert_close(x0, loose.clamp(-1, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(path.noisy(x0, eps, t), z)


def test_what_is_given_is_told_and_the_last_holds() -> None:
    told = []
    denoiser = Denoiser(lambda z, t, **more: told.append(more) or z, Reading()).given(label=torch.zeros(2))
    denoiser.given(label=torch.ones(2), guidance=torch.full((2,), 3.0)).output(torch.zeros(2, 2), torch.zeros(2))
    assert {name: value.tolist() for name, value in told[0].items()} == {"label": [1, 1], "guidance": [3, 3]}
    assert list(denoiser.told) == ["label"]


def test_answers_are_fp32_of_networks_of_half_precision_and_fp64_of_doubles() -> None:
    denoiser = Denoiser(lambda z, t: z.bfloat16(), Reading())
    assert denoiser.output(torch.randn(2, 2), torch.rand(2)).dtype == torch.float32
    assert best(Reading()).output(torch.randn(2, 2).double(), torch.rand(2).double()).dtype == torch.float64
