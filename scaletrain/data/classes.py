"""Labels as class ids: whole numbers as they are, or names in sorted order."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from scaletrain.data.sources import Rows
from scaletrain.errors import UserError, did_you_mean

FILE = "classes.json"


@dataclass(frozen=True)
class Classes:
    """The classes of a data set. named: labels are names, id `i` stands for `names[i]`; else labels are the ids."""

    names: tuple[str, ...]
    named: bool

    def __len__(self) -> int:
        return len(self.names)

    def save(self, folder: Path) -> None:
        """Write the classes beside a network's weights."""
        (folder / FILE).write_text(json.dumps(asdict(self), ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Classes:
        """Read what `save` wrote."""
        content = json.loads((folder / FILE).read_text())
        return cls(tuple(content["names"]), content["named"])

    @classmethod
    def find(cls, rows: Rows, column: str, count: int | None = None) -> Classes:
        """Find the classes of a column; `count` is the number that the recipe declares.

        Names are sorted, as numbers where all of them are. Ids are 0 to `count` - 1, or to the largest id that occurs.
        Raises UserError that names a row whose label is neither a name nor an id, or is out of range.
        """
        first = rows.column(column)[0]
        if rows.streaming and count is not None and not isinstance(first, str):
            return cls(tuple(map(str, range(count))), named=False)  # labels are checked as they are read
        return cls._of(rows.column(column), rows.name, column, count)

    @classmethod
    def find_listed(cls, rows: Rows, column: str, count: int | None = None) -> Classes:
        """Find the classes of a column of lists of labels, as `find` does of labels."""
        lists = listed(rows, column)
        if not lists.labels:
            raise UserError(f"`{column}` is an empty list in every row, such as {rows.name(0)}.")
        return cls._of(lists.labels, lists.name, column, count)

    @classmethod
    def _of(cls, labels: Iterable[Any], name: Callable[[int], str], column: str, count: int | None) -> Classes:
        """Find the classes of labels, none empty; name: where a label stands."""
        named, number = None, 0
        seen: dict[Any, int] = {}  # each label, and the first place that has it
        for number, label in enumerate(labels):
            named = isinstance(label, str) if named is None else named
            _check(name, number, column, label, named)
            seen.setdefault(label, number)
        if not named:
            largest = max(seen)
            if count is None and largest > 10 * number + 1000:
                raise UserError(
                    f"{name(seen[largest])}: `{column}` {largest} is a strange id for {number + 1:,} labels."
                    " Name the right column by `columns: {label: COLUMN}`, or declare num_classes."
                )
            if count is not None and largest >= count:
                raise UserError(_out_of_range(name, seen[largest], column, largest, count))
            return cls(tuple(map(str, range(count or int(largest) + 1))), named=False)
        numbers = all(map(str.isdecimal, seen))
        found = sorted(seen, key=lambda name: (int(name), name) if numbers else (0, name))
        if count is not None and len(found) > count:
            i = seen[found[count]]
            raise UserError(
                f"{name(i)}: `{column}` {found[count]!r} is class {count + 1} of {len(found)}, more than the "
                f"{count} that num_classes declares: {', '.join(map(repr, found[: count + 1]))}, ..."
            )
        return cls(tuple(map(str, found)), named=True)

    def encode(self, rows: Rows, column: str) -> npt.NDArray[np.int64]:
        """Return the ids of a column, (N,). Raises UserError that names the row whose label is no class."""
        return np.fromiter(
            (self.number(rows, i, column, label) for i, label in enumerate(rows.column(column))), np.int64, len(rows)
        )

    def encode_listed(self, rows: Rows, column: str) -> Listed:
        """Return the ids of a column of lists of labels. Raises UserError that names the row."""
        lists = listed(rows, column)
        found = [self._number(lists.name, i, column, label) for i, label in enumerate(lists.labels)]
        return lists._replace(labels=found)

    def number(self, rows: Rows, index: int, column: str, label: Any) -> int:
        """Return the id of one row's label. Raises UserError that names the row when it is no class."""
        return self._number(rows.name, index, column, label)

    def _number(self, name: Callable[[int], str], index: int, column: str, label: Any) -> int:
        _check(name, index, column, label, self.named)
        if self.named and label not in self._ids:
            raise UserError(
                f"{name(index)}: `{column}` {str(label)!r} is no class of the training data."
                f"{did_you_mean(label, self.names)}"
            )
        found = self._ids[label] if self.named else int(label)
        if found >= len(self.names):
            raise UserError(_out_of_range(name, index, column, label, len(self.names)))
        return found

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}


class Listed(NamedTuple):
    """Lists of labels, one after the other."""

    labels: list[Any]
    offsets: npt.NDArray[np.int64]
    """(N + 1,) where each row's list begins."""
    rows: Rows

    def name(self, index: int) -> str:
        """Say where label `index` stands."""
        row = int(np.searchsorted(self.offsets, index, "right")) - 1
        return f"{self.rows.name(row)}, label {index - int(self.offsets[row]) + 1}"


def listed(rows: Rows, column: str) -> Listed:
    """Read a column of lists. Raises UserError that names the row whose value is none."""
    lists = list(rows.column(column))
    for i, value in enumerate(lists):
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{rows.name(i)}: `{column}` is {value!r}, not a list of labels")
    lengths = np.fromiter(map(len, lists), np.int64, len(lists))
    return Listed(list(chain.from_iterable(lists)), np.concatenate([[0], lengths.cumsum()]), rows)


def _check(name: Callable[[int], str], index: int, column: str, label: object, named: bool) -> None:
    """Refuse what is no label, or not of the kind of the others."""
    valid = isinstance(label, str) if named else isinstance(label, int | np.integer) and not isinstance(label, bool)
    if not valid:
        kind = "the name of a class, as in the other rows" if named else "a class id (a whole number from 0)"
        raise UserError(f"{name(index)}: `{column}` is {label!r}, not {kind}")
    if not named and label < 0:  # type: ignore[operator]
        raise UserError(f"{name(index)}: `{column}` is {label}; class ids start at 0")


def _out_of_range(name: Callable[[int], str], index: int, column: str, label: object, count: int) -> str:
    return f"{name(index)}: `{column}` is {label}, out of range: there are {count} classes, 0 to {count - 1}"
