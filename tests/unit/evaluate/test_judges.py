"""Judges: of pictures on real digits, of points on a mixture whose figures are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scaletrain.evaluate.judges import Judge, ModesJudge, PictureJudge, Real
from scaletrain.networks.mixture import Config, Mixture
from tests.unit.evaluate.digits import real_digits


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def digits() -> tuple[Real, Real]:
    return real_digits()


def test_judge_knows_real_digits_and_is_hard_to_please(digits: tuple[Real, Real]) -> None:
    train, held = digits
    assert train.labels is not None
    assert held.labels is not None
    judge = Judge(train.samples, train.labels)
    probabilities = judge.probabilities(held.samples)
    assert (probabilities.argmax(1) == held.labels.numpy()).mean() > 0.93
    assert judge.confident(held.samples) == pytest.approx((probabilities.max(1) > 0.9).mean())
    assert 0.4 < judge.confident(held.samples) < 0.6
    mixed = (held.samples + held.samples.roll(1, 0)) / 2
    assert judge.confident(mixed) < 0.1
    assert judge.smallest_class(held.samples) > 0.08
    assert judge.smallest_class(held.samples[held.labels != 3]) < 0.02


def test_pictures_are_judged_by_held_out_ones_and_without_labels_by_distance_alone(digits: tuple[Real, Real]) -> None:
    train, held = digits
    judge = PictureJudge(train, held)
    assert set(judge.figures(held.samples[:100], {})) == {"energy_distance", "confident", "smallest_class"}
    floor = judge.floor()
    assert abs(floor["energy_distance"]) < 0.02
    assert 0.4 < floor["confident"] < 0.6
    plain = PictureJudge(Real(train.samples), Real(held.samples))
    assert set(plain.figures(held.samples[:100], {})) == set(plain.columns) == {"energy_distance"}


def test_modes_are_judged_by_distance_share_and_number() -> None:
    mixture = Mixture(Config(modes="ring", count=8, radius=4.0, sigma=0.2))
    judge = ModesJudge(mixture, 0)
    floor = judge.floor()
    assert abs(floor["energy_distance"]) < 0.004
    assert floor["on_mode"] > 0.999  # within 4σ of two coordinates: 1 − exp(−8)
    assert floor["modes"] == 8
    good = mixture.draw(12_000)
    junk = good.clone()
    junk[:1200] = 0  # a tenth at the centre: distance sees next to none of it
    figures = judge.figures(junk, {})
    assert figures["on_mode"] == pytest.approx(0.9, abs=0.001)
    assert figures["modes"] == 8
    missing = mixture.draw(12_000, torch.arange(12_000) % 6)
    assert judge.figures(missing, {})["modes"] == 6
    assert judge.figures(missing, {})["energy_distance"] > 0.05
    few = mixture.draw(12_000, torch.where(torch.arange(12_000) < 10, 7, torch.arange(12_000) % 7))
    assert judge.figures(few, {})["modes"] == 7  # ten are less than a hundredth of 1,500


def test_energy_distance_of_points_is_a_mean_over_draws_of_4000_that_are_the_same_each_time() -> None:
    mixture = Mixture(Config())
    judge, made = ModesJudge(mixture, 3), mixture.draw(12_500) + 0.3
    state = torch.random.get_rng_state()
    found = judge.figures(made, {})
    assert (torch.random.get_rng_state() == state).all()
    assert judge.figures(made, {}) == found
    parts = [ModesJudge(mixture, seed).figures(made[:4000], {})["energy_distance"] for seed in range(5)]
    assert found["energy_distance"] == pytest.approx(np.mean(parts), rel=0.1)
    assert judge.figures(made[12_000:], {})["energy_distance"] != found["energy_distance"]  # 500 are judged as they are
