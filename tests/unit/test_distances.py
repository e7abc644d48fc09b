"""Energy distance against a double loop, scipy and a closed form; the judge on real digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import energy_distance as scipy_distance

from scaletrain.evaluate import distances
from scaletrain.evaluate.distances import energy_distance
from scaletrain.evaluate.few_steps import Real, compare
from scaletrain.evaluate.judge import Judge


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


@pytest.fixture(scope="module")
def digits() -> tuple[Real, Real]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    x = torch.tensor(images[order] / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8)
    y = torch.tensor(labels[order])
    return Real(x[:898], y[:898]), Real(x[898:], y[898:])


def test_judge_knows_real_digits_and_is_hard_to_please(digits: tuple[Real, Real]) -> None:
    train, held = digits
    assert train.labels is not None
    assert held.labels is not None
    judge = Judge(train.images, train.labels)
    probabilities = judge.probabilities(held.images)
    assert (probabilities.argmax(1) == held.labels.numpy()).mean() > 0.93
    assert judge.confident(held.images) == pytest.approx((probabilities.max(1) > 0.9).mean())
    assert 0.4 < judge.confident(held.images) < 0.6
    mixed = (held.images + held.images.roll(1, 0)) / 2
    assert judge.confident(mixed) < 0.1
    assert judge.smallest_class(held.images) > 0.08
    assert judge.smallest_class(held.images[held.labels != 3]) < 0.02


def test_comparison_ranks_real_pictures_above_noise(digits: tuple[Real, Real]) -> None:
    train, held = digits
    noise = torch.randn(400, 1, 8, 8)
    real = train.images[:400]

    def good(noise: torch.Tensor, steps: int) -> torch.Tensor:
        return real

    def bad(noise: torch.Tensor, steps: int) -> torch.Tensor:
        return (real + noise / steps).clamp(-1, 1)

    report = compare(good, 8, {4: bad, 1: bad}, [1], noise, train, held)
    table = report.files["steps.json"]
    assert abs(table["floor"]["energy_distance"]) < 0.02
    assert table["teacher"]["8"]["energy_distance"] < table["student"]["4"]["energy_distance"]
    assert table["student"]["4"]["energy_distance"] < table["student"]["1"]["energy_distance"]
    assert "rmse_to_teacher" not in table["teacher"]["8"]
    assert table["teacher"]["1"]["rmse_to_teacher"] == 0
    expected = float(((real + noise).clamp(-1, 1) - real).square().mean().sqrt())
    assert table["student"]["1"]["rmse_to_teacher"] == pytest.approx(expected)
    common = report.pictures["same-noise-teacher-8-student-4-1"]
    assert common.images is not None
    assert common.rows == 16
    torch.testing.assert_close(common.images[16:32], (bad(noise, 4)[:16] + 1) / 2)


def test_without_labels_there_is_no_judge(digits: tuple[Real, Real]) -> None:
    train, held = digits
    made = held.images[:100]
    report = compare(lambda n, s: made, 4, {1: lambda n, s: made}, [], made, Real(train.images), Real(held.images))
    assert set(report.files["steps.json"]["student"]["1"]) == {"energy_distance", "rmse_to_teacher"}
    assert "sure" not in report.text
