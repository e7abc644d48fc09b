"""The formats of sharded sources: how a shard is indexed, and how one chunk of it is read.

A chunk is what is read at once: a row group of Parquet, about 256 KiB of JSON Lines, about 1 MiB of a tar or of MDS.
An index holds a few numbers for each chunk and nothing for each row.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any, BinaryIO, ClassVar, NamedTuple, final

import numpy as np

from scaletrain.data.store import Ranges, Version, attempt, exact, opened, version
from scaletrain.data.tables import File, Ints, parse_line
from scaletrain.errors import UserError

JSON_CHUNK = 256 << 10
SAMPLES_CHUNK = 1 << 20
IMAGES = ("jpg", "jpeg", "png", "webp")
_TAIL = 64 << 10
_SPACE = np.isin(np.arange(256), list(b" \t\n\r\v\f"))


class Index(NamedTuple):
    """What is known of a shard without reading it again: C chunks."""

    columns: tuple[str, ...]
    rows: Ints
    """(C,) rows of each chunk, none of them 0."""
    places: Ints
    """(C, k) where each chunk stands: the numbers that the format needs."""
    digest: str
    """Hash of the content."""
    version: Version
    """Of the file, when it was indexed."""


class Chunk(ABC):
    """Rows that were read together. nbytes: what they take in memory."""

    nbytes: int

    @abstractmethod
    def values(self, names: Sequence[str], rows: Ints) -> dict[str, list[Any]]:
        """Return values of rows, counted from the chunk's first. Raises UserError that names the row."""


class NamedChunk(Chunk):
    """Rows that have names of their own, which are only known once they are read."""

    @abstractmethod
    def key(self, row: int) -> str:
        """Return a row's own name."""


class Shards(ABC):
    """The shards of one source by number. Holds no open file and no lock, so that processes can take a copy."""

    kind: ClassVar[str]
    declared: ClassVar[bool] = True
    """Whether a shard declares its columns; else they are those that were met in it."""
    by_column: ClassVar[bool] = False
    """Whether a chunk is read for some columns only."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of shards."""

    @abstractmethod
    def label(self, shard: int) -> str:
        """Return what messages call a shard."""

    @abstractmethod
    def folder(self, shard: int) -> str:
        """Return what relative paths in its values start from."""

    @abstractmethod
    def identity(self, shard: int) -> tuple[object, ...]:
        """Return what its index is kept by: it changes with the content."""

    @abstractmethod
    def index(self, shard: int) -> Index:
        """Look through a shard. Raises UserError that names it."""

    @abstractmethod
    def read(self, shard: int, index: Index, chunk: int, names: Sequence[str]) -> Chunk:
        """Read a chunk, with these columns at least. Raises UserError that names the shard."""

    def row_name(self, index: Index, chunk: int, row: int, first: int, content: Callable[[], Chunk]) -> str:
        """Name a row of a chunk as users find it. first: rows of the shard before the chunk. content: reads it."""
        return f"row {first + row}"


class FileShards(Shards):
    """One file for each shard. limit: bytes that copies of remote and compressed ones may take."""

    def __init__(self, files: Sequence[File], limit: int):
        self.files, self.limit = list(files), limit

    def __len__(self) -> int:
        return len(self.files)

    def label(self, shard: int) -> str:
        """Return the path or URL."""
        return self.files[shard].label

    def folder(self, shard: int) -> str:
        """Return the folder of the file."""
        return self.files[shard].folder

    def identity(self, shard: int) -> tuple[object, ...]:
        """Return the path and the version."""
        file = self.files[shard]
        return self.kind, os.path.abspath(file.path) if file.local else file.label, tuple(version(file))

    def open(self, shard: int, of: Version) -> BinaryIO:
        """Open the file or its copy."""
        return opened(self.files[shard], of, self.limit)


# --- Parquet ----------------------------------------------------------------------------------------------------------


