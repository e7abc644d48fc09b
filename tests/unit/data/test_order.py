import numpy as np
import pytest
from scipy import stats

from scaletrain.data.order import Order, key_of, permutation, permute, seeds


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
