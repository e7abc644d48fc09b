"""Progressive distillation: its target is where the teacher gets to, on every path and in every prediction."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path as Folder
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scaletrain.data.dataset import TensorDataset
from scaletrain.diffusion.denoiser import Denoiser
from scaletrain.diffusion.path import Cosine, Path
from scaletrain.diffusion.prediction import Prediction
from scaletrain.diffusion.reading import Reading
from scaletrain.diffusion.signature import Signature
from scaletrain.diffusion.solvers import ddim_step, sample
from scaletrain.errors import UserError
from scaletrain.evaluate.judges import ModesJudge
from scaletrain.networks.mixture import Config as MixtureConfig
from scaletrain.networks.mixture import Mixture
from scaletrain.objectives import diffusion, progressive
from scaletrain.objectives.base import Data, RunView
from scaletrain.player import Turn
from tests.unit.diffusion.closed_forms import MEAN, PATHS, STD, gaussian
from tests.unit.objectives.denoising import ELSEWHERE, of_mixture, of_teacher, pictures, unprepared
from tests.unit.objectives.prepared import prepared

KINDS: tuple[Prediction, ...] = ("eps", "x0", "v", "score", "velocity", "edm")
TURN = Turn("train", "student")
RING = MixtureConfig()
BATCH = {"draw": torch.arange(256)}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def mean_of_ring(z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return E[x₀ | z] of the ring's eight modes at distance 4, of σ 0.2, written out."""
    angles = torch.arange(8, dtype=z.dtype) * (torch.pi / 4)
    means = 4 * torch.stack([angles.cos(), angles.sin()], 1)
    variance = alpha**2 * 0.04 + sigma**2
    apart = z[:, None] - alpha[..., None] * means
    share = torch.softmax(-apart.square().sum(2) / (2 * variance), 1)[..., None]
    return (share * (means + alpha[..., None] * 0.04 / variance[..., None] * apart)).sum(1)


def two_steps(path: Path, z: Tensor, times: list[Tensor]) -> Tensor:
    """Take DDIM steps of the exact teacher through times (B,), written out."""
    for t, s in pairwise(times):
        (alpha, sigma), (alpha_s, sigma_s) = path.at(t, z), path.at(s, z)
        x0 = mean_of_ring(z, alpha, sigma)
        z = alpha_s * x0 + sigma_s * (z - alpha * x0) / sigma
    return z


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PATHS)
def test_two_exact_teacher_steps_are_one_student_step(name: str, kind: Prediction, dtype: torch.dtype) -> None:
    """At each of the student's times; where a prediction tells x₀ by dividing by α ≈ 0, not at the last."""
    path, blind = PATHS[name], kind in ("eps", "score")
    objective = of_mixture(progressive, path=path.model_dump(), prediction="v", steps=4, teacher_steps=8)
    mixture = Mixture(objective.signature.source).to(dtype)
    teacher = objective.teacher({"teacher": mixture})
    reading = Reading(path=path, prediction=kind, data_std=2.8)
    grid = torch.tensor(path.grid(8), dtype=dtype)
    for number in range(1 if blind else 0, 4):
        at = torch.full((200,), number)
        t, middle, end = (grid[2 * at + i] for i in range(3))
        z = path.noisy(mixture.draw(200).to(dtype), torch.randn(200, 2, dtype=dtype), t)
        answer = reading.joined(objective.target(teacher, z, grid, at), z, t)
        reached = ddim_step(Denoiser(lambda *_, a=answer: a, reading), z, t, end)
        exact = two_steps(path, z.double(), [t.double(), middle.double(), end.double()])
        scale = float(z.abs().max().clamp(min=1))
        torch.testing.assert_close(reached.double() / scale, exact / scale, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["cosine", "flow", "edm", "trig", "discrete"])