@final
class ArrowChunk(Chunk):
    """Columns in Arrow's layout."""

    def __init__(self, table: Any):
        self.nbytes = table.nbytes
        batches = table.to_batches()
        self._rows = batches[0] if len(batches) == 1 else table
        self._names = table.column_names

    def values(self, names: Sequence[str], rows: Ints) -> dict[str, list[Any]]:
        """Return values as Python objects."""
        import pyarrow as pa

        chosen = self._rows if list(names) == self._names else self._rows.select(list(names))
        if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
            chosen = chosen.slice(int(rows[0]), len(rows))
        else:
            # All columns by one call. (`pa.array` of a numpy array would import pandas, which takes 0.3 s and 40 MB.)
            where = pa.py_buffer(np.ascontiguousarray(rows, np.int64))
            chosen = chosen.take(pa.Array.from_buffers(pa.int64(), len(rows), [None, where]))
        return {name: column.to_pylist() for name, column in zip(names, chosen.columns, strict=True)}


@lru_cache(maxsize=64)
def _footer(file: File, of: Version) -> tuple[bytes, Any]:
    """Return the bytes of a Parquet file's footer, and what they say. Raises UserError that names it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    size = of.size

    def read(start: int) -> bytes:
        if not file.local:
            source = Ranges(file, size)
            source.seek(start)
            return source.read()
        with opened(file, of, 0) as stream:
            return exact(stream, start, size, file.label)

    tail = read(max(0, size - _TAIL))
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if tail[-4:] != b"PAR1" or length > size - 4:
        raise UserError(f"`{file.label}` cannot be read as Parquet: it has no footer; it may be cut off")
    tail = tail[-length:] if length <= len(tail) else read(size - length)
    try:
        return tail, pq.read_metadata(pa.BufferReader(b"PAR1" + tail))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"`{file.label}` cannot be read as Parquet: {error}") from error


@final
class ParquetShards(FileShards):
    """Parquet. A chunk is a row group; of a remote file only the bytes of the wanted columns are fetched."""

    kind = "parquet"
    by_column = True

    def index(self, shard: int) -> Index:
        """Read the footer."""
        file = self.files[shard]
        of = version(file)
        tail, about = _footer(file, of)
        columns = tuple(about.schema.to_arrow_schema().names)
        for name in columns:
            if columns.count(name) > 1:
                raise UserError(f"`{file.label}` has two columns `{name}`: rename one")
        rows = np.array([about.row_group(i).num_rows for i in range(about.num_row_groups)], np.int64)
        full = np.flatnonzero(rows)
        digest = hashlib.sha256(f"{of.size} ".encode() + tail).hexdigest()
        return Index(columns, rows[full], full[:, None], digest, of)

    def read(self, shard: int, index: Index, chunk: int, names: Sequence[str]) -> Chunk:
        """Read columns of a row group."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        file, size = self.files[shard], index.version.size
        if file.local and (now := version(file).size) != size:
            raise UserError(f"`{file.label}` has {now:,} bytes; it had {size:,} when it was indexed")
        about = _footer(file, index.version)[1]
        try:
            source = file.path if file.local else Ranges(file, size)
            with pq.ParquetFile(source, metadata=about, pre_buffer=not file.local) as parquet:
                table = parquet.read_row_group(int(index.places[chunk, 0]), list(names), use_threads=False)
        except FileNotFoundError as error:
            raise UserError(f"`{file.label}` is not there (any more)") from error
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"`{file.label}` cannot be read as Parquet: {error}") from error
        return ArrowChunk(table)


# --- JSON Lines -------------------------------------------------------------------------------------------------------


def _lines(block: bytes) -> tuple[Ints, Ints, Ints, int]:
    """Return start, end and number (from 0) of each line of a block that is not blank, and how many lines there are."""
    data = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(data == ord("\n"))
    if not block.endswith(b"\n"):
        ends = np.append(ends, len(block))
    starts = np.concatenate([[0], ends[:-1] + 1])
    numbers = np.arange(len(ends))
    blank = [i for i in np.flatnonzero(_SPACE[data[starts]]).tolist() if not block[starts[i] : ends[i]].strip()]
    if blank:
        starts, ends, numbers = (np.delete(x, blank) for x in (starts, ends, numbers))
    return starts, ends, numbers, len(numbers) + len(blank)


