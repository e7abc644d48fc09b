"""The critic's losses and its penalty against closed forms and torch's own gradient; a small training, with and without
the critic.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaletrain.config import NetworkSpec
from scaletrain.diffusion.denoiser import Denoiser
from scaletrain.diffusion.path import Cosine
from scaletrain.diffusion.reading import Reading
from scaletrain.diffusion.texts import summary
from scaletrain.evaluate.distances import energy_distance
from scaletrain.networks.build import build
from tests.unit.objectives.judged import gradients, judged

objective = partial(judged, "adversarial")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Bowl(nn.Module):
    """A critic whose slope changes from place to place and with time, with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.7))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return torch.sin(self.w * z).sum(1) * (1 + t)


def test_penalty_is_the_square_of_the_slope() -> None:
    """By finite differences along random directions, against torch's gradient of the critic's input."""
    game, critic = objective(r1=0.4, contest="non_saturating"), Bowl()
    real, made = torch.randn(40_000, 2), torch.randn(40_000, 2)
    torch.manual_seed(1)
    terms = game.told_apart({"critic": critic}, real, made, {})
    torch.manual_seed(1)
    t = game.config.times.draw(len(real), Cosine(), real.device)
    (alpha, sigma), std = Cosine().at(t, real), game.signature.reading.data_std
    z_real = alpha * real + sigma * torch.randn_like(real)
    z_made = alpha * made + sigma * torch.randn_like(made)
    length = torch.sqrt((alpha * std) ** 2 + sigma**2)
    z = (z_real / length).requires_grad_()
    said = critic(z, t)
    (slope,) = torch.autograd.grad(said.sum(), z, create_graph=True)
    penalty = slope.square().sum()
    assert terms["r1"].weight == 0.2
    assert float(terms["r1"].sum.detach()) == pytest.approx(float(penalty.detach()), rel=0.02)
    (found,) = torch.autograd.grad(terms["r1"].sum, critic.w, retain_graph=True)
    (expected,) = torch.autograd.grad(penalty, critic.w)
    assert float(found) == pytest.approx(float(expected), rel=0.03)
    probability = torch.sigmoid(said.detach().double())
    assert float(terms["real"].sum.detach()) == pytest.approx(float(-probability.log().sum()), rel=1e-5)
    probability = torch.sigmoid(critic(z_made / length, t).detach().double())
    assert float(terms["made"].sum.detach()) == pytest.approx(float(-(1 - probability).log().sum()), rel=1e-5)


def test_distance_to_the_teacher_is_that_of_the_paper() -> None:
    """A sample of N(0, s²) noised is taken for α s² / (α² s² + σ²) z, on a path on which α² + σ² is 1."""
    game, s = objective(times="uniform"), 1.3

    def network(z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha * s**2 / ((alpha * s) ** 2 + sigma**2))[:, None] * z

    made = torch.randn(400_000, 2, requires_grad=True)
    distance = game.distance(Denoiser(network, Reading(path=Cosine(), prediction="exact")), made)
    t = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    alpha, sigma = Cosine().alpha_sigma(t)
    gain = alpha * s**2 / ((alpha * s) ** 2 + sigma**2)
    expected = (alpha * ((1 - gain * alpha) ** 2 + (gain * sigma) ** 2)).mean()  # of samples of variance 1
    assert float(distance.mean().detach()) == pytest.approx(float(expected), rel=0.01)
    # the teacher's x₀ is no way back to the sample: d/dx of factor · mean (x − target)²
    (found,) = torch.autograd.grad(distance[0], made)
    torch.manual_seed(5)
    again = game.distance(Denoiser(network, Reading(path=Cosine(), prediction="exact")), made[:1])
    assert found[1:].abs().max() == 0
    (slope,) = torch.autograd.grad(again, made)
    torch.manual_seed(5)
    t = game.config.times.draw(1, Cosine(), made.device)
    alpha, sigma = Cosine().at(t, made[:1])
    target = network(alpha * made[:1] + sigma * torch.randn(1, 2), alpha[:, 0], sigma[:, 0])
    torch.testing.assert_close(slope[:1], alpha * (made[:1] - target).detach())


