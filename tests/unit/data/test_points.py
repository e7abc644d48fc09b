"""Points from rows of numbers, and rows that hold nothing for objectives that draw their data themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from scaletrain.config import SourceSpec
from scaletrain.data.points import draws, points
from scaletrain.data.sources import Rows, open_rows
from scaletrain.errors import UserError


def rows(path: Path, values: list[list[float]]) -> Rows:
    path.write_text("".join(json.dumps({"point": value}) + "\n" for value in values))
    return open_rows([SourceSpec(path=str(path))])


def test_points_are_rows_of_numbers(tmp_path: Path) -> None:
    found = points(rows(tmp_path / "a.jsonl", [[1, 2.5], [3, 4], [-1, 0]]))
    assert found.tensors["point"].dtype == torch.float32
    assert found.tensors["point"].tolist() == [[1, 2.5], [3, 4], [-1, 0]]
    batch = found.batch([2, 0], np.zeros(2, np.uint64))
    assert batch["point"].tolist() == [[-1, 0], [1, 2.5]]


@pytest.mark.parametrize(
    ("values", "words"),
    [([[1, 2], [3]], "`point` has 1 numbers, the first row has 2"), ([[1, 2], [3, 1e39]], "not finite")],
)
def test_a_row_that_does_not_fit_is_named(values: list[list[float]], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as caught:
        points(rows(tmp_path / "a.jsonl", values))
    assert "a.jsonl" in str(caught.value)
    assert "2" in str(caught.value)


def test_draws_are_rows_that_hold_their_number_alone() -> None:
    found = open_rows([SourceSpec(path="noise:1_000")])
    assert found.columns == ("draw",)
    assert draws(found).tensors["draw"].tolist() == list(range(1000))


@pytest.mark.parametrize("path", ["noise:", "noise:0", "noise:many", "noise:-5"])
def test_the_number_of_draws_must_be_one(path: str) -> None:
    with pytest.raises(UserError, match=r"write how many draws"):
        open_rows([SourceSpec(path=path)])
