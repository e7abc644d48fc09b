"""Energy distance against a double loop, scipy and a closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import energy_distance as scipy_distance

from scaletrain.evaluate import distances
from scaletrain.evaluate.distances import energy_distance, frechet_distance


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def loops(x: np.ndarray, y: np.ndarray, unbiased: bool) -> float:
    def mean(a: np.ndarray, b: np.ndarray, same: bool) -> float:
        pairs = [
            np.linalg.norm(p - q)
            for i, p in enumerate(a)
            for j, q in enumerate(b)
            if not (same and unbiased and i == j)
        ]
        return float(np.mean(pairs))

    return 2 * mean(x, y, False) - mean(x, x, True) - mean(y, y, True)


@pytest.mark.parametrize("unbiased", [True, False])
def test_energy_distance_is_its_definition(unbiased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "_ROWS", 7)  # several blocks, the last one short
    x, y = torch.randn(23, 2, 3), torch.randn(31, 2, 3) + 0.5
    expected = loops(x.flatten(1).double().numpy(), y.flatten(1).double().numpy(), unbiased)
    assert energy_distance(x, y, unbiased) == pytest.approx(expected, rel=1e-9)


def test_biased_energy_distance_agrees_with_scipy_in_one_dimension() -> None:
    x, y = torch.randn(200, 1), 2 * torch.randn(300, 1) + 1
    expected = scipy_distance(x[:, 0].numpy(), y[:, 0].numpy()) ** 2  # scipy's is the root of half of twice it
    assert energy_distance(x, y, unbiased=False) == pytest.approx(expected, rel=1e-5)


def test_unbiased_energy_distance_is_zero_on_average_for_one_distribution() -> None:
    found = [energy_distance(torch.randn(20, 3), torch.randn(30, 3)) for _ in range(300)]
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found)) < 4 * error
    assert min(found) < 0 < max(found)
    assert energy_distance(torch.ones(4, 2), torch.ones(4, 2), unbiased=False) == 0


def test_sets_must_agree() -> None:
    for shapes in (((5, 2), (5, 3)), ((1, 2), (5, 2))):
        with pytest.raises(ValueError, match="two sets"):
            energy_distance(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_frechet_distance_of_gaussians_is_its_closed_form_in_one_dimension_and_where_axes_agree() -> None:
    x, y = torch.randn(4000, 3, dtype=torch.double), torch.randn(3000, 3, dtype=torch.double)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T  # exactly of mean 0, covariance 1
    y = (y - y.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(y.T))).T
    scale, shift = torch.tensor([0.5, 2.0, 0.0]), torch.tensor([1.0, 0.0, -2.0])
    expected = float(((1 - scale) ** 2).sum() + (shift**2).sum())
    assert frechet_distance(x, y * scale + shift) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(x[:, :1], 3 * y[:, :1]) == pytest.approx(4, rel=1e-6)
    with pytest.raises(ValueError, match="two sets"):
        frechet_distance(x, y[:, :2])
