"""Rows by number from files, globs, folders, URLs, Hub ids and scikit-learn's bundled sets.

`open_rows` turns the sources of a recipe into one `Rows`: every row can be read by number, can say where it stands in
the user's files, and the whole has a fingerprint of its content. What is in a file is for `readers` and `tables`.
"""

from __future__ import annotations

import copy
import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate, chain
from typing import Any, final

import numpy as np

from scaletrain.config import SourceSpec
from scaletrain.data.order import Lanes, LocalOrder, Order, Ordering, key_of, permutation
from scaletrain.data.readers import open_tables
from scaletrain.data.tables import ArrowColumn, Head, Ints, StreamColumn, Table, gather
from scaletrain.errors import UserError, did_you_mean

SHUFFLE_BYTES = 64 << 20
"""Of files, whose rows are mixed with one another at most: in memory they take up to several times as much."""
_RUNS = 8
"""Of a sample of rows."""


@final
class Column(Sequence[Any]):
    """One column of `Rows`: values by row number, read when asked for."""

    def __init__(self, parts: Sequence[Sequence[Any]], indices: np.ndarray | None):
        self._parts = list(parts)
        self._starts = [0, *accumulate(len(p) for p in self._parts)]
        self._indices = indices

    def __len__(self) -> int:
        return self._starts[-1] if self._indices is None else len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        if self._indices is not None:
            i = int(self._indices[i])
        part = bisect_right(self._starts, i) - 1
        return self._parts[part][i - self._starts[part]]

    def __iter__(self) -> Iterator[Any]:
        if self._indices is None:
            return chain.from_iterable(self._parts)
        return (self[i] for i in range(len(self)))


@final
class _Held:
    """Values of some rows, by column, in memory."""

    def __init__(self, rows: Ints):
        self.rows = rows
        self.values: dict[str, list[Any]] = {}
        self._next = 0

    def places(self, rows: Ints) -> slice | None:
        """Return where these rows stand, one after the other, among those that are held; None if they do not."""
        for start in (self._next, 0):
            if np.array_equal(self.rows[start : start + len(rows)], rows):
                self._next = start + len(rows)
                return slice(start, self._next)
        return None