@final
class JsonLinesChunk(NamedChunk):
    """Lines as they are in the file, parsed when they are asked for. line: number of the first, from 1."""

    def __init__(self, label: str, line: int, content: bytes):
        self._label, self._content = label, content
        self._starts, self._ends, numbers, _ = _lines(content)
        self.numbers = line + numbers
        self.nbytes = len(content) + 3 * self.numbers.nbytes

    def key(self, row: int) -> str:
        """Say which line, from 1."""
        return f"line {self.numbers[row]}"

    def row(self, row: int) -> dict[str, Any]:
        """Parse a row."""
        line = self._content[self._starts[row] : self._ends[row]]
        return parse_line(line, self._label, int(self.numbers[row]))

    def values(self, names: Sequence[str], rows: Ints) -> dict[str, list[Any]]:
        """Parse rows; a key that a line lacks is None."""
        parsed = [self.row(i) for i in rows.tolist()]
        return {name: [row.get(name) for row in parsed] for name in names}


@final
class JsonLinesShards(FileShards):
    """JSON Lines, of which one pass counts the rows and hashes the bytes. Compressed ones are read from a plain copy.

    Columns are the keys in the first chunk of each shard. places: start, end, number of the first line, lines.
    """

    kind = "jsonl"
    declared = False

    def index(self, shard: int) -> Index:
        """Count lines that are not blank."""
        label, of = self.label(shard), version(self.files[shard])
        digest = hashlib.sha256()
        rows: list[int] = []
        places: list[tuple[int, int, int, int]] = []
        columns: dict[str, None] = {}
        start, line = 0, 1
        with self.open(shard, of) as stream:
            while block := attempt(label, lambda: _block(stream), retry=False):
                digest.update(block)
                kept, _, _, lines = _lines(block)
                if len(kept):
                    if not rows:
                        head = JsonLinesChunk(label, line, block)
                        columns = {key: None for i in range(len(kept)) for key in head.row(i)}
                    rows.append(len(kept))
                    places.append((start, start + len(block), line, lines))
                start, line = start + len(block), line + lines
        return Index(
            tuple(columns), np.array(rows, np.int64), np.array(places, np.int64).reshape(-1, 4), digest.hexdigest(), of
        )

    def read(self, shard: int, index: Index, chunk: int, names: Sequence[str]) -> Chunk:
        """Read a range of bytes."""
        start, end, line, _ = index.places[chunk].tolist()
        with self.open(shard, index.version) as stream:
            content = JsonLinesChunk(self.label(shard), line, exact(stream, start, end, self.label(shard)))
        if len(content.numbers) != index.rows[chunk]:
            raise UserError(f"`{self.label(shard)}` has changed since it was indexed (near line {line})")
        return content

    def row_name(self, index: Index, chunk: int, row: int, first: int, content: Callable[[], Chunk]) -> str:
        """Say which line, from 1."""
        _, _, line, lines = index.places[chunk].tolist()
        if lines == index.rows[chunk]:
            return f"line {line + row}"
        named = content()
        assert isinstance(named, NamedChunk)
        return named.key(row)


def _block(stream: BinaryIO) -> bytes:
    block = stream.read(JSON_CHUNK)
    return block if block.endswith(b"\n") else block + stream.readline()


# --- WebDataset -------------------------------------------------------------------------------------------------------


class _Sample(NamedTuple):
    """Members of a tar with the same path up to the first dot of the file name. members: extension to (start, size)."""

    key: str
    header: int
    members: dict[str, tuple[int, int]]


def _samples(stream: BinaryIO, label: str) -> Iterator[_Sample]:
    """Go through the headers of a tar. Raises UserError that names the tar, and the member where it is known."""
    sample: _Sample | None = None
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # it would keep them all
            folder, slash, base = member.name.rpartition("/")
            stem, dot, extension = base.partition(".")
            if not (member.isfile() and stem and dot and extension):
                continue
            key, extension = folder + slash + stem, extension.lower()
            if sample is None or sample.key != key:
                if sample is not None:
                    yield sample
                sample = _Sample(key, member.offset, {})
            if extension in sample.members:
                raise UserError(f"`{label}` sample {key} has two members .{extension}")
            sample.members[extension] = member.offset_data, member.size
        stream.seek(tar.offset)
        if any(stream.read(512)):  # `next` takes a broken header for the end
            raise UserError(f"`{label}` cannot be read as a tar: no header at byte {tar.offset:,}")
        while block := stream.read(1 << 20):
            if block.strip(b"\0"):
                raise UserError(f"`{label}` goes on after its end at byte {tar.offset:,}: give joined tars as several")
    if sample is not None:
        yield sample