def test_the_loss_is_nothing_for_who_gets_there_and_something_for_others(name: str) -> None:
    """At one step, the target is the end of the teacher's path from noise: of a Gaussian, known in many steps."""
    path = PATHS[name]
    objective = of_mixture(progressive, path=path.model_dump(), prediction="edm", steps=1, teacher_steps=256)
    reading = objective.signature.reading

    def student(shift: float) -> Any:
        def network(z: Tensor, told: Tensor) -> Tensor:
            t = torch.full((len(z),), path.last)
            torch.testing.assert_close(told, path.told(t))
            z = z * reading.scale(*path.at(t, z))
            alpha, sigma = path.at(t, z)
            x0 = MEAN + STD * (z - alpha * MEAN) / torch.hypot(alpha * STD, sigma)
            return reading.joined((x0 + shift).float(), z, t)

        return network

    def teacher(z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return gaussian(z, alpha[:, None], sigma[:, None])[0]

    objective.data = lambda batch: ((MEAN + STD * torch.randn(2000, 2)).float(), batch)
    losses = [
        float(objective.loss(TURN, {"student": student(shift), "teacher": teacher}, BATCH)["loss"].sum) / 2000
        for shift in (0.0, 0.1)
    ]
    assert losses[0] < 0.1 * losses[1]


def test_student_trains_at_its_own_steps_only_and_teacher_takes_its_own(tmp_path: Folder) -> None:
    signature = Signature(reading=Reading(), space="point", shape=(2,), source=RING)
    objective = of_teacher(progressive, signature, tmp_path, steps=4, teacher_steps=8)
    seen: dict[str, list[float]] = {"student": [], "teacher": []}

    def network(name: str) -> Any:
        def call(z: Tensor, t: Tensor) -> Tensor:
            seen[name] += t.tolist()
            return torch.zeros_like(z)

        return call

    term = objective.loss(TURN, {name: network(name) for name in seen}, {"draw": torch.arange(400)})["loss"]
    assert term.per == "samples"
    assert {round(8 * t, 4) for t in seen["student"]} == {2, 4, 6, 8}
    assert {round(8 * t, 4) for t in seen["teacher"]} == {1, 2, 3, 4, 5, 6, 7, 8}
    counts = np.bincount((4 * np.array(seen["student"])).round().astype(int))
    assert (counts[1:] == 100).all()


@pytest.mark.parametrize(("steps", "teacher_steps"), [(4, 6), (4, 4), (8, 4)])
def test_steps_must_divide(steps: int, teacher_steps: int) -> None:
    with pytest.raises(UserError, match="teacher_steps"):
        of_mixture(progressive, steps=steps, teacher_steps=teacher_steps)


def test_the_wrong_target_trains_a_worse_student() -> None:
    """Of 8 steps to 1, on two modes: a teacher that stops one step short, as an off-by-one would have it."""
    config = {"modes": "ring", "count": 2, "radius": 2.0, "sigma": 0.3}
    errors = []
    for broken in (False, True):
        torch.manual_seed(0)
        objective = of_mixture(progressive, config, steps=1, teacher_steps=8, weighting="x0")
        mixture = Mixture(objective.signature.source)
        network = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
        networks: dict[str, Any] = {"student": lambda z, t, n=network: n(z), "teacher": mixture}
        if broken:
            grid = Cosine().grid(8)
            objective.target = lambda teacher, z, times, number: teacher(z, times[number])[0]
            assert grid[0] == 1
        optimizer = torch.optim.Adam(network.parameters(), 3e-3)
        for _ in range(300):
            loss = objective.loss(TURN, networks, {"draw": torch.arange(256)})["loss"].sum / 256
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        noise = torch.randn(1000, 2)
        with torch.no_grad():
            made = sample(objective.student(networks), noise, 1)
            goal = sample(objective.teacher(networks), noise, 8)
        errors.append(float((made - goal).square().mean()))
    assert errors[0] < 0.1
    assert errors[1] > 5 * errors[0]


# --- teachers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        (None, "networks.teacher is missing"),
        ({"from": "stage:teacher/model"}, "frozen: true"),
        ({"type": "unet", "frozen": True}, "`from` or `path`"),
    ],
)
def test_teacher_must_be_there_frozen_and_trained(teacher: dict[str, Any] | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        unprepared(progressive, {"teacher": teacher} if teacher else {}, steps=1, teacher_steps=2)


@pytest.mark.parametrize(("given", "missing"), [({}, "path"), ({"path": "flow"}, "prediction")])
def test_a_teacher_that_does_not_say_what_it_predicts_is_asked_about_by_key(
    given: dict[str, Any], missing: str, tmp_path: Folder
) -> None:
    options: dict[str, Any] = {"steps": 1, "teacher_steps": 2, "rows": pictures()}
    with pytest.raises(UserError, match=f"objective.{missing}: the teacher does not say"):
        of_teacher(progressive, None, tmp_path, **options, **given)
    objective = of_teacher(progressive, None, tmp_path, **options, path="flow", prediction="velocity")
    assert objective.signature.reading == Reading(
        path=PATHS["flow"], prediction="velocity", data_std=objective.signature.reading.data_std
    )


def test_a_student_inherits_its_teachers_reading_or_takes_one_of_its_own(tmp_path: Folder) -> None:
    reading = Reading(path=PATHS["edm"], prediction="edm", data_std=0.5)
    signature = Signature(reading=reading, space="image", shape=(1, 4, 4))
    options: dict[str, Any] = {"steps": 1, "teacher_steps": 2, "rows": pictures()}
    assert of_teacher(progressive, signature, tmp_path, **options).signature.reading == reading
    other = of_teacher(progressive, signature, tmp_path, **options, path="flow", prediction="velocity")
    assert other.signature.reading == Reading(path=PATHS["flow"], prediction="velocity", data_std=0.5)
    z, t = torch.randn(4, 1, 4, 4), torch.full((4,), 0.5)
    read = other.teacher({"teacher": lambda z, t: torch.sin(z)})
    assert read.path == PATHS["flow"]
    # σ/α = 1: z = (x₀ + ε) / 2 is half of EDM's z at σ = 1
    torch.testing.assert_close(
        read(z, t)[0], Denoiser(lambda z, t: torch.sin(z), reading)(2 * z, torch.ones(4))[0], rtol=1e-4, atol=1e-5
    )


def test_a_student_of_a_teacher_that_is_told_the_scale_of_guidance_is_told_it_too(tmp_path: Folder) -> None:
    """Meng et al., 2023, section 3.2: the second stage, with scales drawn for each sample."""
    signature = Signature(
        reading=Reading(),
        space="point",
        shape=(2,),
        condition="label",
        classes=8,
        guidance=(1.0, 4.0),
        source=RING,
    )
    objective = of_teacher(progressive, signature, tmp_path, steps=1, teacher_steps=2, guidance=2.0)
    assert objective.networks()["student"].config == {"dim": 2, "classes": 8, "guidance": True}
    seen: dict[str, list[Tensor]] = {"student": [], "teacher": []}

    def network(name: str) -> Any:
        def call(z: Tensor, t: Tensor, label: Tensor, guidance: Tensor) -> Tensor:
            seen[name].append(torch.stack([label, guidance]))
            return z

        return call

    objective.loss(TURN, {name: network(name) for name in seen}, {"draw": torch.arange(500)})
    assert len(seen["teacher"]) == 2
    for told in (*seen["teacher"], *seen["student"]):
        torch.testing.assert_close(told, seen["student"][0])
    scales = seen["student"][0][1]
    assert 1 <= scales.min() < 1.1
    assert 3.9 < scales.max() <= 4
    with pytest.raises(UserError, match=r"objective.guidance: 5 is not one of the scales"):
        of_teacher(progressive, signature, tmp_path, steps=1, teacher_steps=2, guidance=5.0)


# --- the report -------------------------------------------------------------------------------------------------------


class _Dot(nn.Module):
    """Answers v such that x̂₀ = a fixed factor of z."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return Reading().joined(self.factor * z, z, t)


def test_report_names_every_student_and_measures_it(tmp_path: Folder) -> None:
    signature = Signature(reading=Reading(), space="image", shape=(1, 4, 4))

    def stage(steps: int) -> progressive.Objective:
        options: dict[str, Any] = {"compare_at": [1], "compare_samples": 64, "rows": pictures()}
        return of_teacher(progressive, signature, tmp_path, steps=steps, teacher_steps=2 * steps, **options)  # type: ignore[no-any-return]

    first = unprepared(diffusion, {}, steps=4)
    prepared(first, pictures(), None)
    objectives = {"teacher": first, "s2": stage(2), "s1": stage(1)}
    rows = {"image": torch.rand(80, 1, 4, 4) * 2 - 1, "label": torch.arange(80) % 2}
    data = Data(TensorDataset(rows), TensorDataset(rows))
    networks = {("s2", "teacher"): _Dot(0.1), ("s2", "student"): _Dot(0.1), ("s1", "student"): _Dot(0.3)}
    view = RunView(
        tmp_path,
        tuple(objectives),
        data,
        torch.device("cpu"),
        7,
        lambda s, n: networks[s, n],  # type: ignore[return-value]
        objectives.__getitem__,
        lambda source: torch.nn.Identity(),
    )
    report = objectives["s1"].report(view)
    assert report is not None
    table = report.files["steps.json"]
    assert set(table) == {"floor", "teacher", "student"}
    assert set(table["teacher"]) == {"1", "4"}
    assert set(table["student"]) == {"2", "1"}
    noise = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(7))
    z = noise
    for i in range(4, 0, -1):  # the teacher's four steps written out: x̂₀ = z / 10, ε̂ = (z − α z / 10) / σ
        (a, s), (a2, s2) = (Cosine().alpha_sigma(torch.tensor(j / 4)) for j in (i, i - 1))
        z = a2 * 0.1 * z + s2 * (z - a * 0.1 * z) / s
    for who, factor in (("teacher", 0.1), ("student", 0.3)):  # in one step
        rmse = float(((factor * noise).clamp(-1, 1) - z.clamp(-1, 1)).square().mean().sqrt())
        assert table[who]["1"]["rmse_to_teacher"] == pytest.approx(rmse, rel=1e-3)
    assert {"energy_distance", "confident", "entropy"} <= set(table["teacher"]["4"])
    assert "same-noise-teacher-4-student-2-1" in report.pictures
    assert "student" in report.text


def test_the_exact_bed_is_judged_by_its_modes(tmp_path: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exact teacher reaches all eight modes in 64 steps and none in one."""
    monkeypatch.setattr(ModesJudge, "draw", 500)
    objective = of_mixture(progressive, steps=1, teacher_steps=64, compare_at=[1], compare_samples=1500)
    mixture = Mixture(objective.signature.source)
    networks = {"teacher": mixture, "student": lambda z, t: torch.zeros_like(z)}
    view = RunView(
        tmp_path,
        ("main",),
        Data(TensorDataset({"draw": torch.arange(8)})),
        torch.device("cpu"),
        0,
        lambda s, n: networks[n],  # type: ignore[return-value]
        lambda s: objective,
        lambda source: torch.nn.Identity(),
    )
    report = objective.report(view)
    assert report is not None
    table = report.files["steps.json"]
    assert table["teacher"]["64"]["energy_distance"] < 0.03
    assert table["teacher"]["64"]["on_mode"] > 0.99
    assert table["teacher"]["64"]["modes"] == table["floor"]["modes"] == 8
    assert table["student"]["1"]["energy_distance"] > 1
    assert table["teacher"]["1"]["on_mode"] < 0.05
    assert ELSEWHERE["frozen"]
