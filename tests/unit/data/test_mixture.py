from collections.abc import Sequence

import numpy as np
import pytest
import torch

from scaletrain.config import DataSpec
from scaletrain.data.dataset import TensorDataset
from scaletrain.data.loader import Layout, Windows
from scaletrain.data.mixture import Mix, Mixture, Shares
from scaletrain.errors import UserError


def shares(*weights: float) -> Shares:
    total = sum(weights)
    return Shares((0,), (tuple(w / total for w in weights),))


def test_every_stretch_has_each_source_in_exact_proportion() -> None:
    mix = Mix(shares(5, 3, 2), 8, "seed")
    for lane in range(3):
        source, number = mix(lane, np.arange(10_000))
        for s, part in enumerate((0.5, 0.3, 0.2)):
            own = number[source == s]
            assert np.array_equal(own, np.arange(len(own)))  # one after the other
            for stop in range(500, 10_001, 500):  # a block of 256 is drawn without replacement
                assert abs((source[:stop] == s).sum() - stop * part) < 5 * 256**0.5 / 2
            assert abs((source == s).sum() - 10_000 * part) < 5 * 256**0.5 / 2


def test_a_place_is_computed_without_those_before() -> None:
    whole = Mix(shares(1, 2), 4, 0)(1, np.arange(5000))
    for places in (np.array([4999]), np.array([3, 2000, 1]), np.arange(255, 260)):
        found = Mix(shares(1, 2), 4, 0)(1, places)
        assert np.array_equal(found[0], whole[0][places])
        assert np.array_equal(found[1], whole[1][places])


def test_weights_change_by_step() -> None:
    made = Shares.of([{0: 1.0, 100: 0.0}, {0: 1.0, 50: 3.0}], [1, 1], lambda step: 2 * step)
    assert made.windows == (0, 100, 200)
    assert made.parts == ((0.5, 0.5), (0.25, 0.75), (0.0, 1.0))
    source, number = Mix(made, 4, "s")(0, np.arange(4 * 300))
    first, second, third = source[:256], source[512:768], source[1100:]
    assert (first == 0).sum() == pytest.approx(128, abs=3)
    assert (second == 0).sum() == pytest.approx(64, abs=3)
    assert (third == 0).sum() == 0
    assert np.array_equal(number[source == 1], np.arange((source == 1).sum()))


@pytest.mark.parametrize("width", [1, 8])
def test_a_weight_holds_from_its_step_on_and_not_before(width: int) -> None:
    """Steps of few examples, of which a block would hold many."""
    steps = 300
    made = Shares.of([{0: 1.0, 100: 0.0}, {0: 0.0, 100: 1.0, 103: 2.0}, {0: 0.0, 103: 1.0}], [1, 1, 1], lambda s: s)
    for lane in range(5):
        source, number = Mix(made, width, "s")(lane, np.arange(steps * width))
        assert (source[: 100 * width] == 0).all()
        assert (source[100 * width : 103 * width] == 1).all()
        assert (source[103 * width :] == 2).sum() == pytest.approx(197 * width / 3, abs=20)
        for s in range(3):
            assert np.array_equal(number[source == s], np.arange((source == s).sum()))
        assert np.array_equal(Mix(made, width, "s")(lane, np.array([101 * width]))[0], source[[101 * width]])


def test_weights_of_tokens_are_divided_by_the_tokens_of_an_example() -> None:
    made = Shares.of([{0: 1.0}, {0: 1.0}], [100.0, 300.0], lambda step: step)
    assert made.parts[0] == pytest.approx((0.75, 0.25))
    with pytest.raises(UserError, match="from step 7 on, all weights are 0"):
        Shares.of([{0: 1.0, 7: 0.0}, {0: 0.0}], [1, 1], lambda step: step)


def test_a_weight_of_data_for_evaluation_is_refused() -> None:
    with pytest.raises(ValueError, match="leave `weight` out"):
        DataSpec.model_validate({"train": "a", "eval": [{"path": "b", "weight": 3.0}]})
    for weight in (float("inf"), {0: float("inf")}):
        with pytest.raises(ValueError, match="finite"):
            DataSpec.model_validate({"train": [{"path": "a", "weight": weight}]})


def numbers(start: int, count: int) -> TensorDataset:
    return TensorDataset({"number": torch.arange(start, start + count)})


def read(world: int, windows: int, start: int = 0, sizes: Sequence[int] = (30, 50)) -> list[list[int]]:
    data = Mixture([numbers(0, sizes[0]), numbers(1000, sizes[1])], shares(3, 1), ["a", "b"])
    found: list[dict[int, list[int]]] = [{} for _ in range(windows)]
    for rank in range(world):
        loader = Windows(data, Layout(24, 2, world, rank), (0, "s"), start)
        for window in found:
            micros = next(loader)
            assert isinstance(micros, list)
            for m in micros:
                window[m.number] = m.tensors["number"].tolist()
    return [[n for number in sorted(w) for n in w[number]] for w in found]


def test_a_mixture_is_the_same_on_any_number_of_processes_and_seeks() -> None:
    one = read(1, 40)
    assert read(2, 40) == read(3, 40) == read(4, 40) == one
    assert read(2, 10, start=30) == one[30:]


def test_each_source_has_its_own_epochs() -> None:
    flat = [n for window in read(1, 100) for n in window]
    first = [n for n in flat if n < 1000]
    assert len(first) == pytest.approx(0.75 * len(flat), abs=24)
    counts = np.bincount(first, minlength=30)
    assert counts.max() - counts.min() <= 4  # 60 epochs, of which the 12 lanes are at most 2 places apart
    assert counts.sum() / 30 == pytest.approx(60, abs=1)