def _decode_member(extension: str, content: bytes) -> Any:
    kind = extension.rpartition(".")[2]
    if kind in ("txt", "text"):
        return content.decode()
    if kind in ("cls", "index"):
        return int(content)
    return json.loads(content) if kind == "json" else content


@final
class TarChunk(NamedChunk):
    """Some samples of a tar, with their headers, as they are in the file."""

    def __init__(self, label: str, content: bytes):
        self._label, self._content = label, content
        self._samples = list(_samples(io.BytesIO(content), label))
        self.nbytes = len(content) + 512 * len(self._samples)

    def __len__(self) -> int:
        return len(self._samples)

    def key(self, row: int) -> str:
        """Return what WebDataset calls the sample."""
        return f"sample {self._samples[row].key}"

    def values(self, names: Sequence[str], rows: Ints) -> dict[str, list[Any]]:
        """Decode members; one that a sample lacks is None."""
        return {name: [self._value(self._samples[i], name) for i in rows.tolist()] for name in names}

    def _value(self, sample: _Sample, name: str) -> Any:
        if name == "__key__":
            return sample.key
        if name == "image" and name not in sample.members:
            name = next((e for e in IMAGES if e in sample.members), name)
        if name not in sample.members:
            return None
        start, size = sample.members[name]
        try:
            return _decode_member(name, self._content[start : start + size])
        except ValueError as error:
            raise UserError(f"{self._label} sample {sample.key}: .{name} cannot be decoded: {error}") from error


