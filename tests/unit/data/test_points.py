"""Points from rows of numbers, and rows that hold nothing for objectives that draw their data themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from scaletrain.config import SourceSpec
from scaletrain.data.points import arrays, draws, points
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


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64"])
def test_arrays_come_whole_out_of_parquet(tmp_path: Path, dtype: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = (100 * np.random.default_rng(0).standard_normal((50, 2, 3, 4))).astype(dtype)
    lists = pa.array(values.ravel())
    for size in (4, 3, 2):
        lists = pa.FixedSizeListArray.from_arrays(lists, size)
    plain = pa.array([v.tolist() for v in values])
    for name, column in (("fixed", lists), ("plain", plain)):
        for part, rows in (("a", slice(0, 30)), ("b", slice(30, 50))):
            pq.write_table(pa.table({"latent": column[rows]}), tmp_path / f"{name}-{part}.parquet")
        found = open_rows([SourceSpec(path=str(tmp_path / f"{name}-*.parquet"))])
        whole = found.array("latent")
        assert whole is not None
        assert np.array_equal(whole, values)
        chosen = found.select([45, 3, 3])
        expected = torch.from_numpy(values[[45, 3, 3]].astype(np.float32))
        assert torch.equal(arrays(chosen, ["latent"]).tensors["latent"], expected)
        assert torch.equal(points(chosen, "latent").tensors["latent"], expected)


def test_arrays_of_several_shapes_are_told_by_the_row(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for values in ([[[1.0, 2.0]], [[3.0]]], [[[1.0], [2.0]], [[3.0, 4.0]]]):
        pq.write_table(pa.table({"latent": values}), tmp_path / "a.parquet")
        rows = open_rows([SourceSpec(path=str(tmp_path / "a.parquet"))])
        assert rows.array("latent") is None
        with pytest.raises(UserError, match=r"a.parquet row 1: `latent` is"):
            arrays(rows, ["latent"])


def test_draws_are_rows_that_hold_their_number_alone() -> None:
    found = open_rows([SourceSpec(path="noise:1_000")])
    assert found.columns == ("draw",)
    assert draws(found).tensors["draw"].tolist() == list(range(1000))


@pytest.mark.parametrize("path", ["noise:", "noise:0", "noise:many", "noise:-5"])
def test_the_number_of_draws_must_be_one(path: str) -> None:
    with pytest.raises(UserError, match=r"write how many draws"):
        open_rows([SourceSpec(path=path)])
