"""Objectives that denoise, ready for a loss: with a mixture as teacher, or one that left its signature somewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from scaletrain.config import Recipe
from scaletrain.data.sources import Rows
from scaletrain.data.tables import ArrayTable
from scaletrain.diffusion.signature import Signature
from scaletrain.explain import decode
from tests.unit.objectives.prepared import prepared

RING: dict[str, Any] = {"type": "mixture", "config": {"modes": "ring", "count": 8, "radius": 4.0, "sigma": 0.2}}
ELSEWHERE = {"from": "run:elsewhere/model", "frozen": True}
DRAWS = Rows([ArrayTable("noise:64", {"draw": np.arange(64)})])


def pictures(count: int = 80, classes: int = 2) -> Rows:
    """Return random pictures of 4 x 4."""
    made = np.random.default_rng(0).integers(0, 256, (count, 4, 4), np.uint8)
    return Rows([ArrayTable("set", {"image": made, "label": np.arange(count) % classes})])


def unprepared(module: ModuleType, networks: Mapping[str, Any], **options: Any) -> Any:
    """Return an objective that has seen its recipe only."""
    recipe = {
        "objective": {"type": module.__name__.rpartition(".")[2], **options},
        "networks": dict(networks),
        "data": {"train": "noise:64"},
    }
    return module.Objective(decode(module.Config, options, "objective"), Recipe.model_validate(recipe))


def of_mixture(module: ModuleType, config: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """Return an objective whose teacher is the ring, or another mixture, and has drawn nothing yet."""
    teacher = {**RING, "config": config or RING["config"]}
    objective = unprepared(module, {"teacher": teacher}, **options)
    prepared(objective, DRAWS, None)
    return objective


def of_teacher(module: ModuleType, teacher: Signature | None, folder: Path, rows: Rows = DRAWS, **options: Any) -> Any:
    """Return an objective whose teacher was trained elsewhere, and left this signature, or none."""
    objective = unprepared(module, {"teacher": ELSEWHERE}, **options)
    if teacher is not None:
        teacher.save(folder)
    objective.restore({"teacher": folder})
    prepared(objective, rows, None)
    return objective
