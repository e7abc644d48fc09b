"""The gradient on Gaussians against the KL divergence's, samples in training against the sampler, and a small training,
right and broken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scaletrain.config import AdapterSpec, NetworkSpec, Recipe
from scaletrain.data.dataset import TensorDataset
from scaletrain.diffusion.denoiser import Denoiser
from scaletrain.diffusion.path import EDM, Cosine, Flow
from scaletrain.diffusion.reading import Reading
from scaletrain.diffusion.signature import Signature
from scaletrain.errors import UserError
from scaletrain.evaluate.distances import energy_distance, mean_distance
from scaletrain.networks.build import build, save
from scaletrain.networks.mixture import Mixture
from scaletrain.objectives.base import Data, RunView
from scaletrain.objectives.dmd2 import Config, Objective
from tests.unit.objectives.judged import DRAWS, gradients, judged
from tests.unit.objectives.prepared import prepared

objective = partial(judged, "dmd2")


def batch(count: int) -> dict[str, Tensor]:
    return {"draw": torch.arange(count)}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# --- the gradient -----------------------------------------------------------------------------------------------------


def gaussian(mean: float, std: float, path: Any) -> Denoiser:
    """Denoise N(mean, std² I) in closed form."""

    def network(z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        a, v = alpha[:, None], ((alpha * std) ** 2 + sigma**2)[:, None]
        return mean + a * std**2 / v * (z - a * mean)

    return Denoiser(network, Reading(path=path, prediction="exact"))


@pytest.mark.parametrize("path", [Cosine(), Flow(), EDM()])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_gradient_on_two_gaussians_is_that_of_the_kl_divergence(path: Any, share: float) -> None:
    """Samples a + b n with noise ε: moments of n and ε are exact, so the mean over the samples is the expectation."""
    drawn = torch.randn(500, 4, dtype=torch.float64)
    drawn = drawn - drawn.mean(0)
    n, eps = (drawn @ torch.linalg.inv(torch.linalg.cholesky(drawn.T @ drawn / 500)).T).split(2, 1)
    m, s = 0.7, 1.3
    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (-0.4, 0.6))
    t = torch.full((500,), path.first + share * min(path.last - path.first, 3.0), dtype=torch.float64)
    alpha, sigma = (v[0] for v in path.alpha_sigma(t))
    v_f, v_r = (alpha * b) ** 2 + sigma**2, (alpha * s) ** 2 + sigma**2
    kl = 2 * (v_f / v_r + (alpha * (a - m)) ** 2 / v_r - 1 - torch.log(v_f / v_r)) / 2  # of both coordinates
    expected = torch.autograd.grad(kl, (a, b))
    x0 = a + b * n
    moved = objective(gradient="kl").gradient(gaussian(m, s, path), gaussian(-0.4, 0.6, path), x0, t, eps)
    found = torch.autograd.grad((moved * x0).sum() / 500, (a, b))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_normalised_gradient_is_that_of_the_paper() -> None:
    path, t = Cosine(), torch.rand(7, dtype=torch.float64)
    x0, eps = torch.randn(7, 2, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    real, fake = gaussian(0.7, 1.3, path), gaussian(-0.4, 0.6, path)
    z = path.noisy(x0, eps, t)
    by_hand = fake(z, t)[0] - real(z, t)[0]
    aside = x0 - real(z, t)[0]
    distance = (aside[:, 0].abs() + aside[:, 1].abs()) / 2
    found = objective().gradient(real, fake, x0, t, eps)
    torch.testing.assert_close(found, by_hand / distance[:, None])
    # `expected`: of samples of a Gaussian of the data's deviation, the root of the mean square of that distance
    game = objective(gradient="expected")
    std = game.signature.reading.data_std
    many = std * torch.randn(100_000, 2)
    t = torch.full((100_000,), 0.6)
    target, _ = gaussian(0.0, std, path)(path.noisy(many, eps := torch.randn_like(many), t), t)
    rms = (many - target).square().mean().sqrt()
    moved = game.gradient(gaussian(0.0, std, path), gaussian(1.0, std, path), many, t, eps)
    plain = gaussian(1.0, std, path)(path.noisy(many, eps, t), t)[0] - target
    torch.testing.assert_close(moved, plain / rms, rtol=0.01, atol=1e-3)


class Affine(nn.Module):
    """A denoiser with two weights."""

    def __init__(self, a: float = 0.3, b: float = 0.1):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.a * z + self.b + torch.tanh(z) * t[:, None]


def test_students_loss_has_that_gradient_and_none_through_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    game, student, fake = objective(), Affine(), Affine(0.5, -0.2)
    teacher = Mixture(game._source.config)  # type: ignore[union-attr]
    networks = {"student": student, "fake_score": fake, "teacher": teacher}
    seen: list[tuple[Tensor, Tensor]] = []
    gradient = game.gradient

    def kept(real: Denoiser, own: Denoiser, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        with torch.enable_grad():
            seen.append((x0, gradient(real, own, x0, t, eps)))
        return seen[-1][1]

    monkeypatch.setattr(game, "gradient", kept)
    torch.manual_seed(3)
    terms = game.loss(game.turns[1], networks, batch(16))
    terms["matching"].sum.backward()
    torch.manual_seed(3)
    made = game.made(game.student(networks), game.noise(batch(16)))
    (x0, moved) = seen[0]
    torch.testing.assert_close(made.detach(), x0)
    assert not moved.requires_grad
    expected = torch.autograd.grad((made * moved).sum() / 2, list(student.parameters()))
    torch.testing.assert_close([p.grad for p in student.parameters()], list(expected))
    assert all(p.grad is None for p in fake.parameters())
    assert float(terms["matching"].sum.detach()) == pytest.approx(float(moved.square().mean(1).sum() / 2), rel=1e-5)


def test_fake_score_learns_to_denoise_the_students_samples_alone() -> None:
    """Where it denoises a Gaussian student exactly, no other does better, and the student has no gradient."""
    game = objective(weighting="x0", prediction="x0")
    std = 0.8

    def student(z: Tensor, t: Tensor) -> Tensor:
        return std * z + 0.5

    losses = []
    for mean, own in ((0.5, std), (0.5, 1.2), (0.0, std)):

        def fake(z: Tensor, t: Tensor, mean: float = mean, own: float = own) -> Tensor:
            alpha, sigma = game.signature.reading.path.alpha_sigma(t)
            return gaussian(mean, own, Cosine()).network(z, alpha, sigma)

        torch.manual_seed(1)
        networks: Any = {"student": student, "fake_score": fake}
        terms = game.loss(game.turns[0], networks, batch(20_000))
        losses.append(float(terms["denoising"].sum) / 20_000)
    assert losses[0] < min(losses[1:]) - 0.005
    t = (torch.arange(20_000) + 0.5) / 20_000
    alpha, sigma = Cosine().alpha_sigma(t)
    posterior = (std**2 * sigma**2 / ((alpha * std) ** 2 + sigma**2)).mean()  # its variance: the least there is
    assert losses[0] == pytest.approx(float(posterior), rel=0.02)


# --- several steps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 8, 13])
def test_steps_in_training_are_those_of_the_sampler(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    game = objective(steps=4)
    calls: list[int] = []

    def network(z: Tensor, t: Tensor) -> Tensor:
        calls.append(len(z))
        return torch.tanh(z) + t[:, None]

    monkeypatch.setattr(torch, "randn_like", lambda x: torch.full_like(x, 0.3))
    noise = torch.randn(count, 2)
    student, path = game.denoiser(network), game.signature.reading.path
    z, chain = path.start(noise), []
    for t, s in pairwise(path.grid(4)):  # written out
        x0, _ = student(z, torch.full((count,), t))
        chain.append(x0)
        alpha, sigma = path.alpha_sigma(torch.tensor(s))
        z = alpha * x0 + sigma * 0.3
    torch.testing.assert_close(game.sampler(network)(noise, 4, {}), chain[-1])  # type: ignore[arg-type]
    times = torch.zeros(4)
    for seed in range(200):
        torch.manual_seed(seed)
        calls.clear()
        made = game.made(student, noise)
        assert len(calls) == 4  # on every process, whatever it draws
        assert calls[-1] == count
        close = torch.stack([(made - x0).abs().amax(1) < 1e-5 for x0 in chain])
        assert (close.sum(0) == 1).all()
        shares = close.sum(1)
        assert shares.max() - shares.min() <= 1
        times += shares
    torch.testing.assert_close(times / times.sum(), torch.full((4,), 0.25), rtol=0, atol=0.11)


# --- networks ---------------------------------------------------------------------------------------------------------


def test_the_fake_score_begins_as_the_student_does(tmp_path: Path) -> None:
    reading = Reading(path=Cosine(), prediction="v")
    Signature(reading=reading, space="point", shape=(2,)).save(tmp_path)
    spec = {"from": "run:there/model", "adapter": {"r": 4, "targets": ["first", "last"]}}
    teacher = {"from": "run:there/model", "frozen": True}
    recipe = Recipe.model_validate({
        "objective": {"type": "dmd2"}, "networks": {"student": spec, "teacher": teacher}, "data": {"train": "noise:9"}
    })  # fmt: skip
    game = Objective(Config(), recipe)
    game.restore({"teacher": tmp_path, "student": tmp_path})
    prepared(game, DRAWS, None)
    specs = game.networks()
    assert specs["fake_score"].source == specs["student"].source == "run:there/model"
    assert specs["fake_score"].adapter == specs["student"].adapter is not None
    assert set(specs) == {"student", "teacher", "fake_score"}
    with pytest.raises(UserError, match="noise:N has nothing real"):
        prepared(_with_critic(recipe, tmp_path), DRAWS, None)


def _with_critic(recipe: Recipe, folder: Path) -> Objective:
    game = Objective(Config(adversarial=0.1), recipe)
    game.restore({"teacher": folder, "student": folder})
    return game


def test_all_networks_are_told_one_scale_of_guidance(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each sample, of the range; and the recipe's where samples are judged."""
    game = objective(condition="label", guidance=2.0)
    game._signature = game.signature.model_copy(update={"guidance": (1.5, 4.0)})
    networks = {name: build(name, spec) for name, spec in game.networks().items()}
    assert all(networks[name].settings.guidance for name in ("student", "fake_score"))
    told: dict[str, Any] = {}
    for name in ("student", "fake_score"):
        networks[name].register_forward_pre_hook(
            lambda module, args, kwargs, name=name: told.update({name: kwargs["guidance"]}), with_kwargs=True
        )
    guided = game.guided

    def asked(denoiser: Denoiser, scale: Any = None) -> Denoiser:
        told["teacher"] = scale
        return guided(denoiser, scale)

    monkeypatch.setattr(game, "guided", asked)
    game.loss(game.turns[1], networks, batch(64))
    assert torch.equal(told["student"], told["fake_score"])
    assert torch.equal(told["student"], told["teacher"])
    assert 1.5 <= told["student"].min() < 2.0 < 3.5 < told["student"].max() <= 4.0
    game.evaluate(networks, batch(8))
    assert (told["student"] == 2.0).all()


