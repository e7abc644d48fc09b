"""Tables of any size: an index of shards and chunks in memory, the rows in storage until they are asked for."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np

from scaletrain.data.cache import cached, content_key
from scaletrain.data.shard_readers import Chunk, Index, Shards
from scaletrain.data.store import Version
from scaletrain.data.tables import Ints, StreamColumn, Table, gather
from scaletrain.errors import UserError

log = logging.getLogger("scaletrain")

MEMORY_BYTES = 512 << 20
"""Largest size of the chunks that a process keeps; a single larger chunk is kept while it is read."""
THREADS = 4
"""Threads of a process that read ahead."""
WANTED = 256
"""Chunks that may be waiting to be read ahead."""
IDLE_SECONDS = 60.0
"""How long a chunk is kept that nobody asks for: rows of its own that are left belong to other processes by then."""
STALE_SECONDS = 120.0
"""How long a chunk that was read ahead may wait while others want its room."""
_INDEXING = 8
_FORMAT = 1
"""Changes when what is kept of an index changes."""


class _Entry:
    """A chunk that is, or is being, read. left: rows not asked for yet. used: whether any was. since: its last use."""

    __slots__ = ("chunk", "left", "since", "size", "used")

    def __init__(self, rows: int, used: bool):
        self.chunk: Future[Chunk] = Future()
        self.left, self.since, self.size, self.used = rows, time.monotonic(), 0, used


Key = tuple[object, ...]
Read = Callable[[], Chunk]


@final
class Chunks:
    """The chunks that a process has in memory, of all its tables, and the threads that read ahead.

    A chunk all of whose rows have been asked for goes at once, one that nobody asks for any more after a while, and at
    the limit what was used least recently. What was read ahead and not used yet takes half of the limit at most. A
    chunk is read once, even when two threads ask for it.
    """

    def __init__(self, limit: int = MEMORY_BYTES, threads: int = THREADS):
        self._limit, self._threads = limit, threads
        self._lock = threading.Lock()
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._wanted: deque[tuple[float, Key, int, Read]] = deque()  # since when
        self._size = self._unused = self._reading = 0
        self._pool: ThreadPoolExecutor | None = None

    def get(self, key: Key, rows: int, asked: int, read: Read) -> Chunk:
        """Return a chunk of `rows` rows, of which `asked` are asked for now. Raises what `read` raises."""
        with self._lock:
            entry = self._entries.get(key)
            mine = entry is None
            if entry is None:
                entry = self._entries[key] = _Entry(rows, used=True)
                self._wanted = deque(w for w in self._wanted if w[1] != key)
            self._entries.move_to_end(key)
            entry.since = time.monotonic()
            if not entry.used:
                entry.used = True
                self._unused -= entry.size
        if mine:
            self._fill(key, entry, read)
        chunk = entry.chunk.result()
        with self._lock:
            entry.left -= asked
            if entry.left <= 0:
                self._drop(key, entry)
            self._start()
        return chunk

    def want(self, chunks: Sequence[tuple[Key, int, Read]]) -> None:
        """Read these (key, rows, read) ahead when there is room."""
        with self._lock:
            waiting = {key for _, key, _, _ in self._wanted}
            fresh = [(time.monotonic(), *c) for c in chunks if c[0] not in self._entries and c[0] not in waiting]
            self._wanted.extend(fresh[: max(0, WANTED - len(self._wanted))])
            self._start()

    def _start(self) -> None:
        if self._wanted and self._unused >= self._limit // 2:
            self._forget()
        while self._wanted and self._reading < self._threads and self._unused < self._limit // 2:
            _, key, rows, read = self._wanted.popleft()
            if key in self._entries:
                continue
            entry = _Entry(rows, used=False)
            self._pool = self._pool or ThreadPoolExecutor(self._threads, thread_name_prefix="prefetch")
            try:
                self._pool.submit(self._ahead, key, entry, read)
            except RuntimeError:  # the interpreter is about to exit
                return
            self._entries[key] = entry
            self._reading += 1

    def _forget(self) -> None:
        """Let go of what was hinted at long ago, and nobody came for."""
        before = time.monotonic() - STALE_SECONDS
        self._wanted = deque(w for w in self._wanted if w[0] >= before)
        for key, entry in list(self._entries.items()):
            if not entry.used and entry.size and entry.since < before:
                self._drop(key, entry)

    def _ahead(self, key: Key, entry: _Entry, read: Read) -> None:
        self._fill(key, entry, read)
        with self._lock:
            self._reading -= 1
            self._start()

    def _fill(self, key: Key, entry: _Entry, read: Read) -> None:
        try:
            chunk = read()
        except BaseException as error:
            with self._lock:
                self._drop(key, entry)
            entry.chunk.set_exception(error)
            return
        with self._lock:
            entry.size = chunk.nbytes
            self._size += entry.size
            if not entry.used:
                self._unused += entry.size
            entry.chunk.set_result(chunk)
            self._make_room(entry)

    def _make_room(self, newest: _Entry) -> None:
        idle = time.monotonic() - IDLE_SECONDS
        for key, entry in list(self._entries.items()):
            if entry.used and entry.size and entry.since < idle:
                self._drop(key, entry)
        while self._size > self._limit:
            done = [(k, e) for k, e in self._entries.items() if e.size and e is not newest]
            if not done:
                return
            self._drop(*next((item for item in done if item[1].used), done[0]))

    def _drop(self, key: Key, entry: _Entry) -> None:
        if self._entries.get(key) is entry:
            del self._entries[key]
            self._size -= entry.size
            self._unused -= 0 if entry.used else entry.size


_chunks = Chunks()


def _renew() -> None:
    """Begin anew in a forked process, to which neither threads nor the locks that they held are of use."""
    global _chunks
    _chunks = Chunks()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


@final
class ShardTable(Table):
    """The shards of one source as one table, in order, read chunk by chunk.

    Raises UserError that names the shard: it cannot be read, has other columns than the first.
    """

    streaming: ClassVar[bool] = True

    def __init__(self, label: str, shards: Shards):
        self.label, self._shards = label, shards
        indices = _indices(shards)
        full = [i for i, index in enumerate(indices) if len(index.rows)]
        for i in set(range(len(shards))).difference(full):
            log.warning("`%s` has no rows: it is skipped", shards.label(i))
        self._numbers, self._indices = full, [indices[i] for i in full]
        self.columns = self._agreed() if full else ()
        self.folder = shards.folder(full[0]) if full else ""
        self.nbytes = sum(index.version.size for index in self._indices)
        sizes = [index.rows for index in self._indices]
        self._sizes = np.concatenate(sizes) if sizes else np.empty(0, np.int64)
        self._starts = np.concatenate([[0], self._sizes.cumsum()])
        self._place = np.repeat(np.arange(len(sizes)), [len(s) for s in sizes])  # of each chunk's shard in `_indices`
        self._first = np.searchsorted(self._place, np.arange(len(sizes)))  # chunk of each shard
        self._names: tuple[str, ...] = ()
        self._key = content_key(label, self.digest)

    def _agreed(self) -> tuple[str, ...]:
        """Return the columns that all shards have."""
        first = self._indices[0].columns
        common = set(first).intersection(*(index.columns for index in self._indices))
        differing = [name for index in self._indices for name in index.columns if name not in common]
        if self._shards.declared and differing:
            raise UserError(
                f"{self.lacking(differing[0])} has no column `{differing[0]}`: write the same columns to all shards, "
                "or list those that differ as a source of their own"
            )
        return tuple(name for name in first if name in common)

    def lacking(self, name: str) -> str:
        """Name the first shard without the column, and one that has it."""
        having = [self._shards.label(n) for n, i in zip(self._numbers, self._indices, strict=True) if name in i.columns]
        if not having:
            return super().lacking(name)
        without = next(
            self._shards.label(n) for n, i in zip(self._numbers, self._indices, strict=True) if name not in i.columns
        )
        return f"`{without}` (unlike `{having[0]}`)"

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def chunks(self) -> Ints:
        """(C,) rows of each chunk."""
        return self._sizes

    @cached_property
    def digest(self) -> str:
        """Hash of the shards' digests: of their bytes, or of what stands for them (see the formats)."""
        return hashlib.sha256(repr([index.digest for index in self._indices]).encode()).hexdigest()

    def column(self, name: str) -> Sequence[Any]:
        """Return a view of the column."""
        return StreamColumn(self, name)

    def _locate(self, chunk: int) -> tuple[int, int]:
        """Return the place of a chunk's shard in `_indices`, and the chunk's number in the shard."""
        place = int(self._place[chunk])
        return place, chunk - int(self._first[place])

    def _request(self, chunk: int, names: tuple[str, ...]) -> tuple[Key, int, Read]:
        place, number = self._locate(chunk)
        read = partial(self._shards.read, self._numbers[place], self._indices[place], number, names)
        return (self._key, chunk, names if self._shards.by_column else ()), int(self._sizes[chunk]), read

    def take(self, names: Sequence[str], rows: Ints) -> dict[str, list[Any]]:
        """Return the values of these rows; the chunks they are in are read, or have been. Raises UserError."""
        self._names = wanted = tuple(names)
        if not len(rows):
            return {name: [] for name in wanted}

        def fetch(chunk: int, inside: Ints) -> dict[str, list[Any]]:
            key, size, read = self._request(chunk, wanted)
            return _chunks.get(key, size, len(inside), read).values(wanted, inside)

        return gather(self._starts, rows, fetch)

    def prefetch(self, rows: Ints) -> None:
        """Have the chunks of these rows read ahead, with the columns that `take` was last asked for."""
        if not self._names or not len(rows):
            return
        chunks = np.searchsorted(self._starts, rows, "right") - 1
        _, first = np.unique(chunks, return_index=True)
        _chunks.want([self._request(int(chunk), self._names) for chunk in chunks[np.sort(first)][:WANTED]])

    def name(self, index: int) -> str:
        """Say which shard, and where in it."""
        chunk = int(np.searchsorted(self._starts, index, "right")) - 1
        place, number = self._locate(chunk)
        row = index - int(self._starts[chunk])
        first = int(self._starts[chunk] - self._starts[self._first[place]])
        key, size, read = self._request(chunk, self._names)
        content = partial(_chunks.get, key, size, 0, read)
        shard = self._numbers[place]
        return f"{self._shards.label(shard)} {self._shards.row_name(self._indices[place], number, row, first, content)}"

    def folder_of(self, index: int) -> str:
        """Return the folder of the row's shard."""
        chunk = int(np.searchsorted(self._starts, index, "right")) - 1
        return self._shards.folder(self._numbers[self._place[chunk]])


def _indices(shards: Shards) -> list[Index]:
    """Index all shards, or take what was kept of them."""

    def one(shard: int) -> Index:
        key = content_key("index", _FORMAT, *shards.identity(shard))
        return _load(cached("shard-indices", key, lambda folder: _save(folder, shards.index(shard))))

    pool = ThreadPoolExecutor(_INDEXING)
    try:
        return list(pool.map(one, range(len(shards))))  # in order, so that the first fault is the one told
    finally:
        pool.shutdown(cancel_futures=True)


def _save(folder: Path, index: Index) -> None:
    np.savez(folder / "chunks.npz", rows=index.rows, places=index.places)
    (folder / "index.json").write_text(json.dumps([index.columns, index.digest, index.version]))


def _load(folder: Path) -> Index:
    columns, digest, version = json.loads((folder / "index.json").read_text())
    with np.load(folder / "chunks.npz", allow_pickle=False) as arrays:
        return Index(tuple(columns), arrays["rows"], arrays["places"], digest, Version(*version))
