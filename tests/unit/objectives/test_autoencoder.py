"""The loss of an autoencoder against its formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from scaletrain.objectives import autoencoder
from scaletrain.objectives.autoencoder import divergence
from scaletrain.objectives.base import Request
from scaletrain.player import Turn
from tests.unit.objectives.denoising import pictures, unprepared
from tests.unit.objectives.prepared import prepared

TURN = Turn("train", "autoencoder")
MEAN, LOG_VARIANCE = torch.randn(5, 2, 2, 2), torch.randn(5, 2, 2, 2)


def network(x: Tensor, do: str = "train") -> tuple[Tensor, Tensor, Tensor]:
    return 0.5 * x + (0.25 if do == "train" else 0), MEAN, LOG_VARIANCE


def of_pictures(**options: Any) -> Any:
    objective = unprepared(autoencoder, {}, **options)
    prepared(objective, pictures(), None)
    return objective


def test_the_divergence_is_that_of_the_closed_form() -> None:
    expected = kl_divergence(Normal(MEAN, torch.exp(LOG_VARIANCE / 2)), Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(divergence(MEAN, LOG_VARIANCE), expected)


@pytest.mark.parametrize("error", ["l1", "l2"])
def test_the_loss_is_the_error_of_values_and_a_little_of_the_divergence(error: str) -> None:
    objective, x = of_pictures(error=error, kl=0.01), torch.rand(5, 1, 4, 4) * 2 - 1
    terms = objective.loss(TURN, {"autoencoder": network}, {"image": x})
    counts = objective.counts(TURN, {"image": x})
    assert counts == {"images": 5, "values": 80}
    found = sum(term.weight * float(term.sum) / counts[term.per] for term in terms.values())
    gap = (0.25 - 0.5 * x).abs() if error == "l1" else (0.25 - 0.5 * x) ** 2
    kl = kl_divergence(Normal(MEAN, torch.exp(LOG_VARIANCE / 2)), Normal(0.0, 1.0)).sum()
    assert found == pytest.approx(float(gap.mean()) + 0.01 * float(kl) / 80, rel=1e-5)


def test_evaluation_is_of_the_means_and_gives_decibels() -> None:
    objective, x = of_pictures(), torch.rand(5, 1, 4, 4) * 2 - 1
    terms = objective.evaluate({"autoencoder": network}, {"image": x})
    mse = float(terms["mse"].sum) / 80
    assert mse == pytest.approx(float((0.5 * x).square().mean()), rel=1e-5)
    psnr = objective.conclude({"mse": mse})["psnr"]
    assert psnr == pytest.approx(20 * math.log10(255 / (255 / 2 * math.sqrt(mse))), rel=1e-6)  # of pictures in bytes
    assert objective.conclude({"mse": 0.0})["psnr"] == math.inf


def test_pictures_are_shown_beside_what_becomes_of_them() -> None:
    shown = of_pictures().sample({"autoencoder": network}, Request(6, torch.Generator())).images
    assert shown.shape == (6, 1, 4, 4)
    torch.testing.assert_close(shown[1::2], (shown[::2] - 0.5) / 2 + 0.5)
    assert unprepared(autoencoder, {}).sample({"autoencoder": network}, Request(6, torch.Generator())) is None


def test_its_network_has_the_channels_of_the_data() -> None:
    spec = of_pictures().networks()["autoencoder"]
    assert (spec.type, spec.config) == ("autoencoder_kl", {"channels": 1})
