"""Packing against the textbook's loop over samples."""

import numpy as np
import pytest

from scaletrain.data.packing import best_fit_decreasing, positions


def textbook_rooms(lengths: list[int], capacity: int) -> list[int]:
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [(room, i) for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting)[1]] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@pytest.mark.parametrize("seed", range(20))
def test_same_packs_as_the_textbook(seed: int) -> None:
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(3, 200))
    lengths = rng.integers(1, capacity + 1, size=int(rng.integers(1, 400)))
    if seed % 2:
        lengths = np.minimum(lengths, np.maximum(1, rng.geometric(0.1, size=len(lengths)))).astype(np.int64)
    packs = best_fit_decreasing(lengths, capacity)
    assert sorted(packs.order.tolist()) == list(range(len(lengths)))  # every sample once
    filled = np.add.reduceat(lengths[packs.order], packs.starts[:-1])
    assert packs.starts[-1] == len(lengths)
    assert (np.diff(packs.starts) > 0).all()
    assert sorted((capacity - filled).tolist()) == textbook_rooms(lengths.tolist(), capacity)


def test_deterministic_and_empty() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, size=1000)
    first, second = best_fit_decreasing(lengths, 64), best_fit_decreasing(lengths.copy(), 64)
    assert (first.order == second.order).all()
    assert (first.starts == second.starts).all()
    empty = best_fit_decreasing(np.empty(0, np.int64), 64)
    assert empty.order.tolist() == []
    assert empty.starts.tolist() == [0]


@pytest.mark.parametrize("length", [0, 65])
def test_refuses_lengths_that_do_not_fit(length: int) -> None:
    with pytest.raises(ValueError, match="capacity of 64"):
        best_fit_decreasing(np.array([3, length]), 64)


def test_positions_restart() -> None:
    assert positions(np.array([3, 1, 2])).tolist() == [0, 1, 2, 0, 0, 1]
