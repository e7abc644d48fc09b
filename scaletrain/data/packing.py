"""Packing: whole samples put together into packs of a given capacity, none of which sees its neighbours.

What isolates the samples of a pack is the position, which starts from 0 in each: from position ids, and only when it
is given neither an attention mask nor a cache, transformers derives a block-diagonal causal mask
(`masking_utils.find_packed_sequence_indices`), in sliding-window layers too, where a ready 4-D mask would replace the
window. `scaletrain.objectives.causal_lm` checks on the network itself that this holds.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class Packs(NamedTuple):
    """Which samples stand in which pack: pack p holds samples `order[starts[p]:starts[p + 1]]`."""

    order: Ints
    """(N,) sample numbers, pack by pack."""
    starts: Ints
    """(P + 1,) where each pack begins."""


def best_fit_decreasing(lengths: Ints, capacity: int) -> Packs:
    """Pack samples, longest first, each into the fullest pack that still has room for it (Johnson, 1974).

    The same packs as the textbook's loop over samples, up to the choice among equally full ones, but whole groups are
    placed at once: of `c` samples of length `l`, a pack with room `r` takes ⌊r / l⌋ in succession, since it stays the
    fullest that fits. A step ends a length or empties the packs of one room, so that the work grows with the number
    of different lengths, not with the number of samples.

    lengths: (N,) from 1 to `capacity`.
    """
    if len(lengths) and not (lengths.min() >= 1 and lengths.max() <= capacity):
        raise ValueError(f"lengths from {lengths.min()} to {lengths.max()} do not fit a capacity of {capacity}")
    by_length = np.argsort(-lengths, kind="stable")
    distinct, counts = np.unique(lengths, return_counts=True)
    pack_of = np.empty(len(lengths), np.int64)  # by place in `by_length`
    rooms: defaultdict[int, deque[Ints]] = defaultdict(deque)
    open_rooms = 0  # bit r is set when a pack has room r: the smallest room that fits is the lowest bit from l on
    packs = placed = 0

    def put(ids: Ints, room: int) -> None:
        nonlocal open_rooms
        if room and len(ids):
            rooms[room].append(ids)
            open_rooms |= 1 << room

    for length, count in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            fitting = open_rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                ids = rooms[room].popleft()
                if not rooms[room]:
                    open_rooms ^= 1 << room
            else:
                room = capacity
                ids = np.arange(packs, packs - (-count // (capacity // length)))
                packs += len(ids)
            each = room // length
            used = min(len(ids), -(-count // each))
            taken = min(count, used * each)
            pack_of[placed : placed + taken] = np.repeat(ids[:used], each)[:taken]
            last = taken - (used - 1) * each  # the last pack may take fewer
            put(ids[used:], room)
            put(ids[: used - 1], room - each * length)
            put(ids[used - 1 : used], room - last * length)
            placed += taken
            count -= taken
    order = by_length[np.argsort(pack_of, kind="stable")]
    return Packs(order, np.concatenate([[0], np.bincount(pack_of, minlength=packs).cumsum()]).astype(np.int64))


def positions(lengths: Ints) -> Ints:
    """Return 0, 1, … for each length in succession: (sum of lengths,)."""
    ends = lengths.cumsum()
    return np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
