"""Guidance folded into a student, against the two calls of a teacher of which each class is a mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scaletrain.diffusion.path import Cosine
from scaletrain.diffusion.reading import Reading
from scaletrain.diffusion.signature import Signature
from scaletrain.errors import UserError
from scaletrain.networks.build import build
from scaletrain.networks.mixture import Config as MixtureConfig
from scaletrain.networks.mixture import Mixture
from scaletrain.objectives import guided
from scaletrain.player import Turn
from tests.unit.objectives.denoising import of_mixture, of_teacher

TURN = Turn("train", "student")
RING = MixtureConfig()
PAIR = {"modes": "ring", "count": 2, "radius": 2.0, "sigma": 0.5}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def two_calls(z: Tensor, t: Tensor, label: Tensor, scale: Tensor) -> Tensor:
    """Return the guided x₀ of the pair of modes at (±2, 0), σ 0.5, by their densities."""
    alpha, sigma = (v[:, None] for v in Cosine().alpha_sigma(t))
    means = torch.tensor([[2.0, 0.0], [-2.0, 0.0]], dtype=z.dtype)
    variance = alpha**2 * 0.25 + sigma**2
    of_mode = [m + alpha * 0.25 / variance * (z - alpha * m) for m in means]
    log = torch.stack([-(z - alpha * m).square().sum(1) / (2 * variance[:, 0]) for m in means], 1)
    share = torch.softmax(log, 1)[..., None]
    of_all = share[:, 0] * of_mode[0] + share[:, 1] * of_mode[1]
    return of_all + scale[:, None] * (torch.where(label[:, None] == 0, *of_mode) - of_all)


@pytest.mark.parametrize("scales", [None, [0.5, 4.0]])
def test_the_target_is_the_teachers_two_calls(scales: list[float] | None) -> None:
    objective = of_mixture(
        guided, PAIR, condition="label", guidance=3.0, scales=scales, prediction="x0", weighting="x0"
    )
    seen: dict[str, Tensor] = {}

    def student(z: Tensor, t: Tensor, label: Tensor, guidance: Tensor | None = None) -> Tensor:
        seen.update(z=z, t=t, label=label, guidance=torch.full_like(t, 3.0) if guidance is None else guidance)
        assert (guidance is None) == (scales is None)
        return torch.zeros_like(z)

    networks: dict[str, Any] = {"student": student, "teacher": Mixture(objective.signature.source)}
    loss = objective.loss(TURN, networks, {"draw": torch.arange(500)})["loss"].sum
    expected = two_calls(seen["z"].double(), seen["t"].double(), seen["label"], seen["guidance"].double())
    assert float(loss) == pytest.approx(float(expected.square().mean(1).sum()), rel=1e-5)
    assert set(seen["label"].tolist()) == {0, 1}
    if scales:
        assert 0.5 <= seen["guidance"].min() < 0.6
        assert 3.9 < seen["guidance"].max() <= 4


def test_a_student_learns_every_scale_and_one_that_is_not_told_cannot() -> None:
    errors = {}
    for broken in (False, True):
        torch.manual_seed(0)
        objective = of_mixture(guided, PAIR, condition="label", scales=[1.0, 5.0], weighting="plain")
        spec = objective.networks()["student"]
        spec = spec.model_copy(update={"config": {**spec.config, "hidden": [64, 64]}})
        network = build("student", spec)
        networks: dict[str, Any] = {"student": network, "teacher": Mixture(objective.signature.source)}
        if broken:
            networks["student"] = lambda z, t, label, guidance, n=network: n(z, t, label)
        optimizer = torch.optim.Adam(network.parameters(), 3e-3)
        for _ in range(300):
            loss = objective.loss(TURN, networks, {"draw": torch.arange(128)})["loss"].sum / 256
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        x0, batch = objective.data({"draw": torch.arange(2000)})
        t = torch.rand(2000)
        z = Cosine().noisy(x0, torch.randn_like(x0), t)
        with torch.no_grad():
            found, _ = objective.student(networks, batch)(z, t)
        goal = two_calls(z, t, batch["label"], batch["guidance"])
        errors[broken] = float((found - goal).square().mean())
    assert errors[False] < 0.3
    assert errors[True] > 4 * errors[False]


def test_the_signature_says_which_scales_the_student_is_told_and_that_it_cannot_be_guided_again() -> None:
    objective = of_mixture(guided, PAIR, condition="label", scales=[1.0, 5.0], guidance=2.0)
    assert objective.signature.guidance == (1.0, 5.0)
    assert not objective.signature.dropped
    assert objective.networks()["student"].config == {"dim": 2, "classes": 2, "guidance": True}
    noise = torch.randn(4, 2)
    assert objective.conditions(noise)["guidance"].tolist() == [2.0] * 4


def signature(**options: Any) -> Signature:
    return Signature(reading=Reading(), space="point", shape=(2,), source=RING, **options)


def test_a_teacher_that_was_not_trained_without_its_condition_is_refused(tmp_path: Path) -> None:
    conditional = {"condition": "label", "classes": 8}
    for given in ({"guidance": 3.0}, {"scales": [1.0, 4.0]}):
        key = next(iter(given))
        with pytest.raises(UserError, match=rf"objective.{key}: the teacher is not trained without its condition"):
            of_teacher(guided, signature(**conditional), tmp_path, **given)
        with pytest.raises(UserError, match=rf"objective.{key}: there is no condition"):
            of_teacher(guided, signature(), tmp_path, **given)
        of_teacher(guided, signature(**conditional, dropped=True), tmp_path, **given)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scales": [4.0, 1.0]}, r"objective.scales: \[4, 1\] is no range above 0"),
        ({"scales": [0.0, 1.0]}, "no range above 0"),
        ({"scales": [2.0, 4.0]}, "objective.guidance: 1 is not one of the scales"),
    ],
)
def test_scales_must_be_a_range_that_samples_are_in(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        of_mixture(guided, PAIR, condition="label", **options)
