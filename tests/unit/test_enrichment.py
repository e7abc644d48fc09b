"""What networks make of a window: seeded by position, and of no window where a process has none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from scaletrain.config import Recipe
from scaletrain.data.loader import Failure, Micro
from scaletrain.engine.world import World
from scaletrain.enrichment import enriched
from scaletrain.player import Turn

RECIPE = Recipe.model_validate({"objective": {"type": "x"}, "data": {"train": "x"}})


class Noting:
    """An objective that adds what it draws by the window's seed, and by each micro-batch's."""

    calls = 0

    def enrich(self, turn: Turn, networks: Any, window: Any, seeds: Any, device: torch.device) -> list[Any]:
        self.calls += 1
        assert not torch.is_grad_enabled()
        common = torch.rand(1)
        found = []
        for batch, seed in zip(window, seeds, strict=True):
            torch.manual_seed(seed)
            found.append({**batch, "common": common, "own": torch.rand(1)})
        return found


def drawn(numbers: tuple[int, ...], step: int = 3) -> dict[int, tuple[float, float]]:
    world = World(torch.device("cpu"))
    crew: Any = SimpleNamespace(objective=Noting(), engine=SimpleNamespace(world=world, plain=dict))
    window = [Micro(7, number, (), {"x": torch.tensor([number])}) for number in numbers]
    found = enriched(window, Turn("train", "student"), crew, RECIPE, ("main", step, 0))
    assert isinstance(found, list)
    assert [int(micro.tensors["x"]) for micro in found] == list(numbers)
    return {micro.number: (float(micro.tensors["common"]), float(micro.tensors["own"])) for micro in found}


def test_what_is_drawn_depends_on_the_position_alone() -> None:
    whole = drawn((0, 1, 2, 3))
    assert {**drawn((0, 2)), **drawn((1, 3))} == whole
    assert len({common for common, _ in whole.values()}) == 1
    assert len({own for _, own in whole.values()}) == 4
    assert drawn((0,), step=4)[0] != whole[0]


def test_a_window_that_is_not_there_stays_so() -> None:
    crew: Any = SimpleNamespace(
        objective=Noting(), engine=SimpleNamespace(world=World(torch.device("cpu")), plain=dict)
    )
    failure = Failure("row 3 is broken")
    assert enriched(failure, Turn("train", "student"), crew, RECIPE, ()) is failure
    assert crew.objective.calls == 0
