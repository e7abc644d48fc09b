"""Judges: of pictures on real digits, of points on a mixture whose figures are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.stats import entropy
from torch import nn

from scaletrain.evaluate.distances import energy_distance
from scaletrain.evaluate.judges import Classifier, Judge, ModesJudge, PictureJudge, Real
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
    assert 0.4 < (probabilities.max(1) > 0.9).mean() < 0.6
    mixed = (held.samples + held.samples.roll(1, 0)) / 2
    assert (judge.probabilities(mixed).max(1) > 0.9).mean() < 0.1


def test_pictures_are_judged_by_held_out_ones_and_without_labels_by_distance_alone(digits: tuple[Real, Real]) -> None:
    train, held = digits
    assert held.labels is not None
    judge = PictureJudge(train, held)
    assert set(judge.figures(held.samples[:100], {})) == {"energy_distance", "confident", "entropy"}
    floor = judge.floor()
    assert abs(floor["energy_distance"]) < 0.02
    assert 0.4 < floor["confident"] < 0.6
    assert floor["entropy"] == pytest.approx(np.log(10), abs=0.02)
    assert judge.figures(held.samples[held.labels < 2], {})["entropy"] < np.log(2) + 0.3
    plain = PictureJudge(Real(train.samples), Real(held.samples))
    assert set(plain.figures(held.samples[:100], {})) == set(plain.columns) == {"energy_distance"}


def test_a_classifier_judges_by_what_it_says_and_by_what_its_last_layer_is_given() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.tanh(self.first(x.flatten(1))))

    net, held = Net().requires_grad_(False), torch.randn(1500, 1, 2, 3)
    train = torch.randn(6000, 1, 2, 3)
    judge = PictureJudge(Real(train), Real(held), Classifier(net), 500)
    figures = judge.figures(2 * train[:500], {})
    features = [torch.tanh(net.first(x.flatten(1))).double().numpy() for x in (2 * train[:500], held)]
    (mu, s), (nu, t) = ((z.mean(0), np.cov(z.T)) for z in features)
    expected = np.square(mu - nu).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)
    assert figures["frechet"] == pytest.approx(expected, rel=1e-6)
    said = net(2 * train[:500]).softmax(1).numpy()
    assert figures["confident"] == pytest.approx((said.max(1) > 0.9).mean())
    shares = np.bincount(said.argmax(1), minlength=3) / 500
    assert figures["entropy"] == pytest.approx(entropy(shares), rel=1e-6)
    assert 0 < judge.floor()["frechet"] < figures["frechet"] / 5  # of 500 real ones: not 0
    with pytest.raises(ValueError, match="no linear layer"):
        Classifier(nn.Conv2d(1, 1, 3))


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
