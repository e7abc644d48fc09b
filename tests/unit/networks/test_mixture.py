"""The mixture in closed form against autograd of its density, and its samples against its moments."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from scaletrain.errors import UserError
from scaletrain.networks.mixture import Config, Mixture

KINDS = {
    "ring": Config(),
    "grid": Config(modes="grid", count=25, spacing=1.0, sigma=0.05),
    "random": Config(modes="random", count=12, dim=16),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("alpha", "sigma"), [(0.99, 0.1), (0.5, 0.8), (0.01, 1.0), (1.0, 5.0)])
def test_posterior_mean_is_that_of_the_score(kind: str, alpha: float, sigma: float) -> None:
    """Tweedie's formula: E[x₀ | z] = (z + σ² ∇ log p(z)) / α."""
    mixture = Mixture(KINDS[kind]).double()
    means, count = mixture.means, len(mixture.means)
    x0 = mixture.draw(50).double()
    z = (alpha * x0 + sigma * torch.randn_like(x0)).requires_grad_()
    told = [torch.full((50,), value, dtype=torch.float64) for value in (alpha, sigma)]
    std = (alpha**2 * mixture.sigma**2 + sigma**2) ** 0.5
    for label in (None, torch.arange(50) % count, torch.full((50,), count)):
        if label is None or label[0] == count:
            spread = Independent(Normal(alpha * means, std), 1)
            density = MixtureSameFamily(Categorical(torch.ones(count, dtype=torch.float64)), spread)
        else:
            density = Independent(Normal(alpha * means[label], std), 1)
        score = torch.autograd.grad(density.log_prob(z).sum(), z)[0]
        found = mixture(z.detach(), *told, label)
        torch.testing.assert_close(found, (z + sigma**2 * score) / alpha, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_agrees_with_fp64(kind: str) -> None:
    mixture = Mixture(KINDS[kind])
    x0 = mixture.draw(200)
    for alpha, sigma in ((1.0, 1e-3), (0.7, 0.7), (4e-5, 1.0), (1.0, 80.0)):
        z = alpha * x0 + sigma * torch.randn_like(x0)
        told = torch.full((200,), alpha), torch.full((200,), sigma)
        exact = mixture(z.double(), *(v.double() for v in told))
        torch.testing.assert_close(mixture(z, *told), exact.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_its_moments_and_its_modes(kind: str) -> None:
    mixture = Mixture(KINDS[kind])
    samples = mixture.draw(20_000)
    assert samples.shape == (20_000, *mixture.shape)
    torch.testing.assert_close(samples.mean(0), mixture.means.mean(0), rtol=0, atol=0.12)
    assert float(samples.var(0).mean().sqrt()) == pytest.approx(mixture.std, rel=0.02)
    distance, mode = mixture.nearest(samples)
    assert torch.bincount(mode).min() > 0.7 * 20_000 / len(mixture.means)
    assert float(distance.square().mean()) == pytest.approx(mixture.sigma**2 * samples.shape[1], rel=0.05)
    label = torch.arange(1000) % len(mixture.means)
    assert (mixture.nearest(mixture.draw(1000, label))[1] == label).float().mean() > 0.99


def test_modes_stand_where_they_should() -> None:
    ring = Mixture(Config(count=8, radius=3.0)).means
    torch.testing.assert_close(ring.norm(dim=1), torch.full((8,), 3.0))
    torch.testing.assert_close((ring - ring.roll(1, 0)).norm(dim=1), torch.full((8,), 6 * 0.3826834))
    grid = Mixture(Config(modes="grid", count=25, spacing=1.5)).means
    assert sorted(set(grid.flatten().tolist())) == [-3.0, -1.5, 0.0, 1.5, 3.0]
    assert len({tuple(row) for row in grid.tolist()}) == 25
    for config in (Config(dim=3), Config(modes="grid", count=24)):
        with pytest.raises(UserError, match="mixture"):
            Mixture(config)
