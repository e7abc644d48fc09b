"""The players' losses against closed forms and gradients taken by hand; the energy score against scipy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from scaletrain.config import Recipe
from scaletrain.data.sources import Rows
from scaletrain.data.tables import ArrayTable
from scaletrain.errors import UserError
from scaletrain.networks.build import build
from scaletrain.objectives.base import Request
from scaletrain.objectives.gan import Config, Objective
from tests.unit.objectives.prepared import prepared


def objective(networks: dict[str, Any] | None = None, **options: Any) -> Objective:
    options = {"latent": 3, **options}
    recipe = Recipe.model_validate({
        "objective": {"type": "gan", **options}, "networks": networks or {}, "data": {"train": "sklearn:digits"}
    })  # fmt: skip
    return Objective(Config(**options), recipe)


def rows(count: int) -> Rows:
    return Rows([ArrayTable("set", {"image": np.random.default_rng(0).integers(0, 256, (count, 8, 8), np.uint8)})])


class Tanh(nn.Module):
    """A generator with one weight, whose pictures are known."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.3))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.w * z.repeat(1, 22)[:, :64]).view(-1, 1, 8, 8)


class Sum(nn.Module):
    """A critic with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.v * x.flatten(1).sum(1)


def parts() -> tuple[dict[str, nn.Module], torch.Tensor, torch.Tensor]:
    """Networks, real pictures, and what the critic says without its weight to pictures made from seed 0."""
    networks: dict[str, nn.Module] = {"generator": Tanh(), "critic": Sum()}
    torch.manual_seed(0)
    with torch.no_grad():
        made = networks["generator"](torch.randn(4, 3))
    torch.manual_seed(0)
    return networks, torch.linspace(-1, 0.5, 4 * 64).view(4, 1, 8, 8), made


def test_turns_are_critic_then_generator() -> None:
    turns = objective(critic_repeats=3).turns
    assert [(t.name, t.player, t.repeats, t.every) for t in turns] == [
        ("critic", "critic", 3, 1), ("generator", "generator", 1, 1)
    ]  # fmt: skip


@pytest.mark.parametrize("target", [1.0, 0.9])
def test_non_saturating_loss_is_that_of_the_paper(target: float) -> None:
    networks, real, made = parts()
    critic, generator = objective(real_target=target).turns
    game = objective(real_target=target)
    says = {name: torch.sigmoid(0.1 * x.flatten(1).sum(1)).double() for name, x in (("real", real), ("made", made))}
    terms = game.loss(critic, networks, {"image": real})
    expected = -(target * says["real"].log() + (1 - target) * (1 - says["real"]).log()).sum()
    assert terms["real"].sum.item() == pytest.approx(expected.item(), rel=1e-5)
    assert terms["made"].sum.item() == pytest.approx(-(1 - says["made"]).log().sum().item(), rel=1e-5)
    torch.manual_seed(0)
    terms = game.loss(generator, networks, {"image": real})
    assert terms["adversarial"].sum.item() == pytest.approx(-says["made"].log().sum().item(), rel=1e-5)


def test_hinge_loss_is_that_of_the_paper() -> None:
    networks, real, made = parts()
    game = objective(loss="hinge")
    real_says, made_says = ((0.1 * x.flatten(1).sum(1)).detach().numpy() for x in (real, made))
    terms = game.loss(game.turns[0], networks, {"image": real})
    assert terms["real"].sum.item() == pytest.approx(np.maximum(0, 1 - real_says).sum(), rel=1e-5)
    assert terms["made"].sum.item() == pytest.approx(np.maximum(0, 1 + made_says).sum(), rel=1e-5)
    torch.manual_seed(0)
    terms = game.loss(game.turns[1], networks, {"image": real})
    assert terms["adversarial"].sum.item() == pytest.approx(-made_says.sum(), rel=1e-5)


def test_each_turn_gives_gradients_to_its_own_player() -> None:
    networks, real, _ = parts()
    game = objective()
    for turn, other in zip(game.turns, ("generator", "critic"), strict=True):
        for name, network in networks.items():
            network.requires_grad_(name != "critic" or turn.player == "critic").zero_grad()
        sum(t.sum for t in game.loss(turn, networks, {"image": real}).values()).backward()  # type: ignore[union-attr]
        assert all(p.grad is None for p in networks[other].parameters())
        assert all(p.grad.abs() > 0 for p in networks[turn.player].parameters())  # type: ignore[union-attr]


def test_energy_score_and_distance_are_those_of_scipy() -> None:
    distance = pytest.importorskip("scipy.spatial.distance")
    game = objective()
    data = prepared(game, rows(2), rows(30))
    assert data.eval is not None
    batch = data.eval.batch(range(30), np.zeros(30, np.uint64))
    networks, _, _ = parts()
    torch.manual_seed(5)
    terms = game.evaluate(networks, batch)
    torch.manual_seed(5)
    with torch.no_grad():
        made = networks["generator"](torch.randn(30, 3)).flatten(1).numpy() / 2 + 0.5
    x = batch["image"].flatten(1).numpy() / 2 + 0.5
    across, within, spread = distance.cdist(x, made).mean(), distance.pdist(made).mean(), distance.pdist(x).mean()
    score = terms["energy_score"].sum.item() / 30
    assert score == pytest.approx(across - within / 2, rel=1e-4)
    assert game.conclude({"energy_score": score})["energy_distance"] == pytest.approx(
        2 * across - within - spread, rel=1e-3
    )
    assert torch.isfinite(game.evaluate(networks, {"image": batch["image"][:1]})["energy_score"].sum)


def test_networks_fit_the_data_and_samples_are_pictures() -> None:
    game = objective({"generator": {"config": {"features": 8}}, "critic": {"config": {"features": 8}}})
    prepared(game, rows(5), None)
    networks = {name: build(name, spec) for name, spec in game.networks().items()}
    drawn = [game.sample(networks, Request(6, torch.Generator().manual_seed(1))).images for _ in range(2)]
    assert drawn[0] is not None
    assert drawn[0].shape == (6, 1, 8, 8)
    assert 0 <= drawn[0].min() < drawn[0].max() <= 1
    assert torch.equal(drawn[0], drawn[1])  # type: ignore[arg-type]
    assert game.counts(game.turns[0], {"image": torch.zeros(5, 1, 8, 8)}) == {"images": 5}


def test_contradictions_are_refused() -> None:
    with pytest.raises(UserError, match="real_target"):
        objective(loss="hinge", real_target=0.9)
    game = objective({"critic": {"config": {"height": 9}}})
    prepared(game, rows(2), None)
    with pytest.raises(UserError, match=r"networks\.critic\.config\.height"):
        game.networks()