def test_turns_keep_the_fake_score_ahead() -> None:
    assert [(t.player, t.every) for t in objective().turns] == [("fake_score", 1), ("student", 5)]
    turns = objective(every=2, adversarial=0.1).turns
    assert [(t.player, t.every) for t in turns] == [("fake_score", 1), ("critic", 1), ("student", 2)]


CRITICISED = {"adversarial": 0.5, "contest": "non_saturating", "r1": 0.1}


@pytest.mark.parametrize("options", [{}, CRITICISED, {"steps": 2, "condition": "label"}])
def test_each_turn_gives_gradients_to_its_own_player(options: dict[str, Any]) -> None:
    game = objective(**options)
    for player, found in gradients(game).items():
        for name, has in found.items():
            assert all(has) if name == player else not any(has), name


TARGETS = {"point_denoiser": ["first", "last"], "unet": ["conv1", "modulate", "last"]}


@pytest.mark.parametrize("kind", TARGETS)
def test_student_and_fake_score_may_be_adapters_on_one_teacher(kind: str, tmp_path: Path) -> None:
    shape, config = (2,), {"dim": 2, "hidden": [16, 16]}
    if kind == "unet":
        shape, config = (1, 8, 8), {"height": 8, "width": 8, "features": [8, 16]}  # type: ignore[assignment]
    plain = NetworkSpec(type=kind, config=config)
    teacher = build("teacher", plain)
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, std=0.1)
    spec = plain.model_copy(update={"adapter": AdapterSpec(r=4, targets=TARGETS[kind])})
    networks = {n: build(n, spec, deepcopy(teacher)) for n in ("student", "fake_score")}
    networks["teacher"] = teacher.requires_grad_(False)
    game = objective()
    game._exact = False  # the teacher is a network like the student
    game._signature = Signature(reading=Reading(), space="point" if len(shape) == 1 else "image", shape=shape)
    for turn in game.turns:
        for name, network in networks.items():
            for key, parameter in network.named_parameters():
                parameter.requires_grad_(name == turn.player and "lora_" in key)
        terms = game.loss(turn, networks, batch(6))
        sum(term.sum for term in terms.values()).backward()  # type: ignore[union-attr]
        for key, parameter in networks[turn.player].named_parameters():
            assert (parameter.grad is not None) == ("lora_" in key)
            if parameter.grad is not None:
                parameter.data -= 0.1 * parameter.grad.sign()
    z, t = torch.randn(3, *shape), torch.rand(3)
    for name in ("student", "fake_score"):
        save(networks[name], spec, tmp_path / name)
        assert {p.name for p in (tmp_path / name).iterdir() if p.suffix == ".safetensors"} == {
            "adapter_model.safetensors"
        }
        again = build(name, spec, deepcopy(teacher), tmp_path / name)
        torch.testing.assert_close(again(z, t), networks[name](z, t))
        assert (again(z, t) - teacher(z, t)).abs().max() > 1e-4


