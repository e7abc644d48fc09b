"""Judges: of pictures on real digits, of points on a mixture whose figures are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scaletrain.evaluate.distances import energy_distance
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


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge by draws of 500 points, in place of 4,000."""
    monkeypatch.setattr(ModesJudge, "draw", 500)


@pytest.mark.usefixtures("small")
def test_modes_are_judged_by_distance_share_and_number() -> None:
    mixture = Mixture(Config(modes="ring", count=8, radius=4.0, sigma=0.2))
    judge = ModesJudge(mixture, 0)
    floor = judge.floor()
    assert abs(floor["energy_distance"]) < 0.03
    assert floor["on_mode"] > 0.998  # within 4σ of two coordinates: 1 − exp(−8)
    assert floor["modes"] == 8
    junk = mixture.draw(2000)
    junk[:200] = 0  # a tenth at the centre
    figures = judge.figures(junk, {})
    assert figures["on_mode"] == pytest.approx(0.9, abs=0.002)
    assert figures["modes"] == 8
    missing = judge.figures(mixture.draw(2000, torch.arange(2000) % 6), {})
    assert missing["modes"] == 6
    assert missing["energy_distance"] > 0.1
    few = mixture.draw(2000, torch.where(torch.arange(2000) < 2, 7, torch.arange(2000) % 7))
    assert judge.figures(few, {})["modes"] == 7  # two are less than a hundredth of 250


@pytest.mark.usefixtures("small")
def test_energy_distance_of_points_is_a_mean_over_draws_that_are_the_same_each_time() -> None:
    mixture = Mixture(Config())
    judge, made = ModesJudge(mixture, 3), mixture.draw(1600) + 0.5
    state = torch.random.get_rng_state()
    found = judge.figures(made, {})["energy_distance"]
    assert (torch.random.get_rng_state() == state).all()
    assert judge.figures(made, {})["energy_distance"] == found
    with torch.random.fork_rng():  # three draws of 500; the rest is left
        torch.manual_seed(3 + 7919)
        fresh = mixture.draw(1500)
    parts = [energy_distance(made[i : i + 500], fresh[i : i + 500]) for i in (0, 500, 1000)]
    assert found == pytest.approx(np.mean(parts))