def test_the_student_sees_data_at_the_times_of_its_steps() -> None:
    game = objective(steps=4)
    seen: list[Tensor] = []

    def network(z: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return torch.zeros_like(z)

    game.made(game.denoiser(network), torch.randn(400, 2))
    times, counts = torch.cat(seen).unique(return_counts=True)
    torch.testing.assert_close(times, torch.tensor([0.25, 0.5, 0.75, 1.0]))
    assert (counts == 100).all()


@pytest.mark.parametrize("contest", ["hinge", "non_saturating"])
def test_each_turn_gives_gradients_to_its_own_player(contest: str) -> None:
    game = objective(contest=contest, r1=0.1, condition="label", steps=2)
    for player, found in gradients(game).items():
        for name, has in found.items():
            assert any(has) == (name == player), name


@pytest.mark.parametrize("kind", ["point_critic", "conv_critic"])
def test_critics_are_told_the_time_the_class_and_the_text(kind: str) -> None:
    shape = {"dim": 2} if kind == "point_critic" else {"channels": 1, "height": 8, "width": 8, "features": [8, 16]}
    critic = build("critic", NetworkSpec(type=kind, config={**shape, "classes": 3}))
    for parameter in critic.parameters():
        nn.init.normal_(parameter, std=0.2)
    z = torch.randn(1, *((2,) if kind == "point_critic" else (1, 8, 8))).repeat_interleave(4, 0)
    t, label = torch.tensor([0.2, 0.8, 0.2, 0.2]), torch.tensor([0, 0, 1, 3])
    said = critic(z, t, label=label)
    assert said.shape == (4,)
    assert len({round(v, 5) for v in said.tolist()}) == 4
    torch.testing.assert_close(critic(z[3:], t[3:]), said[3:])  # the last label is none
    reader = build("critic", NetworkSpec(type=kind, config={**shape, "text": 5}))
    text, plain = torch.randn(4, 5), reader(z, t)
    torch.testing.assert_close(reader(z, t, text=text), plain)  # which at first is not heeded
    for parameter in reader.parameters():
        nn.init.normal_(parameter, std=0.2)
    same = reader(z[:1].expand_as(z), t[:1].expand(4), text=text)
    assert len({round(v, 5) for v in same.tolist()}) == 4
    torch.testing.assert_close(reader(z, t, text=3 * text + 1), reader(z, t, text=text), rtol=1e-3, atol=1e-4)


def test_a_texts_vector_is_the_encoders_or_the_mean_of_what_is_not_masked() -> None:
    embeds, pooled = torch.randn(2, 3, 4), torch.randn(2, 5)
    assert torch.equal(summary({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}), pooled)
    torch.testing.assert_close(summary({"prompt_embeds": embeds}), embeds.mean(1))
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    found = summary({"prompt_embeds": embeds, "prompt_attention_mask": mask})
    torch.testing.assert_close(found, torch.stack([embeds[0, :2].mean(0), embeds[1].mean(0)]))


def trained(steps: int, **options: Any) -> float:
    """Train a small student; return the energy distance of its samples."""
    game = objective(r1=0.05, contest="non_saturating", **options)
    torch.manual_seed(0)
    small = {"hidden": [48, 48], "dim": 2}
    kinds = {"student": "point_denoiser", "critic": "point_critic"}
    networks = {name: build(name, NetworkSpec(type=kind, config=small)) for name, kind in kinds.items()}
    nn.init.normal_(networks["student"].last.weight, std=0.1)  # type: ignore[union-attr, arg-type]
    networks["teacher"] = game._source  # type: ignore[assignment]
    optimisers = {name: torch.optim.Adam(networks[name].parameters(), 2e-3, (0.0, 0.99)) for name in kinds}
    for _ in range(steps):
        for turn in game.turns:
            for name in optimisers:
                networks[name].requires_grad_(name == turn.player)
            terms = game.loss(turn, networks, {"draw": torch.arange(256)})
            (sum(term.weight * term.sum for term in terms.values()) / 256).backward()  # type: ignore[union-attr, operator]
            optimisers[turn.player].step()
            optimisers[turn.player].zero_grad()
    with torch.no_grad():
        made = game.sampler(networks["student"])(torch.randn(2000, 2), 1, {})
        return energy_distance(made, game._source.draw(2000))  # type: ignore[union-attr]


def test_the_critic_teaches_and_the_teacher_alone_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    right = trained(400, distillation=0.1)
    assert right < 0.25
    monkeypatch.setattr(F, "softplus", lambda x: 0 * x)  # nobody is misled, and no critic learns
    assert trained(400, distillation=2.5) > 5 * right
