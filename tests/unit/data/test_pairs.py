"""Noise as a function of numbers, and samples kept in parts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor

from scaletrain.data.cache import cache_root
from scaletrain.data.kept import CALLS, pretended
from scaletrain.data.pairs import Pairs, WithPairs, drawn_labels, drawn_scales, normal
from scaletrain.data.points import draws
from scaletrain.data.sources import Rows
from scaletrain.data.tables import ArrayTable
from scaletrain.errors import UserError


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALETRAIN_CACHE", str(tmp_path / "cache"))


def pairs_of(count: int = 75, batch: int = 2, **options: object) -> Pairs:
    return Pairs(count, (2,), 5, {"label": torch.arange(count) % 3}, batch, "float32", *options.values())


def made(given: dict[str, Tensor]) -> Tensor:
    return 3 * given["noise"] + given["label"][:, None]


def fill(pairs: Pairs) -> None:
    for part in pairs.missing():
        pairs.write(part, made)


def test_noise_is_normal_and_independent() -> None:
    values = normal(np.arange(20_000), (2, 3), key=7).flatten(1).numpy()
    assert values.dtype == np.float32
    for column in values.T:
        assert kstest(column, "norm").pvalue > 1e-3
    other = normal(np.arange(20_000), (2, 3), key=8).flatten(1).numpy()
    along = np.concatenate([values[1:], values[:-1], other[1:]], 1)  # its own values, the one before, another key
    correlations = np.corrcoef(along.T) - np.eye(18)
    assert np.abs(correlations).max() < 5 / np.sqrt(20_000)


def test_noise_and_label_are_functions_of_the_number_alone() -> None:
    whole = normal(np.arange(100), (4,), key=1)
    numbers = np.array([99, 3, 3, 50])
    assert torch.equal(normal(numbers, (4,), key=1), whole[numbers])
    assert not torch.equal(normal(numbers, (4,), key=2), whole[numbers])
    labels = drawn_labels(9000, 3, key=1)
    assert np.array_equal(drawn_labels(100, 3, key=1), labels[:100])
    assert np.bincount(labels).tolist() == pytest.approx([3000] * 3, abs=200)
    scales = drawn_scales(9000, 1.0, 4.0, key=1)
    assert np.array_equal(drawn_scales(100, 1.0, 4.0, key=1), scales[:100])
    assert kstest(scales, "uniform", args=(1.0, 3.0)).pvalue > 1e-3


@pytest.mark.parametrize("count", [1, 31, 32, 75])
def test_what_is_written_is_read_for_each_number(count: int) -> None:
    pairs = pairs_of(count)
    assert pairs.parts == -(-count // (2 * CALLS))
    assert pairs.missing() == list(range(pairs.parts))
    fill(pairs)
    assert pairs.missing() == []
    numbers = np.random.default_rng(0).integers(0, count, 40)
    found = pairs_of(count).take(numbers)  # by another process
    assert torch.equal(found["label"], torch.from_numpy(numbers % 3))
    assert torch.equal(found["noise"], normal(numbers, (2,), 5))
    assert torch.equal(found["made"], made(found))


def test_each_part_asks_the_teacher_as_often() -> None:
    pairs = pairs_of(75)
    assert [len(list(pairs.calls(part))) for part in range(pairs.parts)] == [CALLS] * 3
    assert all(len(numbers) == 2 for part in range(3) for numbers in pairs.calls(part))
    assert len(list(pairs_of(5).calls(0))) == 3  # and no more often than there is something to ask


def test_examples_have_the_pair_of_their_number() -> None:
    pairs = pairs_of(10)
    fill(pairs)
    dataset = WithPairs(draws(Rows([ArrayTable("noise", {"draw": np.arange(10)})])), pairs)
    batch = dataset.batch([4, 9], np.zeros(2, np.uint64))
    one_by_one = dataset.collate([dataset.example(i, np.random.default_rng(0)) for i in (4, 9)])
    for found in (batch, one_by_one):
        assert found["draw"].tolist() == [4, 9]
        assert torch.equal(found["made"], made(pairs.given(np.array([4, 9]))))


def test_other_samples_have_another_key() -> None:
    fill(pairs_of(10))
    assert not pairs_of(10).missing()
    assert pairs_of(11).missing()
    assert pairs_of(10, batch=5).missing()
    assert pairs_of(10, teacher="another").missing()


def test_a_part_is_written_whole_or_not_at_all() -> None:
    pairs, calls = pairs_of(75), 0

    def breaks(given: dict[str, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > CALLS + 3:
            raise KeyboardInterrupt
        return made(given)

    pairs.write(0, breaks)
    with pytest.raises(KeyboardInterrupt):
        pairs.write(1, breaks)
    assert pairs_of(75).missing() == [1, 2]


def test_what_was_removed_or_damaged_since_is_refused() -> None:
    pairs = pairs_of(75)
    fill(pairs)
    folders = sorted(path.parent for path in cache_root().rglob("made.npy"))
    assert len(folders) == 3
    file = folders[0] / "made.npy"
    file.write_bytes(file.read_bytes()[:150])
    with pytest.raises(UserError, match=r"000000 is damaged .*remove it, and start the run again"):
        pairs.take(np.array([3]))
    file.unlink()
    with pytest.raises(UserError, match=r"000000 is damaged .*No such file"):
        pairs.take(np.array([3]))
    shutil.rmtree(folders[1])
    with pytest.raises(UserError, match=r"000001 is not there: .*was removed since.* Start the run again"):
        pairs.take(np.array([33]))
    pairs.take(np.array([74]))


def test_half_precision_is_kept_in_half_the_space() -> None:
    sizes: list[int] = []
    kinds: tuple[Literal["float32"], Literal["float16"]] = ("float32", "float16")
    for stored in kinds:
        pairs = Pairs(4000, (8,), 5, {}, 500, stored, "x")
        for part in pairs.missing():
            pairs.write(part, lambda given: 3 * given["noise"])
        found = pairs.take(np.arange(100))
        torch.testing.assert_close(found["made"], 3 * found["noise"], rtol=1e-3, atol=1e-3)
        assert found["made"].dtype == torch.float32
        sizes.append(sum(path.stat().st_size for path in cache_root().rglob("made.npy")) - sum(sizes))
    assert sizes[1] < 0.52 * sizes[0]


def test_for_plans_what_is_not_made_is_zeros() -> None:
    pairs = pairs_of()
    with pretended():
        found = pairs.take(np.array([3, 70]))
    assert not found["made"].any()
    assert found["made"].shape == found["noise"].shape
    with pytest.raises(UserError, match="is not there"):
        pairs.take(np.array([3]))
