import numpy as np
import pytest
from scipy import stats

from scaletrain.data.order import Lanes, LocalOrder, Order, key_of, permutation, permute, seeds


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 255, 256, 257, 1797, 4096, 70_001])
def test_is_a_permutation(size: int) -> None:
    assert np.array_equal(np.sort(permutation(size, key_of("a", size))), np.arange(size))


def test_a_part_is_computed_without_the_rest() -> None:
    places = np.array([0, 999_999_999_999, 5])
    found = permute(places, 10**12, 7)
    assert len(set(found.tolist())) == 3
    assert found.min() >= 0
    assert found.max() < 10**12
    whole = permutation(5000, 3)
    assert np.array_equal(permute(np.array([4999, 0, 17]), 5000, 3), whole[[4999, 0, 17]])


def test_is_uniform_enough() -> None:
    """Where an element lands is uniform over keys, and neighbours are not correlated."""
    landed = [int(permute(np.array([3]), 7, key_of("k", i))[0]) for i in range(7000)]
    assert stats.chisquare(np.bincount(landed, minlength=7)).pvalue > 1e-4
    order = permutation(50_000, 1).astype(float)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02


def test_every_epoch_holds_each_example_once_in_another_order() -> None:
    order = Order(100, 0, "train")
    first, second = order(np.arange(100)), order(np.arange(100, 200))
    assert sorted(first) == sorted(second) == list(range(100))
    assert not np.array_equal(first, second)
    assert np.array_equal(Order(100, 0, "train")(np.arange(95, 105)), np.concatenate([first[95:], second[:5]]))


def test_table_and_arithmetic_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Order(1000, 5)(np.arange(2500))
    monkeypatch.setattr(Order, "_TABLE", 0)
    assert np.array_equal(Order(1000, 5)(np.arange(2500)), table)


def test_seeds_depend_on_position_and_key_only() -> None:
    a = seeds(np.arange(1000), 1)
    assert len(set(a.tolist())) == 1000
    assert np.array_equal(a[500:], seeds(np.arange(500, 1000), 1))
    assert not np.array_equal(a, seeds(np.arange(1000), 2))


LANES = Lanes(count=4, width=3)


def test_lanes_cut_positions_into_micro_batches() -> None:
    position = np.arange(30)
    lane, place = LANES.split(position)
    assert lane.tolist() == [m for _ in range(3) for m in range(4) for _ in range(3)][:30]
    assert np.array_equal(LANES.position(lane, place), position)
    assert place[lane == 1].tolist() == list(range(9))[: (lane == 1).sum()]


@pytest.mark.parametrize("sizes", [[7] * 30, [1, 100, 3, 50, 2, 61], [5] * 200])
def test_local_order_takes_each_row_once_an_epoch(sizes: list[int]) -> None:
    """Of as many whole batches as an epoch holds, and of each lane's own range."""
    order = LocalOrder(np.array(sizes), LANES, 32, "seed")
    total = sum(sizes)
    seen = order(np.arange(total // 12 * 12))
    assert len(set(seen.tolist())) == len(seen)
    for lane in range(4):
        own = order(LANES.position(lane, np.arange(3 * (total // 4 + 1))))
        length = (lane + 1) * total // 4 - lane * total // 4
        first, second = own[:length], own[length : 2 * length]
        assert len(set(first.tolist())) == len(set(second.tolist())) == length
        assert not np.array_equal(first, second)
    lanes = [order(LANES.position(j, np.arange((j + 1) * total // 4 - j * total // 4))) for j in range(4)]
    assert sorted(np.concatenate(lanes).tolist()) == list(range(total))


def test_local_order_seeks_and_reads_locally() -> None:
    sizes = np.full(1000, 100)
    order = LocalOrder(sizes, LANES, 400, 3)
    whole = order(np.arange(12_000))
    assert np.array_equal(LocalOrder(sizes, LANES, 400, 3)(np.array([11_999, 0, 5000])), whole[[11_999, 0, 5000]])
    for lane in range(4):
        rows = order(LANES.position(lane, np.arange(100)))
        assert len(np.unique(rows // 100)) <= 2  # chunks
        assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.9 or len(np.unique(rows // 100)) > 1
    assert not np.array_equal(LocalOrder(sizes, LANES, 400, 4)(np.arange(50)), whole[:50])


def test_local_table_and_arithmetic_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    order = LocalOrder(np.full(60, 7), LANES, 100, 3)
    position = np.arange(3000)
    table = np.concatenate([order(p) for p in np.split(position, 250)])
    assert len(order._moves) <= 3 * LANES.count
    monkeypatch.setattr(LocalOrder, "_TABLE", 0)
    assert np.array_equal(LocalOrder(np.full(60, 7), LANES, 100, 3)(position), table)
