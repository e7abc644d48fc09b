"""The ways in which rows are kept: one final `Table` each. What a file's name and type mean is in `readers`."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple, Protocol, final

import numpy as np
import numpy.typing as npt

from scaletrain.data.cache import cached, content_key, mapped
from scaletrain.data.store import COMPRESSED, attempt, decompressed
from scaletrain.errors import UserError

Ints = npt.NDArray[np.int64]
INDEXED_BYTES = 16 << 20
"""From which size on the index of a JSON Lines file is kept in the cache."""
_LINE = struct.Struct("=3q")


class File(NamedTuple):
    """One file of an fsspec file system, local or remote."""

    fs: Any
    path: str

    @property
    def local(self) -> bool:
        """Whether it can be opened and mapped by its path."""
        return "file" in self.fs.protocol

    @property
    def label(self) -> str:
        """The path, for messages and for opening it again; relative when it is below the working directory."""
        if not self.local:
            return str(self.fs.unstrip_protocol(self.path))
        relative = os.path.relpath(self.path)
        return self.path if relative.startswith("..") else relative

    @property
    def folder(self) -> str:
        """What relative paths in the file start from."""
        return self.label.rpartition("/")[0]

    def content(self) -> bytes:
        """Read it whole, decompressed when its name ends in .gz or .zst. Raises UserError that names it."""
        content: bytes = attempt(self.label, lambda: self.fs.cat_file(self.path), retry=not self.local)
        if not self.path.lower().endswith(COMPRESSED):
            return content
        return attempt(self.label, lambda: decompressed(io.BytesIO(content), self.path).read(), retry=False)

    def digest(self) -> str:
        """Hash its bytes; of a remote file, take the store's own version token (its ETag, or date and size)."""
        if not self.local:
            return str(attempt(self.label, lambda: self.fs.ukey(self.path)))
        digest = hashlib.sha256()
        with open(self.path, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()


def digest_of(files: Sequence[File]) -> str:
    """Hash the bytes of several files, whatever their names."""
    with ThreadPoolExecutor() as pool:
        return hashlib.sha256(repr(list(pool.map(File.digest, files))).encode()).hexdigest()


class Table(ABC):
    """Rows of one origin, which hold no open file, so that worker processes can take a copy.

    label: what messages call it. columns: in order. folder: what relative paths in its values start from.
    """

    nbytes: int = 0
    """Bytes of the files of a table that streams."""
    streaming: ClassVar[bool] = False
    """Whether rows are read from storage each time that they are asked for, and cost much when they are far apart."""
    label: str
    columns: tuple[str, ...]
    folder: str = ""
    notes: Mapping[str, str] = {}
    """What its file says of itself, beside the rows."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of rows."""

    @abstractmethod
    def column(self, name: str) -> Sequence[Any]:
        """Return one column: random access, values decoded when asked for."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """Hash of the content, not of paths and dates."""

    @property
    def chunks(self) -> Ints:
        """(C,) rows of each chunk in succession: what is read at once."""
        return np.array([len(self)])

    def take(self, names: Sequence[str], rows: Ints) -> dict[str, list[Any]]:
        """Return the values of these rows, in this order, as `column` gives them."""
        numbers = rows.tolist()
        columns = {name: self.column(name) for name in names}
        return {name: [column[i] for i in numbers] for name, column in columns.items()}

    def prefetch(self, rows: Ints) -> None:
        """Take the hint that these rows will be wanted, in this order. Returns at once."""
        return

    def name(self, index: int) -> str:
        """Say where a row stands."""
        return f"{self.label} row {index}"

    def folder_of(self, index: int) -> str:
        """Return what relative paths in a row start from."""
        return self.folder

    def lacking(self, name: str) -> str:
        """Say what has no such column."""
        return f"`{self.label}`"


def gather(starts: Ints, rows: Ints, fetch: Callable[[int, Ints], dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Fetch rows part by part, and put the values in the order of `rows`.

    starts: (P + 1,) where each part begins. fetch: from a part and numbers in it to values. Raises IndexError.
    """
    if not len(rows):
        return fetch(0, rows)
    if rows.min() < 0 or rows.max() >= starts[-1]:
        raise IndexError(f"row numbers {rows.min()} to {rows.max()} of {starts[-1]} rows")
    part = np.searchsorted(starts, rows, "right") - 1
    if part[0] == part[-1] and not (part != part[0]).any():
        return fetch(int(part[0]), rows - starts[part[0]])
    part -= (first := int(part.min()))
    order = np.argsort(part.astype(np.uint16) if part.max() < 1 << 16 else part, kind="stable")  # 16 bits: radix sort
    cuts = np.flatnonzero(np.diff(part[order])) + 1
    out: dict[str, list[Any]] = {}
    for some in np.split(order, cuts):
        number = first + int(part[some[0]])
        for name, values in fetch(number, rows[some] - starts[number]).items():
            out.setdefault(name, []).extend(values)
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    pick = itemgetter(*back.tolist())
    return {name: list(pick(values)) for name, values in out.items()}


class _Taken(Protocol):
    """What gives values by `take`."""

    def __len__(self) -> int: ...

    @property
    def chunks(self) -> Ints: ...

    def take(self, names: Sequence[str], rows: Ints) -> dict[str, list[Any]]: ...

    def prefetch(self, rows: Ints) -> None: ...


@final
class StreamColumn(Sequence[Any]):
    """One column of what streams. Passes over it and slices read by chunks; one value costs as much as a few rows."""

    def __init__(self, owner: _Taken, name: str):
        self._owner, self._name = owner, name

    def __len__(self) -> int:
        return len(self._owner)

    def __getitem__(self, index: Any) -> Any:
        chosen = range(len(self))[index]
        if isinstance(chosen, range):
            return self._owner.take([self._name], np.arange(chosen.start, chosen.stop, chosen.step))[self._name]
        return self._owner.take([self._name], np.array([chosen]))[self._name][0]

    def __iter__(self) -> Iterator[Any]:
        starts = np.concatenate([[0], self._owner.chunks.cumsum()])
        for i, (first, last) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
            self._owner.prefetch(starts[i + 1 : min(i + 5, len(starts) - 1)])
            for start in range(first, last, 4096):
                yield from self[start : min(start + 4096, last)]


@final
class Head(Table):
    """The first rows of a table that streams."""

    streaming: ClassVar[bool] = True

    def __init__(self, table: Table, count: int):
        self.label, self.columns, self.folder = table.label, table.columns, table.folder
        self.nbytes = table.nbytes * count // len(table)
        self._table, self._count = table, count

    def __len__(self) -> int:
        return self._count

    def column(self, name: str) -> Sequence[Any]:
        """Return a view of the column."""
        return StreamColumn(self, name)

    @property
    def digest(self) -> str:
        """Hash of the whole table and the number of rows."""
        return f"{self._table.digest} {self._count}"

    @property
    def chunks(self) -> Ints:
        """The other's, cut off."""
        ends = np.minimum(self._table.chunks.cumsum(), self._count)
        sizes = np.diff(ends, prepend=0)
        return sizes[sizes > 0]

    def take(self, names: Sequence[str], rows: Ints) -> dict[str, list[Any]]:
        """Return values of the other."""
        return self._table.take(names, rows)

    def prefetch(self, rows: Ints) -> None:
        """Pass the hint on."""
        self._table.prefetch(rows)

    def name(self, index: int) -> str:
        """Say what the other says."""
        return self._table.name(index)

    def folder_of(self, index: int) -> str:
        """Return the other's folder."""
        return self._table.folder_of(index)

    def lacking(self, name: str) -> str:
        """Say what the other says."""
        return self._table.lacking(name)


@final
class ArrayTable(Table):
    """Columns that are numpy arrays in memory, first dimension the row."""

    def __init__(self, label: str, arrays: Mapping[str, np.ndarray]):
        self.label, self.columns, self._arrays = label, tuple(arrays), dict(arrays)

    def __len__(self) -> int:
        return len(self._arrays[self.columns[0]])

    def column(self, name: str) -> Sequence[Any]:
        """Return the array itself."""
        return self._arrays[name]  # type: ignore[return-value]  # an array is a sequence in all that is used

    @cached_property
    def digest(self) -> str:
        """Hash of names and values."""
        digest = hashlib.sha256()
        for name, values in self._arrays.items():
            digest.update(f"{name} {values.dtype} {values.shape}".encode() + np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()


@final
class DocumentTable(Table):
    """One row for each file, such as its text, or the path of a picture and the name of its class."""

    def __init__(self, label: str, files: list[File], values: Mapping[str, list[str]]):
        self.label, self.columns, self._files, self._values = label, tuple(values), files, dict(values)

    def __len__(self) -> int:
        return len(self._files)

    def column(self, name: str) -> Sequence[Any]:
        """Return the list itself."""
        return self._values[name]

    def name(self, index: int) -> str:
        """Return the path of the file."""
        return self._files[index].label

    @cached_property
    def digest(self) -> str:
        """Hash of the files' bytes and, where they have one, of their classes."""
        return hashlib.sha256(f"{digest_of(self._files)} {self._values.get('label')}".encode()).hexdigest()


@final
class ArrowColumn(Sequence[Any]):
    """A pyarrow ChunkedArray as a sequence of Python values."""

    def __init__(self, values: Any):
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self._values[index].to_pylist()
        return self._values[int(index)].as_py()

    def __iter__(self) -> Iterator[Any]:
        for chunk in self._values.chunks:
            for start in range(0, len(chunk), 4096):
                yield from chunk.slice(start, 4096).to_pylist()

    def array(self) -> npt.NDArray[Any] | None:
        """Return lists of numbers, nested or not, as one array (N, ...): at once. None where values are others, or of
        several shapes.
        """
        import pyarrow as pa

        if not len(self):
            return None
        values = pa.concat_arrays(self._values.chunks)
        shape = [len(values)]
        nested = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
        while any(is_one(values.type) for is_one in nested):
            inner = values.flatten()  # without what stands under nulls
            size, rest = divmod(len(inner), len(values)) if len(values) else (0, 1)
            if values.null_count or rest or (values.value_lengths().to_numpy() != size).any():
                return None
            shape.append(size)
            values = inner
        number = pa.types.is_floating(values.type) or pa.types.is_integer(values.type)
        return values.to_numpy().reshape(shape) if number and not values.null_count else None


@final
class ArrowTable(Table):
    """Columns in Arrow's layout, in memory or mapped. files: what they were read from."""

    def __init__(self, label: str, table: Any, files: Sequence[File], folder: str = ""):
        self.label, self.folder, self.columns = label, folder, _distinct(label, table.column_names)
        self._table, self._files = table, tuple(files)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def column(self, name: str) -> Sequence[Any]:
        """Return a view of the column."""
        return ArrowColumn(self._table[name])

    @cached_property
    def digest(self) -> str:
        """Hash of the files' bytes."""
        return digest_of(self._files)


@final
class ParquetTable(Table):
    """A Parquet file, of which a column is read into memory when it is first asked for."""

    def __init__(self, file: File):
        self.label, self.folder, self._file = file.label, file.folder, file
        self._read: dict[str, ArrowColumn] = {}
        schema, self._length = self._reading(lambda p: (p.schema_arrow, p.metadata.num_rows))
        self.notes = {k.decode(): v.decode(errors="replace") for k, v in (schema.metadata or {}).items()}
        self.columns = _distinct(self.label, schema.names)

    def _reading(self, action: Callable[[Any], Any]) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            if self._file.local:
                return action(pq.ParquetFile(self._file.path, memory_map=True))
            with self._file.fs.open(self._file.path, "rb") as stream:
                return action(pq.ParquetFile(stream))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"`{self.label}` cannot be read as Parquet: {error}") from error

    def __len__(self) -> int:
        return int(self._length)

    def column(self, name: str) -> Sequence[Any]:
        """Read a column. Raises UserError when its pages are broken."""
        if name not in self._read:
            self._read[name] = ArrowColumn(self._reading(lambda p: p.read(columns=[name]))[name])
        return self._read[name]

    @cached_property
    def digest(self) -> str:
        """Hash of the file's bytes."""
        return self._file.digest()


@final
class JsonLinesTable(Table):
    """One JSON object to a line, kept as bytes and parsed when asked for, so that values stay exactly as written.

    (Arrow would give every object of a column the union of their keys.) Every line is parsed once at the start; of a
    large file, what was found is kept. Raises UserError that names the line. Lines that are empty are no rows; a key
    that a line lacks is None.
    """

    def __init__(self, file: File):
        self.label, self.folder, self._file = file.label, file.folder, file
        plain = file.local and not file.path.lower().endswith(COMPRESSED)
        content = None if plain else file.content()
        self._content = mapped(file.path, np.uint8) if content is None else np.frombuffer(content, np.uint8)
        if len(self._content) < INDEXED_BYTES:
            lines = io.BytesIO()
            self.columns = self._scan(content, lines)
            self._lines: Ints = np.frombuffer(lines.getvalue(), np.int64).reshape(-1, 3)
        else:
            key = content_key("number, start, end", self.digest)
            folder = cached("lines", key, lambda f: self._keep(f, content))
            self.columns = tuple(json.loads((folder / "keys.json").read_text()))
            self._lines = mapped(folder / "lines.bin", np.int64).reshape(-1, 3)

    def _scan(self, content: bytes | None, lines: BinaryIO) -> tuple[str, ...]:
        """Parse every line, and write number, start and end of each that is no empty one. Return the keys of all."""
        columns: dict[str, None] = {}
        end = 0
        with open(self._file.path, "rb") if content is None else io.BytesIO(content) as stream:
            for number, line in enumerate(stream, 1):
                start, end = end, end + len(line)
                if line.strip():
                    columns.update(dict.fromkeys(parse_line(line, self.label, number)))
                    lines.write(_LINE.pack(number, start, end))
        return tuple(columns)

    def _keep(self, folder: Path, content: bytes | None) -> None:
        with (folder / "lines.bin").open("wb") as lines:
            columns = self._scan(content, lines)
        (folder / "keys.json").write_text(json.dumps(columns))

    def __len__(self) -> int:
        return len(self._lines)

    def parse(self, index: int) -> dict[str, Any]:
        """Return one row as it is in the file."""
        number, start, end = self._lines[index].tolist()
        return parse_line(self._content[start:end].tobytes(), self.label, number)

    def column(self, name: str) -> Sequence[Any]:
        """Return the values of one key."""
        return JsonColumn(self, name)

    def take(self, names: Sequence[str], rows: Ints) -> dict[str, list[Any]]:
        """Return values of rows, each of which is parsed once."""
        parsed = [self.parse(i) for i in rows.tolist()]
        return {name: [row.get(name) for row in parsed] for name in names}

    def name(self, index: int) -> str:
        """Say which line, counted from 1 as editors do."""
        return f"{self.label} line {self._lines[index, 0]}"

    @cached_property
    def digest(self) -> str:
        """Hash of the file's bytes."""
        return self._file.digest()


@final
class JsonColumn(Sequence[Any]):
    """One key of a JSON Lines file."""

    def __init__(self, table: JsonLinesTable, key: str):
        self._table, self._key = table, key

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._table.parse(range(len(self))[index]).get(self._key)


def parse_line(line: bytes, label: str, number: int) -> dict[str, Any]:
    """Return the object in a line of JSON Lines. Raises UserError that names the file and the line."""
    try:
        value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except ValueError as error:
        raise UserError(f"{label} line {number} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{label} line {number} is not a JSON object in braces: {line.decode().strip()[:60]}")
    return value


def _distinct(label: str, names: Sequence[str]) -> tuple[str, ...]:
    for name in names:
        if list(names).count(name) > 1:
            raise UserError(f"`{label}` has two columns `{name}`: rename one")
    return tuple(names)
