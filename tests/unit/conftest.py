"""Pipelines of diffusers on disk, and their exports checked in this process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.unit.diffusers_pipelines import Pipes, saved


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> Pipes:
    """A folder of each family, made when it is asked for, and the pipeline that was written to it."""
    made: dict[str, tuple[Path, Any]] = {}

    def of(family: str) -> tuple[Path, Any]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = folder, saved(family, folder)
        return made[family]

    return of


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the gate load in this process, which imported diffusers already."""
    from scaletrain.export import pipeline

    def elsewhere(asked: Mapping[str, Any], probe: Any, program: Any) -> tuple[Tensor, dict[str, Any]]:
        pipe = program.load(asked["folder"], asked["base"])
        return program.samples(pipe, dict(probe.inputs), asked["seed"], asked["options"]), {}

    monkeypatch.setattr(pipeline, "elsewhere", elsewhere)
