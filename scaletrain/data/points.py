"""Points as examples, and draws: rows that hold nothing, for objectives that make their data themselves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from scaletrain.data.dataset import TensorDataset
from scaletrain.data.sources import Rows
from scaletrain.errors import UserError


def points(rows: Rows, column: str = "point") -> TensorDataset:
    """Return rows of numbers as {column: (N, D) float32}. Raises UserError that names a row of another length."""
    rows.require(column, "a list of numbers")
    if (whole := rows.array(column)) is None:
        values = rows.column(column)
        width = len(values[0])
        for number, value in enumerate(values):
            if len(value) != width:
                raise UserError(f"{rows.name(number)}: `{column}` has {len(value)} numbers, the first row has {width}.")
        with np.errstate(over="ignore"):  # it is told below
            whole = np.asarray([np.asarray(value, np.float32) for value in values])
    found = _floats(whole)
    if not found.isfinite().all():
        bad = int((~found.flatten(1).isfinite()).any(1).nonzero()[0])
        raise UserError(f"{rows.name(bad)}: `{column}` has a number that is not finite.")
    return TensorDataset({column: found})


def arrays(rows: Rows, columns: Sequence[str]) -> TensorDataset:
    """Return columns of numbers, in lists of lists of any depth, as {column: (N, ...) float32}.

    Raises UserError that names a row of another shape.
    """
    found = {}
    for column in columns:
        rows.require(column, "numbers, in nested lists")
        if (whole := rows.array(column)) is None:
            values = [np.asarray(value, np.float32) for value in rows.column(column)]
            for number, value in enumerate(values):
                if value.shape != values[0].shape:
                    raise UserError(
                        f"{rows.name(number)}: `{column}` is {value.shape}, the first is {values[0].shape}."
                    )
            whole = np.stack(values)
        found[column] = _floats(whole)
        if not found[column].isfinite().all():
            bad = int((~found[column].flatten(1).isfinite()).any(1).nonzero()[0])
            raise UserError(f"{rows.name(bad)}: `{column}` has a number that is not finite.")
    return TensorDataset(found)


def _floats(values: np.ndarray) -> torch.Tensor:
    """Return numbers in float32, in memory that may be written to."""
    with np.errstate(over="ignore"):
        found = np.asarray(values, np.float32)
    return torch.from_numpy(found if found.flags.writeable else found.copy())


def draws(rows: Rows) -> TensorDataset:
    """Return rows that hold nothing but their number as {draw: (N,)}."""
    return TensorDataset({"draw": torch.arange(len(rows))})
