"""The table of few steps: real pictures rank above noise, figures and pictures are of the samplers that they name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scaletrain.evaluate.few_steps import compare
from scaletrain.evaluate.judges import ModesJudge, PictureJudge, Real
from scaletrain.networks.mixture import Config, Mixture
from scaletrain.objectives.base import Samples
from tests.unit.evaluate.digits import real_digits


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def shown(x: Tensor) -> Samples:
    return Samples(points=x) if x.dim() == 2 else Samples(images=(x + 1) / 2)


def test_comparison_ranks_real_pictures_above_noise() -> None:
    train, held = real_digits()
    noise, real = torch.randn(400, 1, 8, 8), train.samples[:400]

    def good(noise: Tensor, steps: int, told: object) -> Tensor:
        return real

    def bad(noise: Tensor, steps: int, told: object) -> Tensor:
        return (real + noise / steps).clamp(-1, 1)

    report = compare(good, 8, {4: bad, 1: bad}, [1], noise, {}, PictureJudge(train, held), shown)
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
    torch.testing.assert_close(common.images[16:32], (bad(noise, 4, {})[:16] + 1) / 2)


def test_without_labels_there_is_no_judge() -> None:
    train, held = real_digits()
    judge, made = PictureJudge(Real(train.samples), Real(held.samples)), held.samples[:100]
    report = compare(lambda n, s, t: made, 4, {1: lambda n, s, t: made}, [], made, {}, judge, shown)
    assert set(report.files["steps.json"]["student"]["1"]) == {"energy_distance", "rmse_to_teacher", "per_second"}
    assert "sure" not in report.text


def test_points_have_a_picture_of_each_sampler_and_samplers_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModesJudge, "draw", 500)
    mixture = Mixture(Config())
    told = {"label": torch.arange(1000) % 8}

    def sampler(noise: Tensor, steps: int, told: dict[str, Tensor]) -> Tensor:
        return mixture.means[told["label"]] + noise / steps

    noise = torch.randn(1000, 2)
    report = compare(sampler, 8, {2: sampler}, [2], noise, told, ModesJudge(mixture, 0), shown)
    table = report.files["steps.json"]
    assert table["student"]["2"]["on_mode"] == table["teacher"]["2"]["on_mode"] < table["teacher"]["8"]["on_mode"]
    assert table["student"]["2"]["per_second"] > 0
    assert set(report.pictures) == {"teacher-8-steps", "student-2-steps"}
    assert "on a mode" in report.text