# --- judgement --------------------------------------------------------------------------------------------------------


def test_evaluation_is_the_energy_score_of_new_samples() -> None:
    game = objective(steps=2)
    torch.manual_seed(4)
    found = game.evaluate({"student": Affine()}, batch(50))["energy_score"]
    torch.manual_seed(4)
    x0, _ = game.data(batch(50))
    made = game.sampler(Affine())(torch.cat([torch.randn(50, 2), torch.randn(50, 2)]), 2, {}).detach()
    expected = mean_distance(x0, made) - mean_distance(made, made) * 100 / 99 / 2
    assert found.per == "samples"
    assert float(found.sum.detach()) / 50 == pytest.approx(expected, rel=1e-5)
    assert torch.isfinite(game.evaluate({"student": Affine()}, batch(1))["energy_score"].sum)


def test_without_data_the_table_compares_halves_of_the_held_out_samples(tmp_path: Path) -> None:
    game = objective()
    game._source = None  # a teacher that draws no samples
    held = TensorDataset({"point": torch.randn(40, 2)})
    data = Data(TensorDataset({"draw": torch.arange(9)}), held)
    view = RunView(tmp_path, (), data, torch.device("cpu"), 0, None, None, None)  # type: ignore[arg-type]
    judge = game._judge(view, lambda samples: samples)
    expected = energy_distance(held.tensors["point"][::2], held.tensors["point"][1::2])
    assert judge.floor()["energy_distance"] == pytest.approx(expected)


