"""Reflow on mixtures: pairs against ODEs solved here, losses that vanish for the right flow, and wrong pairs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from scaletrain.config import Recipe
from scaletrain.data.cache import cache_root
from scaletrain.data.dataset import Dataset
from scaletrain.data.sources import Rows
from scaletrain.data.tables import ArrayTable
from scaletrain.errors import UserError
from scaletrain.networks import mixture
from scaletrain.networks.point_denoiser import Config as PointConfig
from scaletrain.networks.point_denoiser import PointDenoiser
from scaletrain.objectives.reflow import Config, Objective
from scaletrain.player import Turn
from tests.launch import run, start
from tests.unit.objectives.prepared import prepared

RING = {"modes": "ring", "count": 8, "radius": 4.0, "sigma": 0.2}
GAUSSIAN = {"modes": "random", "count": 1, "radius": 2.0, "sigma": 0.5, "dim": 3}
TURN = Turn("train", "student")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALETRAIN_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)


def objective(teacher: dict[str, Any] = RING, seed: int = 0, **options: Any) -> Objective:
    recipe = {
        "seed": seed,
        "objective": {"type": "reflow", "path": "flow", **options},
        "networks": {"teacher": {"type": "mixture", "config": teacher}},
        "data": {"train": "noise:1"},
        "evaluate": {"batch": 64},
    }
    found = Recipe.model_validate(recipe)
    return Objective(Config.model_validate(found.objective.options), found)


def noise_rows(count: int) -> Rows:
    return Rows([ArrayTable("noise", {"draw": np.arange(count)})])


def made(own: Objective, count: int = 256, held: int = 64) -> tuple[Dataset, Dataset]:
    """Have the teacher make all pairs; return those to train on and those held out."""
    data = prepared(own, noise_rows(count), noise_rows(held))
    ahead = own.ahead()
    teacher = mixture.Mixture(mixture.Config(**own.recipe.networks["teacher"].config))
    with torch.no_grad():
        for part in ahead.missing():
            ahead.do({"teacher": teacher}, torch.device("cpu"), part)
    assert ahead.missing() == []
    assert isinstance(data.train, Dataset)
    assert data.eval is not None
    return data.train, data.eval


def all_of(dataset: Dataset) -> dict[str, Tensor]:
    return dataset.batch(range(len(dataset)), np.zeros(len(dataset), np.uint64))


# --- the pairs --------------------------------------------------------------------------------------------------------


def flow_of(noise: Tensor, score: Callable[[np.ndarray, float], np.ndarray], high: float = 1e4) -> Tensor:
    """Solve dx/dσ = −σ ∇ log p_σ(x), the flow of x = x₀ + σ ε, from σ = high to 0, in u = log σ."""

    def slope(u: float, x: np.ndarray) -> np.ndarray:
        sigma = np.exp(u)
        return (-(sigma**2) * score(x.reshape(noise.shape), sigma)).ravel()

    x = high * noise.double().numpy()
    solved = solve_ivp(slope, (np.log(high), np.log(1e-4)), x.ravel(), method="DOP853", rtol=1e-7, atol=1e-8)
    return torch.from_numpy(solved.y[:, -1].reshape(noise.shape)).float()


def ring() -> np.ndarray:
    angles = np.arange(8) * np.pi / 4
    return 4 * np.stack([np.cos(angles), np.sin(angles)], 1)


def score_of_ring(x: np.ndarray, sigma: float) -> np.ndarray:
    """∇ log Σ_k N(x; m_k, 0.2² + σ²)."""
    variance, apart = 0.04 + sigma**2, x[:, None] - ring()
    log = -(apart**2).sum(-1) / (2 * variance)
    share = np.exp(log - log.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    return -(share[..., None] * apart).sum(1) / variance


def test_pairs_are_solutions_of_the_teacher_s_flow() -> None:
    train, _ = made(objective(solver="heun", teacher_steps=128), 40)
    batch = all_of(train)
    expected = flow_of(batch["noise"], score_of_ring)
    assert float((expected.norm(dim=1) - 4).abs().max()) < 1
    torch.testing.assert_close(batch["made"], expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_pairs_of_a_guided_teacher_that_is_told_classes(scale: float) -> None:
    options: dict[str, Any] = {"solver": "heun", "teacher_steps": 256, "condition": "label", "guidance": scale}
    batch = all_of(made(objective(**options), 40)[0])
    assert len(batch["label"].unique()) == 8
    centres = ring()[batch["label"].numpy()]

    def score(x: np.ndarray, sigma: float) -> np.ndarray:
        with_, without = -(x - centres) / (0.04 + sigma**2), score_of_ring(x, sigma)
        return without + scale * (with_ - without)

    torch.testing.assert_close(batch["made"], flow_of(batch["noise"], score), rtol=0, atol=5e-3)


@pytest.mark.parametrize("path", ["flow", "cosine", "trig", "edm"])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "heun"])
def test_pairs_of_a_gaussian_are_an_affine_map(path: str, solver: str) -> None:
    own = objective(GAUSSIAN, path=path, solver=solver, teacher_steps=200)
    batch = all_of(made(own, 50)[0])
    mean = mixture.Mixture(mixture.Config.model_validate(GAUSSIAN)).means[0]
    atol = 0.04 if solver == "ddim" else 0.01
    if path == "edm":
        atol += 0.03  # which begins with a little of the data, where samplers take noise alone
    torch.testing.assert_close(batch["made"], mean + 0.5 * batch["noise"], rtol=0, atol=atol)


def test_held_out_pairs_have_noise_of_their_own_and_seeds_too() -> None:
    train, held = (all_of(part)["noise"] for part in made(objective(teacher_steps=2), 64, 64))
    other = all_of(made(objective(teacher_steps=2, seed=1), 64, 64)[0])["noise"]
    for one, another in ((train, held), (train, other)):
        assert (one != another).all()
        assert (torch.cdist(one, another).min(1).values > 0).all()


def test_each_source_has_noise_of_its_own() -> None:
    own = objective(teacher_steps=2)
    own.prepare(noise_rows(128), None)
    first, second, held = (own.examples(noise_rows(64), training) for training in (True, True, False))
    ahead = own.ahead()
    for part in ahead.missing():
        ahead.do({"teacher": mixture.Mixture(mixture.Config())}, torch.device("cpu"), part)
    noise = [all_of(part)["noise"] for part in (first, second, held)]
    for one, another in ((0, 1), (0, 2), (1, 2)):
        assert (noise[one] != noise[another]).all()
    own.prepare(noise_rows(128), None)  # again: they are the same
    assert torch.equal(all_of(own.examples(noise_rows(64), True))["noise"], noise[0])


def test_pairs_are_made_again_only_for_another_teacher_or_solver() -> None:
    def missing(teacher: dict[str, Any] = RING, **options: Any) -> bool:
        own = objective(teacher, **{"teacher_steps": 2, **options})
        prepared(own, noise_rows(64), None)
        found = bool(own.ahead().missing())
        made(own, 64)
        return found

    assert missing()
    assert not missing()
    assert not missing(one_step=True, huber=0.1)  # a later stage takes those of an earlier one
    assert missing({**RING, "sigma": 0.3})
    assert missing(teacher_steps=3)
    assert missing(solver="heun")
    assert missing(path="cosine")
    assert missing(stored="float16")
    assert missing(condition="label")
    assert missing(condition="label", guidance=2.0)
    assert missing(seed=1)
    assert not missing()


def test_rows_with_labels_give_theirs() -> None:
    rows = Rows([ArrayTable("points", {"point": np.zeros((30, 2), np.float32), "label": np.arange(30) % 3})])
    own = objective(condition="label", teacher_steps=2)
    data = prepared(own, rows, None)
    ahead = own.ahead()
    for part in ahead.missing():
        ahead.do({"teacher": mixture.Mixture(mixture.Config())}, torch.device("cpu"), part)
    assert isinstance(data.train, Dataset)
    assert all_of(data.train)["label"].tolist() == [i % 3 for i in range(30)]


# --- the losses -------------------------------------------------------------------------------------------------------


class Straight(nn.Module):
    """The network of the straight flow from N(0, I) to m + s N(0, I): at z and t, it knows ε, and x₀ = m + s ε."""

    def __init__(self, own: Objective):
        super().__init__()
        self.reading = own.signature.reading
        self.mean = mixture.Mixture(mixture.Config.model_validate(GAUSSIAN)).means[0]

    def forward(self, z: Tensor, told: Tensor) -> Tensor:
        t = told
        alpha, sigma = self.reading.path.at(t, z)
        scale = self.reading.scale(alpha, sigma)
        z = z if scale is None else z * scale
        eps = (z - alpha * self.mean) / (0.5 * alpha + sigma)
        a, b = self.reading.parts(t, z)
        return a * (self.mean + 0.5 * eps) + b * eps


@pytest.mark.parametrize("options", [{"one_step": True}, {"huber": 0.1}, {}])
@pytest.mark.parametrize(
    ("path", "prediction"), [("flow", "velocity"), ("flow", "edm"), ("cosine", "v"), ("flow", "x0")]
)
def test_the_straight_flow_has_no_loss(path: str, prediction: str, options: dict[str, Any]) -> None:
    own = objective(GAUSSIAN, path=path, prediction=prediction, **options)
    made(own)
    noise = torch.randn(256, 3)
    straight = Straight(own)
    batch = {"noise": noise, "made": straight.mean + 0.5 * noise}
    assert float(own.loss(TURN, {"student": straight}, batch)["loss"].sum) < 1e-6
    found = own.conclude({n: float(t.sum) / 256 for n, t in own.evaluate({"student": straight}, batch).items()})
    assert found["one_step_rmse"] < 1e-4
    for steps in (1, 2, 5):  # and it gives the pairs' samples in any number of steps
        torch.testing.assert_close(own.sampler(straight)(noise, steps, {}), batch["made"], rtol=1e-3, atol=2e-3)


def test_losses_are_those_of_the_paper() -> None:
    """At velocity 0, |x₁ − x₀|² for the straight flow, and |x₀|² for a network that says 0 for the sample."""
    noise, x0 = torch.randn(500, 2), torch.randn(500, 2)
    batch = {"noise": noise, "made": x0}

    def zero(z: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(z)

    def loss(**options: Any) -> float:
        own = objective(teacher_steps=2, **options)
        made(own)
        return float(own.loss(TURN, {"student": zero}, batch)["loss"].sum)  # type: ignore[dict-item]

    straight, once = ((noise - x0) ** 2).mean(1), (x0**2).mean(1)
    assert loss(prediction="velocity") == pytest.approx(float(straight.sum()), rel=1e-5)
    assert loss(prediction="x0", one_step=True) == pytest.approx(float(once.sum()), rel=1e-5)
    for c in (0.01, 3.0):
        expected = (torch.sqrt(once + c**2) - c).sum()
        assert loss(prediction="x0", one_step=True, huber=c) == pytest.approx(float(expected), rel=1e-5)


def fitted(own: Objective, batch: dict[str, Tensor], steps: int = 500) -> nn.Module:
    network = PointDenoiser(PointConfig(hidden=[64, 64]))
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    for _ in range(steps):
        chosen = torch.randint(len(batch["noise"]), (256,))
        loss = own.loss(TURN, {"student": network}, {n: t[chosen] for n, t in batch.items()})["loss"].sum / 256
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.requires_grad_(False)


@pytest.mark.parametrize("one_step", [True, False])
def test_pairs_that_are_not_pairs_are_worse(one_step: bool) -> None:
    own = objective(solver="heun", teacher_steps=16, one_step=one_step)
    train, held = map(all_of, made(own, 4096, 512))
    ring_ = mixture.Mixture(mixture.Config())
    figures = []
    for shuffled in (False, True):
        torch.manual_seed(1)
        batch = {**train, "made": train["made"][torch.randperm(4096)]} if shuffled else train
        network = fitted(own, batch)
        x = own.sampler(network)(held["noise"], 1, {})
        on = float((ring_.nearest(x)[0] < 4 * 0.2).float().mean())
        error = own.conclude({n: float(t.sum) / 512 for n, t in own.evaluate({"student": network}, held).items()})
        figures.append((on, error["one_step_rmse"]))
    (right, near), (wrong, far) = figures
    assert right > 0.2
    assert wrong < 0.1
    assert near < 1.0
    assert far > 2.0


# --- a run ------------------------------------------------------------------------------------------------------------

SMALL = ["data.train=noise:6000", "data.eval=noise:100", "train.duration=4 steps", "train.global_batch=64"]
SMALL += ["evaluate.batch=32", "objective.compare_samples=64", "objective.solver=heun"]
SMALL += ["stages.straight.train.duration=2 steps", "checkpoint.every=2 steps"]


def cached_arrays() -> dict[str, bytes]:
    found = {f"{p.parent.parent.name}/{p.parent.name}": p.read_bytes() for p in cache_root().rglob("made.npy")}
    assert found
    return found


def weights(folder: Path) -> bytes:
    return (folder / "latest" / "networks" / "student" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_killed_while_pairs_are_made_it_goes_on_to_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["run", "distill/reflow_gmm", *SMALL, "--root", tmp_path]
    run([*command, "--run", "whole"])
    expected = cached_arrays()
    monkeypatch.setenv("SCALETRAIN_CACHE", str(tmp_path / "another"))

    def parts() -> list[Path]:
        return [p for p in cache_root().rglob("made.npy") if not p.parent.name.startswith(".")]

    codes, text = start([*command, "--run", "parts"]).stop_when(lambda: len(parts()) >= 3)
    assert codes == [-9], text
    before = {path: path.stat().st_mtime_ns for path in parts()}
    assert 3 <= len(before) < len(expected)
    run([*command, "--run", "parts"])
    assert cached_arrays() == expected
    assert {path: path.stat().st_mtime_ns for path in before} == before  # those were not made again
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    table = json.loads((tmp_path / "parts" / "steps.json").read_text())
    assert "1" in table["student"]
    shutil.rmtree(cache_root() / "pairs")
    said = run(["evaluate", tmp_path / "parts"])  # makes those of the held-out rows again
    assert "energy distance" in said
    assert 0 < len(cached_arrays()) < len(expected)


@pytest.mark.slow
def test_a_run_s_denoiser_of_pictures_is_a_teacher(tmp_path: Path) -> None:
    """Pairs of noise alone; held-out pictures, for the table, have pairs of their own."""
    small = ["train.duration=4 steps", "train.global_batch=16", "evaluate.samples=0", "--root", tmp_path]
    first = tmp_path / "teacher.yaml"
    first.write_text(
        "objective: {type: diffusion, path: flow, prediction: velocity, condition: label, dropped: 0.1}\n"
        "networks: {model: {type: unet, config: {features: [8, 8], middle: 0}}}\n"
        "data: {train: 'sklearn:digits'}\ntrain: {duration: 4 steps, global_batch: 16}\n"
    )
    run(["run", first, *small, "--run", "teacher"])
    sources = [f"networks.{n}.from=run:{tmp_path}/teacher/model" for n in ("teacher", "student")]
    sources[1] = f"stages.straight.{sources[1]}"
    own = ["data.train=noise:40", "data.eval=sklearn:digits", "data.eval.rows=80", "objective.compare_samples=64"]
    own += ["objective.teacher_steps=3", "objective.guidance=2.0", "evaluate.batch=16"]
    run(["run", "distill/reflow", *small, *sources, *own, "--run", "student"])
    arrays = [np.load(path, mmap_mode="r") for path in cache_root().rglob("made.npy")]
    assert sorted(array.shape for array in arrays) == [(40, 1, 8, 8), (80, 1, 8, 8)]
    assert {array.dtype for array in arrays} == {np.dtype(np.float16)}
    table = json.loads((tmp_path / "student" / "steps.json").read_text())
    assert table["floor"]["energy_distance"] < table["student"]["1"]["energy_distance"]
    assert {"1", "2", "4", "8"} == table["student"].keys()
    assert "3" in table["teacher"]


def test_what_cannot_be_learned_is_refused() -> None:
    own = objective(one_step=True, path="cosine", prediction="eps")
    with pytest.raises(
        UserError, match=r"objective\.prediction: at the last time all is noise, and of `eps` no sample"
    ):
        prepared(own, noise_rows(8), None)
    with pytest.raises(UserError, match=r"objective\.steps is 2: with `one_step` the student learns one"):
        objective(one_step=True, steps=2)
