"""Streams: examples that exist only once rows have been read, such as packs of tokenised text, drawn lane by lane.

A lane reads its rows in windows, in the order of the rows. A window becomes a few examples; how many is not known
before. So a lane keeps a cursor: for each source, the window it stands in and how many of that window's examples it
has given. All else is a function of (seed, lane, window). A process reads the windows of its own lanes only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from scaletrain.data.dataset import Dataset, Example
from scaletrain.data.mixture import Mix, Shares
from scaletrain.data.order import Int, Lanes, Ordering, key_of, permutation
from scaletrain.data.sources import Rows
from scaletrain.errors import UserError

WINDOW = 512
"""Rows that become examples together, where a lane has so many."""

_NONE = np.empty(0, np.int64)

Cursor = list[list[int]]
"""For each source: the window that comes next, and how many of its examples have been given."""


@dataclass(frozen=True)
class Source:
    """Rows, and how a few of them become examples. tokens_per_example: the mean of a part that was looked at."""

    label: str
    rows: Rows
    expand: Callable[[Rows], Dataset]
    tokens_per_example: float | None


class Window(NamedTuple):
    """The examples of a window of rows, and the order in which they are given."""

    dataset: Dataset
    order: Int


class Drawn(NamedTuple):
    """An example and the rows that it was made of."""

    name: str
    example: Example


@dataclass(frozen=True)
class Stream:
    """One source, or several of which `shares` tells the parts."""

    sources: tuple[Source, ...]
    shares: Shares | None = None

    def __len__(self) -> int:
        """Return the number of rows: how many examples they come to is not known."""
        return sum(len(source.rows) for source in self.sources)

    @property
    def tokens_per_example(self) -> float | None:
        """Mean number of tokens, by the parts of the sources at the start."""
        means = [source.tokens_per_example for source in self.sources]
        if None in means:
            return None
        parts = self.shares.parts[0] if self.shares else (1.0,)
        return float(np.dot(parts, np.array(means, float)))

    def window_of(self, source: int, lanes: Lanes) -> int:
        """Return how many rows of a source become examples together."""
        return max(1, min(WINDOW, len(self.sources[source].rows) // lanes.count))

    def epochs(self, cursors: Collection[Cursor], lanes: Lanes) -> dict[str, float]:
        """Return how many epochs of each source some lanes have read on the average, by its label."""
        found = {}
        for i, source in enumerate(self.sources):
            windows = sum(cursor[i][0] for cursor in cursors) / max(1, len(cursors))
            found[source.label] = round(windows * self.window_of(i, lanes) * lanes.count / len(source.rows), 4)
        return found

    def name(self, example: str) -> str:
        """Say which rows an example comes from: it is called by them."""
        return example


class Reader:
    """Draws from a stream, for the lanes of one process. Windows are read ahead, one at a time, in a thread.

    shuffle: rows that are mixed, as for LocalOrder. Raises UserError when
    a row cannot be read, or when a source has nothing to learn from.
    """

    def __init__(self, stream: Stream, lanes: Lanes, shuffle: int, *seed: object):
        self.stream, self.lanes, self._seed = stream, lanes, seed
        self._orders: list[Ordering] = [s.rows.order(lanes, shuffle, *seed, i) for i, s in enumerate(stream.sources)]
        self._sizes = [stream.window_of(i, lanes) for i in range(len(stream.sources))]
        self._mix = Mix(stream.shares, lanes.width, *seed) if stream.shares else None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="windows")
        self._windows: dict[tuple[int, int], dict[int, Future[Window]]] = {}
        self._dataset: Dataset | None = None

    def start(self) -> Cursor:
        """Return the cursor of a lane that has given nothing."""
        return [[0, 0] for _ in self.stream.sources]

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def begin(self, cursors: Mapping[int, Cursor]) -> None:
        """Have the windows read in which the lanes of this process stand, and then those after them."""
        for source, origin in enumerate(self.stream.sources):
            rows = [self._rows(source, lane, cursor[source][0]) for lane, cursor in cursors.items()]
            origin.rows.prefetch(np.concatenate(rows))
        for further in (0, 1):
            for lane, cursor in cursors.items():
                for source, (window, _) in enumerate(cursor):
                    self._submit(source, lane, window + further)

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Return a batch of examples, as any of the windows does it."""
        assert self._dataset is not None
        return self._dataset.collate(examples)

    def draw(self, lane: int, place: int, count: int, cursor: Cursor) -> tuple[list[Drawn], Cursor]:
        """Return the next examples of a lane, which has given `place` before, and its cursor after them."""
        source = np.zeros(count, np.int64)
        if self._mix:
            source, _ = self._mix(lane, np.arange(place, place + count))
        cursor = [list(c) for c in cursor]
        return [self._draw(lane, s, cursor[s]) for s in source.tolist()], cursor

    def _draw(self, lane: int, source: int, at: list[int]) -> Drawn:
        """Return the next example of one source, and move `at` on."""
        rows = len(self.stream.sources[source].rows)
        begun = at[0]
        while at[1] >= len((window := self._window(source, lane, at[0])).order):
            at[:] = [at[0] + 1, 0]
            if (at[0] - begun) * self._sizes[source] > rows // self.lanes.count + 2 * self._sizes[source]:
                raise UserError(
                    f"`{self.stream.sources[source].label}`: there is nothing to learn in a whole epoch of its rows."
                )
        number = int(window.order[at[1]])
        at[1] += 1
        self._dataset = window.dataset
        key = key_of(*self._seed, "samples", source, lane, at[0], number)
        generator = np.random.Generator(np.random.Philox(key=key))
        return Drawn(window.dataset.name(number), window.dataset.example(number, generator))

    def _window(self, source: int, lane: int, number: int) -> Window:
        """Return a window, and have the one after it read meanwhile."""
        for wanted in (number, number + 1):
            self._submit(source, lane, wanted)
        known = self._windows[source, lane]
        known.pop(number - 1, None)
        return known[number].result()

    def _submit(self, source: int, lane: int, number: int) -> None:
        """Have a window read, once."""
        known = self._windows.setdefault((source, lane), {})
        if number not in known:
            known[number] = self._pool.submit(self._expand, source, lane, number)

    def _expand(self, source: int, lane: int, number: int) -> Window:
        """Read a window of rows and make its examples."""
        origin = self.stream.sources[source]
        dataset = origin.expand(origin.rows.select(self._rows(source, lane, number)))
        origin.rows.prefetch(self._rows(source, lane, number + 1))
        size = len(dataset)
        shuffled = permutation(size, key_of(*self._seed, "examples", source, lane, number)) if size else _NONE
        return Window(dataset, shuffled)

    def _rows(self, source: int, lane: int, number: int) -> Int:
        """Return the rows of a window."""
        size = self._sizes[source]
        places = np.arange(number * size, (number + 1) * size)
        return self._orders[source](self.lanes.position(lane, places))
