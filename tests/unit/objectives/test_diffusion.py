"""The loss of diffusion against its formula, at times, pairs and conditions as the recipe says; its samples."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from scaletrain.diffusion.pairing import optimal_pairs
from scaletrain.diffusion.path import Cosine
from scaletrain.diffusion.signature import Signature
from scaletrain.errors import UserError
from scaletrain.networks.build import build
from scaletrain.networks.mixture import Mixture
from scaletrain.objectives import diffusion
from scaletrain.objectives.base import Request
from scaletrain.player import Turn
from tests.unit.objectives.denoising import RING, of_mixture, pictures, unprepared
from tests.unit.objectives.prepared import prepared

TURN = Turn("train", "model")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def of_pictures(**options: Any) -> diffusion.Objective:
    objective = unprepared(diffusion, {}, **options)
    prepared(objective, pictures(), None)
    return objective  # type: ignore[no-any-return]


def half(z: Tensor, t: Tensor, **told: Tensor) -> Tensor:
    return 0.5 * z


def test_by_default_the_loss_is_the_plain_v_loss() -> None:
    objective, x0 = of_pictures(), torch.rand(6, 1, 4, 4) * 2 - 1
    torch.manual_seed(5)
    term = objective.loss(TURN, {"model": half}, {"image": x0})["loss"]  # type: ignore[dict-item]
    torch.manual_seed(5)
    t = (torch.rand(1) + torch.arange(6) / 6) % 1
    eps = torch.randn_like(x0)
    expected = 0.0
    for i in range(6):
        phi = math.atan(math.exp(-10)) + float(t[i]) * (math.pi / 2 - 2 * math.atan(math.exp(-10)))
        z = math.cos(phi) * x0[i] + math.sin(phi) * eps[i]
        expected += float(((0.5 * z - (math.cos(phi) * eps[i] - math.sin(phi) * x0[i])) ** 2).mean())
    assert term.per == "samples"
    assert float(term.sum) == pytest.approx(expected, rel=1e-3)


def test_flow_matching_pairs_by_optimal_transport_at_logit_normal_times() -> None:
    objective = of_pictures(path="flow", prediction="velocity", weighting="plain", times="logit_normal", pairing=True)
    x0 = torch.rand(6, 1, 4, 4) * 2 - 1
    torch.manual_seed(5)
    found = objective.loss(TURN, {"model": half}, {"image": x0})["loss"].sum  # type: ignore[dict-item]
    torch.manual_seed(5)
    share = ((torch.rand(1) + torch.arange(6) / 6) % 1).double()
    t = torch.sigmoid(torch.distributions.Normal(0, 1).icdf(share)).float().view(-1, 1, 1, 1)
    eps = optimal_pairs(x0, torch.randn_like(x0))
    expected = (0.5 * ((1 - t) * x0 + t * eps) - (eps - x0)).square().flatten(1).mean(1).sum()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_some_conditions_are_left_out_in_training_and_none_in_evaluation() -> None:
    objective, seen = of_pictures(condition="label", dropped=0.25), []

    def network(z: Tensor, t: Tensor, label: Tensor) -> Tensor:
        seen.append(label)
        return z

    batch = {"image": torch.randn(4000, 1, 4, 4), "label": torch.arange(4000) % 2}
    objective.loss(TURN, {"model": network}, batch)  # type: ignore[dict-item]
    objective.evaluate({"model": network}, batch)  # type: ignore[dict-item]
    assert objective.signature.classes == 2
    assert objective.signature.dropped
    assert float((seen[0] == 2).float().mean()) == pytest.approx(0.25, abs=0.03)
    assert (seen[0][seen[0] != 2] == batch["label"][seen[0] != 2]).all()
    assert (seen[1] == batch["label"]).all()


def test_a_mixture_gives_samples_for_data_and_their_modes_for_classes() -> None:
    objective = of_mixture(diffusion, condition="label")
    x0, batch = objective.data({"draw": torch.arange(500)})
    mixture = Mixture(objective.signature.source)
    assert (mixture.nearest(x0)[1] == batch["label"]).float().mean() > 0.99
    assert objective.counts(TURN, batch) == {"samples": 500}
    assert objective.signature.reading.prediction == "edm"
    assert objective.signature.reading.data_std == pytest.approx(math.sqrt(8 + 0.04), rel=1e-3)


def test_samples_are_guided_as_the_recipe_says() -> None:
    """A network that answers a mode's own mean where it is told one, and 0 where it is told none."""
    means = torch.cat([Mixture(of_mixture(diffusion).signature.source).means, torch.zeros(1, 2)])

    def model(z: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return means[label]

    options: dict[str, Any] = {"condition": "label", "dropped": 0.1, "prediction": "x0"}
    for guidance in (1.0, 2.0):
        objective = of_mixture(diffusion, guidance=guidance, **options)
        request = Request(16, torch.Generator().manual_seed(0))
        samples = objective.sample({"model": model}, request).points
        torch.testing.assert_close(samples, guidance * means[:8].repeat(2, 1))


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(UserError, match=r"objective.dropped"):
        of_pictures(dropped=0.1)
    with pytest.raises(UserError, match="not trained without its condition"):
        of_pictures(condition="label", guidance=2.0)
    with pytest.raises(UserError, match=r"objective.guidance: there is no condition"):
        of_pictures(guidance=2.0)
    for prediction in ("eps", "score"):
        with pytest.raises(UserError, match="there is no signal"):
            of_pictures(path="flow", prediction=prediction)
    of_pictures(path="flow", prediction="x0")
    of_pictures(path="linear", prediction="eps")


def test_the_network_is_of_the_shape_of_the_data_and_is_told_their_classes() -> None:
    spec = of_pictures(condition="label").networks()["model"]
    assert (spec.type, spec.config) == ("unet", {"channels": 1, "height": 4, "width": 4, "classes": 2})
    objective = of_mixture(diffusion)
    assert objective.networks()["model"].type == "point_denoiser"
    network = build("model", objective.networks()["model"])
    objective.loss(TURN, {"model": network}, {"draw": torch.arange(8)})["loss"].sum.backward()
    assert isinstance(objective.signature, Signature)
    assert objective.signature.reading.path == Cosine()
    assert RING["config"]["modes"] == objective.signature.source.modes
