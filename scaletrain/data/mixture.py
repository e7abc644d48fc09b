"""Mixtures of sources: which one stands at a place of a lane is a function of the place, in exact proportion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scaletrain.data.dataset import Dataset
from scaletrain.data.joined import Joined
from scaletrain.data.order import Int, Lanes, Ordering, key_of, permutation
from scaletrain.errors import UserError

_BLOCK = 256
_KEPT = 1024


@dataclass(frozen=True)
class Shares:
    """What part of the examples each source has, by the number of the window (one global batch)."""

    windows: tuple[int, ...]
    """The window from which each row of `parts` holds; the first is 0."""
    parts: tuple[tuple[float, ...], ...]
    """For each span of windows, the part of each source; they sum to 1."""

    @classmethod
    def of(
        cls, weights: Sequence[Mapping[int, float]], sizes: Sequence[float], window_of: Callable[[int], int]
    ) -> Shares:
        """Make shares of weights by step, each of which holds from its step on.

        sizes: tokens of an example of each source where weights are parts of the tokens, else 1 for all. window_of: a
        step's first window. Raises UserError when all weights of a step are 0.
        """
        steps = sorted({0}.union(*weights))
        rows = []
        for step in steps:
            now = np.array([w[max((s for s in w if s <= step), default=min(w))] for w in weights]) / np.array(sizes)
            if not now.sum() > 0:
                raise UserError(f"data.train: from step {step} on, all weights are 0: give one source a `weight`.")
            rows.append(tuple((now / now.sum()).tolist()))
        return cls(tuple(window_of(step) for step in steps), tuple(rows))


class Mix:
    """Which source, and which of its examples, stands at each place of a lane.

    By place t, source s has given ⌊E_s(t) + φ⌋ examples of a lane, where E_s(t) is the sum of its parts up to t, and φ,
    in [0, 1), is the lane's own: never one more or less than its part. Within a block of about `_BLOCK` places, which
    ends where the parts change, they come in an order drawn for the block. Nothing is counted from the start: each
    place is computed by itself.

    width: examples of a lane in a window. seed: as in Order.
    """

    def __init__(self, shares: Shares, width: int, *seed: object):
        self._places = np.array(shares.windows, np.int64) * width
        self._parts = np.array(shares.parts)  # (spans, S)
        lengths = np.diff(self._places)
        self._first = np.concatenate([[0], np.cumsum(-(-lengths // _BLOCK))])  # block of each span
        grown = lengths[:, None] * self._parts[:-1]
        self._before = np.concatenate([np.zeros((1, self._parts.shape[1])), grown.cumsum(0)])  # E where each begins
        self._seed = seed
        self._phases: dict[int, npt.NDArray[np.float64]] = {}
        self._blocks: dict[tuple[int, int], tuple[int, Int, Int]] = {}

    def expected(self, place: int) -> npt.NDArray[np.float64]:
        """Return E, (S,): the examples of each source by a place of a lane, before rounding."""
        span = int(np.searchsorted(self._places, place, "right")) - 1
        return self._before[span] + (place - self._places[span]) * self._parts[span]

    def _given(self, lane: int, block: int) -> Int:
        """Return how many examples each source has given before a block, (S,)."""
        if lane not in self._phases:
            keys = [key_of(*self._seed, "phase", lane, s) for s in range(self._parts.shape[1])]
            self._phases[lane] = np.array(keys) / 2**63
        span = int(np.searchsorted(self._first, block, "right")) - 1
        start = int(self._places[span] + (block - self._first[span]) * _BLOCK)
        return np.floor(self.expected(start) + self._phases[lane]).astype(np.int64)

    def __call__(self, lane: int, place: Int) -> tuple[Int, Int]:
        """Return the source at each place of a lane, and the number of that source's example in the lane."""
        source, number = np.empty_like(place), np.empty_like(place)
        todo = np.arange(len(place))
        while len(todo):
            start, sources, numbers = self._block_of(lane, int(place[todo[0]]))
            inside = (place[todo] >= start) & (place[todo] < start + len(sources))
            here = todo[inside]
            source[here], number[here] = sources[place[here] - start], numbers[place[here] - start]
            todo = todo[~inside]
        return source, number

    def _block_of(self, lane: int, place: int) -> tuple[int, Int, Int]:
        """Return the block that a place is in: its first place, and source and number at each of its places."""
        span = int(np.searchsorted(self._places, place, "right")) - 1
        block = int(self._first[span] + (place - self._places[span]) // _BLOCK)
        while self._given(lane, block).sum() > place:
            block -= 1
        while self._given(lane, block + 1).sum() <= place:
            block += 1
        if (lane, block) not in self._blocks:
            before, after = self._given(lane, block), self._given(lane, block + 1)
            counts = after - before
            sources = np.repeat(np.arange(len(counts)), counts)
            numbers = np.concatenate([np.arange(a, b) for a, b in zip(before, after, strict=True)])
            drawn = sources[permutation(len(sources), key_of(*self._seed, "block", lane, block))]
            placed = np.empty_like(numbers)
            placed[np.argsort(drawn, kind="stable")] = numbers  # those of one source in their order
            if len(self._blocks) >= _KEPT:
                self._blocks.clear()
            self._blocks[lane, block] = int(before.sum()), drawn, placed
        return self._blocks[lane, block]


class MixedOrder:
    """The order of a mixture's examples, which are numbered source by source."""

    def __init__(self, mix: Mix, orders: Sequence[Ordering], starts: Sequence[int], lanes: Lanes):
        self._mix, self._orders, self._starts, self._lanes = mix, list(orders), list(starts), lanes
        self.ahead = max(order.ahead for order in orders)
        self.chunk = min((order.chunk for order in orders if order.ahead), default=1)

    def __call__(self, position: Int) -> Int:
        """Return example numbers for 0-based positions."""
        lane, place = self._lanes.split(position)
        out = np.empty_like(place)
        for m in np.unique(lane).tolist():
            chosen = np.flatnonzero(lane == m)
            source, number = self._mix(m, place[chosen])
            for s in np.unique(source).tolist():
                own = source == s
                of_source = self._lanes.position(m, number[own])
                out[chosen[own]] = self._starts[s] + self._orders[s](of_source)
        return out


class Mixture(Joined):
    """Several data sets, of whose examples `shares` tells the parts."""

    def __init__(self, datasets: Sequence[Dataset], shares: Shares, labels: Sequence[str]):
        super().__init__(datasets, labels)
        self.shares = shares
        means = [d.tokens_per_example for d in self.datasets]
        self.tokens_per_example = None if None in means else float(np.dot(shares.parts[0], np.array(means, float)))

    def order(self, lanes: Lanes, shuffle: int, *seed: object) -> Ordering:
        """Return the order of the mixture."""
        orders = [d.order(lanes, shuffle, *seed, i) for i, d in enumerate(self.datasets)]
        return MixedOrder(Mix(self.shares, lanes.width, *seed), orders, self._starts, lanes)

    def epochs(self, window: int, lanes: Lanes) -> dict[str, float]:
        """Return how many epochs of each source have been trained on before a window, by its label."""
        given = Mix(self.shares, lanes.width).expected(window * lanes.width) * lanes.count
        sizes = map(len, self.datasets)
        return {name: round(n / size, 4) for name, n, size in zip(self.labels, given.tolist(), sizes, strict=True)}