@final
class Rows:
    """Rows by number, from one or more tables that have some columns in common.

    tables: none empty. roles: for each table, role to column; a role takes the place of its column's own name.
    indices: (N,) int64, the rows of the concatenated tables that are meant, in order; all by default.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        roles: Sequence[dict[str, str]] | None = None,
        indices: np.ndarray | None = None,
    ):
        self._tables = list(tables)
        self._roles = list(roles) if roles is not None else [{} for _ in self._tables]
        self._starts = [0, *accumulate(len(t) for t in self._tables)]
        self._indices = indices
        self._held: _Held | None = None

    def __len__(self) -> int:
        return self._starts[-1] if self._indices is None else len(self._indices)

    def _names(self, table: int) -> tuple[str, ...]:
        """Return the columns of one table under the names of their roles."""
        roles = self._roles[table]
        return (*roles, *(c for c in self._tables[table].columns if c not in roles and c not in roles.values()))

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns that all tables have, by the name of their role where they have one."""
        common = set.intersection(*(set(self._names(t)) for t in range(len(self._tables))))
        return tuple(c for c in self._names(0) if c in common)

    def require(self, role: str, why: str) -> str:
        """Return the name under which `column` and `row` give a role.

        why: what the role is for, for the message, such as `the class of an image`. Raises UserError that names the
        source and its columns when there is no such column.
        """
        if role in self.columns:
            return role
        table = next(t for t in range(len(self._tables)) if role not in self._names(t))
        names = self._names(table)
        hint = did_you_mean(role, names)
        raise UserError(
            f"{self._tables[table].lacking(role)} has no column `{role}` ({why}); it has "
            f"{', '.join(f'`{c}`' for c in names)}.{hint if hint.startswith(' Did') else ''} "
            f"Say which one it is by `columns: {{{role}: COLUMN}}` of the source."
        )

    def column(self, name: str) -> Sequence[Any]:
        """Return a whole column, (N,), read when asked for. Raises UserError when there is no such column."""
        self.require(name, "asked for by name")
        if self.streaming:
            return StreamColumn(self, name)
        parts = [t.column(r.get(name, name)) for t, r in zip(self._tables, self._roles, strict=True)]
        return parts[0] if len(parts) == 1 and self._indices is None else Column(parts, self._indices)

    def array(self, name: str) -> np.ndarray | None:
        """Return a column of numbers, in lists or not, as one array (N, ...), where that is how it is kept; None, too,
        where few rows are chosen, which are sooner read one by one.
        """
        self.require(name, "asked for by name")
        if self._indices is not None and 4 * len(self._indices) < sum(len(table) for table in self._tables):
            return None
        parts: list[np.ndarray] = []
        for table, roles in zip(self._tables, self._roles, strict=True):
            column = table.column(roles.get(name, name))
            found = column.array() if isinstance(column, ArrowColumn) else column
            if not isinstance(found, np.ndarray) or found.dtype.kind not in "fiu":
                return None
            if parts and found.shape[1:] != parts[0].shape[1:]:
                return None
            parts.append(found)
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return whole if self._indices is None else whole[self._indices]

    def notes(self, key: str) -> dict[str, str]:
        """Return what files say of themselves under a key, by file."""
        return {table.label: table.notes[key] for table in self._tables if key in table.notes}

    @cached_property
    def _columns(self) -> dict[str, Sequence[Any]]:
        return {name: self.column(name) for name in self.columns}

    def row(self, index: int) -> dict[str, Any]:
        """Return one row as column name to value; None where a row lacks a value."""
        if self.streaming:
            return {name: values[0] for name, values in self.take(self.columns, np.array([index])).items()}
        return {name: column[index] for name, column in self._columns.items()}

    @property
    def streaming(self) -> bool:
        """Whether some of the rows are read from storage each time that they are asked for."""
        return any(table.streaming for table in self._tables)

    @cached_property
    def chunks(self) -> Ints:
        """(C,) rows of each chunk in succession: what is read at once. Data in memory are one chunk."""
        if not self.streaming:
            return np.array([len(self)])
        sizes = np.concatenate([table.chunks for table in self._tables])
        if self._indices is None:
            return sizes
        chunk = np.searchsorted(sizes.cumsum(), self._indices, "right")
        return np.diff(np.flatnonzero(np.diff(chunk, prepend=-1, append=-1)))

    def _chosen(self, rows: Ints) -> Ints:
        """Return the numbers that rows have among those of all tables."""
        return rows if self._indices is None else self._indices[rows]

    def take(self, names: Sequence[str], rows: Ints) -> dict[str, list[Any]]:
        """Return the values of these rows, in this order, as `column` gives them. Raises UserError, IndexError."""
        if self._held is not None and (places := self._held.places(rows)):
            values = self._held.values
            if missing := [name for name in names if name not in values]:
                values.update(self._read(missing, self._held.rows))
            return {name: values[name][places] for name in names}
        return self._read(names, rows)

    def held(self, rows: Ints) -> Rows:
        """Return the same, but that `take` reads all of these rows when it is asked for the first of them.

        They are to be asked for in this order. That is faster than a few at a time, which come from as many chunks; it
        is for rows that are small.
        """
        if not self.streaming:
            return self
        found = copy.copy(self)
        found._held = _Held(rows)
        return found

    def _read(self, names: Sequence[str], rows: Ints) -> dict[str, list[Any]]:
        """Return values from the tables."""
        for name in names:
            self.require(name, "asked for by name")

        def fetch(table: int, inside: Ints) -> dict[str, list[Any]]:
            roles = self._roles[table]
            values = self._tables[table].take([roles.get(name, name) for name in names], inside)
            return {name: values[roles.get(name, name)] for name in names}

        return gather(np.array(self._starts), self._chosen(rows), fetch)

    def prefetch(self, rows: Ints) -> None:
        """Take the hint that these rows will be wanted, in this order. Returns at once."""
        if self.streaming:
            chosen = self._chosen(rows)
            if len(self._tables) == 1:
                self._tables[0].prefetch(chosen)
                return
            part = np.searchsorted(self._starts, chosen, "right") - 1
            for table in dict.fromkeys(part.tolist()):
                self._tables[table].prefetch(chosen[part == table] - self._starts[table])

    def sample(self, count: int) -> Rows:
        """Return about `count` rows that stand for all: a few runs, evenly spread, so that few chunks are read."""
        if len(self) <= count:
            return self
        run = -(-count // _RUNS)
        starts = np.arange(_RUNS) * (len(self) - run) // (_RUNS - 1)
        return self.select(np.unique((starts[:, None] + np.arange(run)).ravel()))

    def order(self, lanes: Lanes, shuffle: int, *seed: object) -> Ordering:
        """Return the order in which the rows are trained on: of its own where they stream, and are many.

        shuffle: rows that are mixed; no more than `SHUFFLE_BYTES` of files hold, since they are in memory meanwhile.
        """
        if not self.streaming:
            return Order(len(self), *seed)
        size = sum(table.nbytes for table in self._tables) / self._starts[-1]
        mixed = max(lanes.count, min(shuffle, int(SHUFFLE_BYTES / size) if size else shuffle))
        return LocalOrder(self.chunks, lanes, mixed, *seed) if len(self) > mixed else Order(len(self), *seed)

    def _locate(self, index: int) -> tuple[Table, int]:
        i = range(len(self))[index]
        if self._indices is not None:
            i = int(self._indices[i])
        table = bisect_right(self._starts, i) - 1
        return self._tables[table], i - self._starts[table]

    def name(self, index: int) -> str:
        """Say where a row stands: `train.jsonl line 17` (from 1), `train.parquet row 3` (from 0), `cats/1.png`."""
        table, i = self._locate(index)
        return table.name(i)

    def folder(self, index: int) -> str:
        """Return the folder that relative paths in a row start from: that of its file; '' is the working directory."""
        table, i = self._locate(index)
        return table.folder_of(i)

    def select(self, indices: Sequence[int] | np.ndarray) -> Rows:
        """Return the rows with these numbers, in this order."""
        chosen = np.asarray(indices, np.int64)
        if len(chosen) and not (chosen.min() >= 0 and chosen.max() < len(self)):
            raise IndexError(f"row numbers {chosen.min()} to {chosen.max()} of {len(self)} rows")
        return Rows(self._tables, self._roles, chosen if self._indices is None else self._indices[chosen])

    def alike(self) -> list[Rows]:
        """Split into runs of rows that have the same columns, in order."""
        names = [frozenset(self._names(t)) for t in range(len(self._tables))]
        kinds = list(dict.fromkeys(names))
        if len(kinds) == 1:
            return [self]
        numbers = np.arange(len(self)) if self._indices is None else self._indices
        table = np.searchsorted(self._starts, numbers, "right") - 1
        kind = np.array([kinds.index(n) for n in names])[table]
        found = []
        for run in np.split(np.arange(len(self)), np.flatnonzero(np.diff(kind)) + 1):
            own = np.flatnonzero([n == names[table[run[0]]] for n in names])
            starts = np.concatenate([[0], np.cumsum([len(self._tables[t]) for t in own])])
            place = np.searchsorted(own, table[run])
            inside = numbers[run] - np.array(self._starts)[table[run]]
            tables, roles = ([held[t] for t in own.tolist()] for held in (self._tables, self._roles))
            found.append(Rows(tables, roles, starts[place] + inside))
        return found

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the content, the roles and the chosen rows; not of paths or dates.

        Of Parquet, tar and MDS that stream, footers, headers and offsets stand for the bytes: an edit that keeps
        every size (and a Parquet file's statistics) does not show.
        """
        digest = hashlib.sha256()
        for table, roles in zip(self._tables, self._roles, strict=True):
            digest.update(f"{table.digest} {len(table)} {sorted(roles.items())}\n".encode())
        if self._indices is not None:
            digest.update(np.ascontiguousarray(self._indices, "<i8").tobytes())
        return digest.hexdigest()


def open_rows(specs: Sequence[SourceSpec]) -> Rows:
    """Open the sources of a recipe and put their rows one after the other.

    Raises UserError that names the path, file, line or column: nothing there, broken, empty, fewer rows than asked
    for, a column that is not there, roles that only some of the sources have.
    """
    tables: list[Table] = []
    roles: list[dict[str, str]] = []
    chosen: list[range] = []
    start = 0
    for spec in specs:
        found = [t for t in open_tables(spec) if len(t)]
        total = sum(len(t) for t in found)
        if not total:
            raise UserError(f"`{spec.path}` has no rows")
        if spec.rows is not None and spec.rows > total:
            raise UserError(f"`{spec.path}` has {total:,} rows, fewer than `rows: {spec.rows}` asks for")
        if spec.rows is not None and any(table.streaming for table in found):  # no list of numbers: that would grow
            found = [Head(found[0], spec.rows)]  # a source that streams is one table
            total = spec.rows
        for table in found:
            for role, column in spec.columns.items():
                if column not in table.columns:
                    raise UserError(
                        f"{table.lacking(column)} has no column `{column}`, which `columns` gives for `{role}`."
                        f"{did_you_mean(column, table.columns)}"
                    )
        tables += found
        roles += [spec.columns] * len(found)
        chosen.append(range(start, start + (total if spec.rows is None else spec.rows)))
        start += total
    rows = Rows(tables, roles, None if sum(map(len, chosen)) == start else np.concatenate(chosen))
    for role in dict.fromkeys(chain.from_iterable(roles)):
        rows.require(role, "another source of the same list has it")
    return rows


def joined(parts: Sequence[Rows]) -> Rows:
    """Put rows one after the other. Raises UserError that names a source without a role that another one has."""
    if len(parts) == 1:
        return parts[0]
    starts = [0, *accumulate(sum(map(len, part._tables)) for part in parts)]
    chosen = None
    if any(part._indices is not None for part in parts):
        numbers = (np.arange(sum(map(len, p._tables))) if p._indices is None else p._indices for p in parts)
        chosen = np.concatenate([start + own for start, own in zip(starts, numbers, strict=False)])
    roles = [r for part in parts for r in part._roles]
    rows = Rows([t for part in parts for t in part._tables], roles, chosen)
    for role in dict.fromkeys(chain.from_iterable(roles)):
        rows.require(role, "another source of the same list has it")
    return rows


def split_holdout(rows: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """Return (train, eval): `share` of the rows set aside, chosen by `seed` alone; each part in the order of the files.

    Raises UserError when one of the parts would be empty.
    """
    if rows.streaming:
        raise UserError("`data.holdout` is for data in memory: of a source that streams, give `data.eval` instead")
    held = round(share * len(rows))
    if not 0 < held < len(rows):
        raise UserError(
            f"`data.holdout` of {share} sets {held} of {len(rows)} rows aside; both parts need at least one"
        )
    chosen = np.zeros(len(rows), bool)
    chosen[permutation(len(rows), key_of(seed, "holdout"))[:held]] = True
    return rows.select(np.flatnonzero(~chosen)), rows.select(np.flatnonzero(chosen))
