"""The order of samples, and the seeds of their randomness, as pure functions of position.

Nothing here has state: the n-th sample of a run is computed from (key, n), in constant memory, so a resume seeks
instead of replaying, and every process, however many there are, computes the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Int = npt.NDArray[np.int64]
_ROUNDS = 6
_AT_ONCE = 1 << 16


def key_of(*parts: object) -> int:
    """Hash anything printable to 63 bits: the key of a permutation or the seed of a generator."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scramble 64 bits (the finaliser of SplitMix64; Steele et al., 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: Int, size: int, key: int) -> Int:
    """Apply a pseudo-random permutation of 0..size-1 to each of `index`, in O(1) memory for any size.

    A balanced Feistel network over the next power of four, walked along its cycle until it lands inside (Black and
    Rogaway, 2002, "Ciphers with arbitrary finite domains").
    """
    bits = max(3, ((size - 1).bit_length() + 1) // 2)  # fewer than 3 reach too few permutations
    half, mask = np.uint64(bits), np.uint64((1 << bits) - 1)
    with np.errstate(over="ignore"):
        rounds = _mix(np.uint64(key) + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        out = index.astype(np.uint64)
        todo = np.arange(index.size)
        while todo.size:
            left, right = out[todo] >> half, out[todo] & mask
            for salt in rounds:
                left, right = right, left ^ (_mix(right + salt) & mask)
            out[todo] = left << half | right
            todo = todo[out[todo] >= size]
    return out.astype(np.int64)


def permutation(size: int, key: int) -> Int:
    """Return the whole permutation of 0..size-1 under `key`."""
    out = np.empty(size, np.int64)
    for start in range(0, size, _AT_ONCE):  # so that what `permute` needs meanwhile is small
        out[start : start + _AT_ONCE] = permute(np.arange(start, min(start + _AT_ONCE, size)), size, key)
    return out


def seeds(position: Int, key: int) -> npt.NDArray[np.uint64]:
    """Return a seed for the randomness of the sample at each position (augmentation, corruption)."""
    with np.errstate(over="ignore"):
        return _mix(_mix(position.astype(np.uint64) + np.uint64(1)) ^ np.uint64(key))


def groups(values: Int) -> Iterator[tuple[int, Any]]:
    """Yield each distinct value, and an index of the places where it stands. One value is the common case, and fast."""
    if len(values) and (values == values[0]).all():
        yield int(values[0]), slice(None)
        return
    for value in np.unique(values).tolist():
        yield value, values == value


class Order:
    """The endless sequence of a data set's examples, each epoch in an order of its own.

    size: examples in an epoch. seed: anything printable, such as (seed, stage).
    """

    ahead, chunk = 0, 1
    _TABLE = 1 << 20
    """An epoch of up to so many examples is permuted once and kept (8 MiB at most): a look-up instead of arithmetic."""

    def __init__(self, size: int, *seed: object):
        self.size = size
        self._seed = seed
        self._epoch, self._table = -1, np.empty(0, np.int64)

    def __call__(self, position: Int) -> Int:
        """Return the example number at each position of the endless sequence (0-based)."""
        epoch, place = np.divmod(position, self.size)
        out = np.empty_like(place)
        for number, chosen in groups(epoch):
            out[chosen] = self._in_epoch(number, place[chosen])
        return out

    def _in_epoch(self, epoch: int, place: Int) -> Int:
        key = key_of(*self._seed, "order", epoch)
        if self.size > self._TABLE:
            return permute(place, self.size, key)
        if self._epoch != epoch:
            self._epoch, self._table = epoch, permutation(self.size, key)
        return self._table[place]


@dataclass(frozen=True)
class Lanes:
    """How the endless sequence of positions falls into lanes, one for each micro-batch of a global batch.

    Lane m is what micro-batch m takes, window after window: its place k stands at position
    (k // width) · count · width + m · width + k % width. Lanes depend on the recipe alone; a process takes every
    world-th lane, so what only depends on its own lane need not be read by the others.
    """

    count: int
    """Micro-batches of a global batch."""
    width: int
    """Examples of a micro-batch."""

    def split(self, position: Int) -> tuple[Int, Int]:
        """Return (lane, place in the lane) of each position."""
        micro, offset = np.divmod(position, self.width)
        window, lane = np.divmod(micro, self.count)
        return lane, window * self.width + offset

    def position(self, lane: int | Int, place: Int) -> Int:
        """Return the position of each place of a lane."""
        window, offset = np.divmod(place, self.width)
        return np.asarray((window * self.count + lane) * self.width + offset, np.int64)


class Ordering(Protocol):
    """What gives the example number at each position of the endless sequence.

    ahead: so many places of a lane further on, the examples show what will have to be read before long; 0 for data that
    are not read from chunks. chunk: about how many rows a chunk has.
    """

    ahead: int
    chunk: int

    def __call__(self, position: Int) -> Int:
        """Return example numbers for 0-based positions."""
        ...


class LocalOrder:
    """An order that reads from few places at a time, for rows that are kept in chunks.

    In each epoch the chunks are put one after the other in an order of their own, the sequence is cut into a range of
    equal length (±1) for each lane, and a lane shuffles its range in windows. So every lane reads on from chunk to
    chunk, each row comes once in an epoch, and the row at a position is still computed, not looked for.

    chunks: (C,) rows of each. shuffle: rows that are mixed with one another, in all lanes together. seed: as in Order.
    """

    _TABLE = 1 << 20
    """Windows of up to so many rows in all lanes are permuted once and kept (12 MiB at most), as in Order."""

    def __init__(self, chunks: Int, lanes: Lanes, shuffle: int, *seed: object):
        self.lanes, self._seed = lanes, seed
        self._sizes = np.asarray(chunks, np.int64)
        self._first = np.concatenate([[0], self._sizes.cumsum()])
        self.size = int(self._first[-1])
        self.ahead = self.window = max(1, shuffle // lanes.count)
        self.chunk = max(1, self.size // max(1, len(self._sizes)))
        self._bounds = np.arange(lanes.count + 1) * self.size // lanes.count
        self._tables: dict[int, tuple[Int, Int]] = {}
        self._moves: dict[int, npt.NDArray[np.int32]] = {}
        if self.size < lanes.count:
            raise ValueError(f"{self.size} rows for {lanes.count} lanes")

    def __call__(self, position: Int) -> Int:
        """Return the row number at each position of the endless sequence (0-based)."""
        lane, place = self.lanes.split(position)
        out = np.empty_like(place)
        for number, chosen in groups(lane):
            out[chosen] = self._in_lane(number, place[chosen])
        return out

    def _in_lane(self, lane: int, place: Int) -> Int:
        first, last = self._bounds[lane : lane + 2].tolist()
        epoch, offset = np.divmod(place, last - first)
        windows = -(-(last - first) // self.window)
        out = np.empty_like(place)
        for number, chosen in groups(epoch * windows + offset // self.window):
            e, w = divmod(number, windows)
            begin = w * self.window
            moved = self._shuffled(e, lane, w, min(self.window, last - first - begin), offset[chosen] - begin)
            out[chosen] = self._rows(e, first + begin + moved)
        return out

    def _shuffled(self, epoch: int, lane: int, window: int, size: int, place: Int) -> Int:
        """Return where some places of a window are moved to."""
        key = key_of(*self._seed, "window", epoch, lane, window)
        if self.window * self.lanes.count > self._TABLE:
            return permute(place, size, key)
        if key not in self._moves:
            while len(self._moves) >= 3 * self.lanes.count:  # a lane reads on in one while it looks two ahead
                del self._moves[next(iter(self._moves))]
            self._moves[key] = permutation(size, key).astype(np.int32)
        return self._moves[key][place].astype(np.int64)

    def _rows(self, epoch: int, place: Int) -> Int:
        """Return the rows at some places of an epoch's sequence of chunks."""
        if epoch not in self._tables:
            chunk = permutation(len(self._sizes), key_of(*self._seed, "chunks", epoch))
            while len(self._tables) > 1:  # lanes pass from one epoch to the next at about the same time
                del self._tables[min(self._tables)]
            self._tables[epoch] = self._first[chunk], np.concatenate([[0], self._sizes[chunk].cumsum()])
        begins, starts = self._tables[epoch]
        found = np.searchsorted(starts, place, "right") - 1
        return begins[found] + place - starts[found]