# --- broken -----------------------------------------------------------------------------------------------------------


def trained(monkeypatch: pytest.MonkeyPatch, gradient: Callable[..., Tensor] | None) -> float:
    """Train a small student for 300 updates; return the energy distance of its samples."""
    game = objective(gradient="expected", weighting="plain", every=2)
    if gradient is not None:
        monkeypatch.setattr(game, "gradient", gradient)
    torch.manual_seed(0)
    small = {"hidden": [48, 48], "dim": 2}
    networks = {
        name: build(name, NetworkSpec(type="point_denoiser", config=small)) for name in ("student", "fake_score")
    }
    nn.init.normal_(networks["student"].last.weight, std=0.1)  # type: ignore[union-attr, arg-type]
    networks["teacher"] = game._source  # type: ignore[assignment]
    optimisers = {
        name: torch.optim.Adam(networks[name].parameters(), 3e-3, (0.5, 0.99)) for name in ("student", "fake_score")
    }
    for step in range(600):
        for optimiser in optimisers.values():
            optimiser.param_groups[0]["lr"] = 4e-3 * (1 - step / 600)
        for turn in game.turns:
            if step % turn.every:
                continue
            for name in optimisers:
                networks[name].requires_grad_(name == turn.player)
            sum(term.sum for term in game.loss(turn, networks, batch(256)).values()).backward()  # type: ignore[union-attr]
            for parameter in networks[turn.player].parameters():
                parameter.grad /= 256  # type: ignore[operator]
            optimisers[turn.player].step()
            optimisers[turn.player].zero_grad()
    with torch.no_grad():
        made = game.sampler(networks["student"])(torch.randn(2000, 2), 1, {})
        return energy_distance(made, game._source.draw(2000))  # type: ignore[union-attr]


def test_without_a_fake_score_of_its_own_the_student_does_not_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    right = trained(monkeypatch, None)
    assert right < 0.1

    def teachers(real: Denoiser, fake: Denoiser, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return objective(gradient="expected").gradient(real, real, x0, t, eps)

    def none(real: Denoiser, fake: Denoiser, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return (x0 - real(real.path.noisy(x0, eps, t), t)[0]).detach()

    broken = {"the teacher's": trained(monkeypatch, teachers), "none": trained(monkeypatch, none)}
    assert min(broken.values()) > 10 * right, (right, broken)
    assert not math.isnan(sum(broken.values()))