@final
class TarShards(FileShards):
    """WebDataset: tars whose members with the same name up to the first dot are one sample.

    Columns are the extensions and `__key__`; where there are pictures, `image` is the one of a sample, whatever its
    extension. .txt and .text are text, .cls and .index whole numbers, .json is parsed, all else is bytes. A tar has no
    list of contents: one pass over the headers finds the samples. places: start, end.
    """

    kind = "webdataset"
    declared = False

    def index(self, shard: int) -> Index:
        """Find the samples."""
        label, of = self.label(shard), version(self.files[shard])
        digest = hashlib.sha256()
        rows: list[int] = []
        starts: list[int] = []
        columns: dict[str, None] = {"__key__": None}
        end = 0
        if of.size:
            with self.open(shard, of) as stream:
                try:
                    for sample in _samples(stream, label):
                        digest.update(repr(sample).encode())
                        columns.update(dict.fromkeys(sample.members))
                        if not rows or sample.header - starts[-1] >= SAMPLES_CHUNK:
                            rows.append(0)
                            starts.append(sample.header)
                        rows[-1] += 1
                        end = max(start + -(-size // 512) * 512 for start, size in sample.members.values())
                except (tarfile.TarError, OSError) as error:
                    raise UserError(f"`{label}` cannot be read as a tar: {error}") from error
        if not columns.keys().isdisjoint(IMAGES):
            columns["image"] = None
        places = np.array([starts, [*starts[1:], end][: len(starts)]], np.int64).T
        return Index(tuple(columns), np.array(rows, np.int64), places, digest.hexdigest(), of)

    def read(self, shard: int, index: Index, chunk: int, names: Sequence[str]) -> Chunk:
        """Read a range of bytes."""
        label = self.label(shard)
        start, end = index.places[chunk].tolist()
        with self.open(shard, index.version) as stream:
            content = exact(stream, start, end, label)
        try:
            samples = TarChunk(label, content)
        except (tarfile.TarError, OSError) as error:
            raise UserError(f"`{label}` cannot be read as a tar: {error}") from error
        if len(samples) != index.rows[chunk]:
            raise UserError(f"`{label}` has changed since it was indexed (near byte {start:,})")
        return samples

    def row_name(self, index: Index, chunk: int, row: int, first: int, content: Callable[[], Chunk]) -> str:
        """Say which sample."""
        named = content()
        assert isinstance(named, NamedChunk)
        return named.key(row)


# --- MDS --------------------------------------------------------------------------------------------------------------

_NUMBERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64")


def _number(dtype: str, content: bytes) -> int | float:
    return np.frombuffer(content, np.dtype(dtype).newbyteorder("<"))[0].item()


def _pixels(content: bytes) -> Any:
    """Return a picture that is kept as width, height, length of the mode (uint32 each), mode and pixels: an array."""
    from PIL import Image

    width, height, length = np.frombuffer(content, "<u4", 3).tolist()
    mode = content[12 : 12 + length].decode()
    image = Image.frombytes(mode, (width, height), content[12 + length :])
    return np.asarray(image if mode in ("L", "RGB") else image.convert("RGB"))


_DECODE: dict[str, Callable[[bytes], Any]] = {
    "str": bytes.decode,
    "json": json.loads,
    "pil": _pixels,
    **dict.fromkeys(("bytes", "jpeg", "png"), bytes),
    "int": partial(_number, "int64"),
    **{name: partial(_number, name) for name in _NUMBERS},
}


@final
class MdsChunk(Chunk):
    """Some samples of an MDS shard. first: the number of the first. ends: where each ends in `content`."""

    def __init__(self, label: str, first: int, content: bytes, ends: Ints, entry: Mapping[str, Any]):
        self._label, self._first, self._content, self._ends = label, first, content, ends
        self._names, self._encodings = entry["column_names"], entry["column_encodings"]
        self._sizes = entry["column_sizes"]
        self.nbytes = len(content) + ends.nbytes

    def values(self, names: Sequence[str], rows: Ints) -> dict[str, list[Any]]:
        """Decode the wanted columns."""
        out: dict[str, list[Any]] = {name: [] for name in names}
        for row in rows.tolist():
            parts = self._parts(row)
            for name in names:
                column = self._names.index(name)
                start, stop = parts[column : column + 2]
                out[name].append(self._value(row, column, self._content[start:stop]))
        return out

    def _parts(self, row: int) -> list[int]:
        """Return where each column of a row starts in `content`, and where the last ends.

        A sample begins with the sizes (uint32) of those columns whose size is not the same in all samples.
        """
        start = int(self._ends[row - 1]) if row else 0
        varying = [i for i, size in enumerate(self._sizes) if size is None]
        sizes = list(self._sizes)
        for i, at in zip(varying, range(start, start + 4 * len(varying), 4), strict=True):
            sizes[i] = int.from_bytes(self._content[at : at + 4], "little")
        places = list(accumulate(sizes, initial=start + 4 * len(varying)))
        if places[-1] != self._ends[row]:
            raise UserError(f"{self._label} row {self._first + row} is broken: its columns do not fill it")
        return places

    def _value(self, row: int, column: int, content: bytes) -> Any:
        encoding = self._encodings[column]
        place = f"{self._label} row {self._first + row}: `{self._names[column]}`"
        if encoding not in _DECODE:
            raise UserError(f"{place} is encoded as {encoding}, which is not read")
        try:
            return _DECODE[encoding](content)
        except (ValueError, IndexError) as error:
            raise UserError(f"{place} cannot be decoded: {error}") from error


@final
class MdsShards(FileShards):
    """The shards of a folder in the MDS layout of MosaicML's `streaming` (version 2), as its index.json lists them.

    A shard is the number n of its samples (uint32), n + 1 offsets (uint32) of their bytes, a copy of its entry in
    index.json, and the samples. Values are text, bytes, numbers, JSON, and pictures: encoded ones stay as they are,
    `pil` gives an array. Other encodings, such as pickles, are refused when they are asked for. places: first sample.
    """

    kind = "mds"

    def __init__(self, files: Sequence[File], limit: int, entries: Sequence[Mapping[str, Any]]):
        super().__init__(files, limit)
        self._entries = list(entries)

    def identity(self, shard: int) -> tuple[object, ...]:
        """Add what index.json says."""
        return *super().identity(shard), repr(self._entries[shard])

    def index(self, shard: int) -> Index:
        """Cut the samples into runs of about the same number."""
        entry, of = self._entries[shard], version(self.files[shard])
        samples, size = entry["samples"], entry["raw_data"]["bytes"]
        run = max(1, samples * SAMPLES_CHUNK // max(size, 1))
        starts = np.arange(0, samples, run)
        with self.open(shard, of) as stream:
            offsets = exact(stream, 0, 8 + 4 * samples, self.label(shard))
        if np.frombuffer(offsets, "<u4", 1)[0] != samples:
            raise UserError(f"`{self.label(shard)}` does not have the {samples:,} samples that index.json says")
        about = json.dumps({key: entry[key] for key in ("column_names", "column_encodings", "column_sizes")})
        digest = hashlib.sha256(f"{size} {about}".encode() + offsets).hexdigest()
        rows = np.diff(np.append(starts, samples))
        return Index(tuple(entry["column_names"]), rows, starts[:, None], digest, of)

    def read(self, shard: int, index: Index, chunk: int, names: Sequence[str]) -> Chunk:
        """Read the offsets and then the bytes of a run of samples."""
        label, first, count = self.label(shard), int(index.places[chunk, 0]), int(index.rows[chunk])
        with self.open(shard, index.version) as stream:
            offsets = np.frombuffer(exact(stream, 4 * (first + 1), 4 * (first + count + 2), label), "<u4")
            if (np.diff(offsets.astype(np.int64)) < 0).any():
                raise UserError(f"`{label}` is broken: the offsets of rows {first} to {first + count} do not rise")
            content = exact(stream, int(offsets[0]), int(offsets[-1]), label)
        return MdsChunk(label, first, content, (offsets[1:] - offsets[0]).astype(np.int64), self._entries[shard])


# --- `datasets` -------------------------------------------------------------------------------------------------------


@final
class IterableShards(Shards):
    """An `IterableDataset` of the `datasets` library, which is read from the start of a shard: a chunk is a shard.

    identity: what the content follows from; it stands for the digest.
    """

    kind = "hub"
    by_column = True

    def __init__(self, label: str, dataset: Any, identity: str):
        # Arrow leaves pictures and sounds encoded. Sets without declared types have none, and may change type midway.
        self._dataset = dataset if dataset.features is None else dataset.with_format("arrow")
        self._label, self._identity = label, identity

    def __len__(self) -> int:
        return int(self._dataset.num_shards)

    def label(self, shard: int) -> str:
        """Return the name of the data set and the shard."""
        return f"{self._label} shard {shard}"

    def folder(self, shard: int) -> str:
        """Return none."""
        return ""

    def identity(self, shard: int) -> tuple[object, ...]:
        """Return the data set's and the shard."""
        return self.kind, self._identity, len(self), shard

    def _tables(self, shard: int) -> Iterator[Any]:
        import pyarrow as pa

        for batch in self._dataset.shard(num_shards=len(self), index=shard).iter(batch_size=1000):
            yield batch if isinstance(batch, pa.Table) else pa.table(batch)

    def index(self, shard: int) -> Index:
        """Read a shard and count."""

        def count() -> tuple[dict[str, None], int]:
            columns: dict[str, None] = {}
            rows = 0
            for table in self._tables(shard):
                columns.update(dict.fromkeys(table.column_names))
                rows += table.num_rows
            return columns, rows

        columns, rows = attempt(self.label(shard), count)
        sizes = np.array([rows] if rows else [], np.int64)
        digest = hashlib.sha256(repr(self.identity(shard)).encode()).hexdigest()
        return Index(tuple(columns), sizes, np.zeros((len(sizes), 1), np.int64), digest, Version(0, ""))

    def read(self, shard: int, index: Index, chunk: int, names: Sequence[str]) -> Chunk:
        """Read a shard whole."""
        import pyarrow as pa

        def read() -> Any:
            tables = [t.select([n for n in names if n in t.column_names]) for t in self._tables(shard)]
            return pa.concat_tables(tables, promote_options="permissive").combine_chunks()

        table = attempt(self.label(shard), read)
        if table.num_rows != index.rows[chunk]:
            raise UserError(
                f"`{self.label(shard)}` has {table.num_rows:,} rows; it had {index.rows[chunk]:,} when counted"
            )
        return ArrowChunk(table)
