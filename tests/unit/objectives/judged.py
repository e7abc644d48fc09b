"""What tests of students that make whole samples share: a teacher of three modes, and who has gradients in a turn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from scaletrain.config import Recipe
from scaletrain.data.sources import Rows
from scaletrain.data.tables import ArrayTable
from scaletrain.networks.build import build
from scaletrain.recipe import objective_of
from tests.unit.objectives.prepared import prepared

TEACHER = {"type": "mixture", "config": {"modes": "ring", "count": 3, "radius": 2.0, "sigma": 0.3}, "frozen": True}
DRAWS = Rows([ArrayTable("noise", {"draw": torch.zeros(512).numpy()})])


def judged(method: str, networks: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """Return an objective whose teacher is a mixture, which has seen its data."""
    recipe = Recipe.model_validate({
        "objective": {"type": method, **options},
        "networks": {"teacher": TEACHER, **(networks or {})},
        "data": {"train": "noise:512"},
    })  # fmt: skip
    found = objective_of(recipe)
    prepared(found, DRAWS, None)
    return found


def gradients(game: Any) -> dict[str, dict[str, list[bool]]]:
    """Return for each turn and network which of its parameters have gradients from a loss of random networks."""
    networks: dict[str, nn.Module] = {}
    for name, spec in game.networks().items():
        networks[name] = build(name, spec)
        for parameter in networks[name].parameters():
            nn.init.normal_(parameter, std=0.1)
    found: dict[str, dict[str, list[bool]]] = {}
    for turn in game.turns:
        for name, network in networks.items():
            network.requires_grad_(name == turn.player).zero_grad()
        terms = game.loss(turn, networks, {"draw": torch.arange(8)})
        sum(term.weight * term.sum for term in terms.values()).backward()
        found[turn.player] = {
            name: [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in network.parameters()]
            for name, network in networks.items()
        }
    return found
