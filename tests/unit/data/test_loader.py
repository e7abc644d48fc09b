from collections.abc import Sequence

import numpy as np
import pytest
import torch

from scaletrain.data.dataset import Dataset, Example, TensorDataset
from scaletrain.data.joined import Joined
from scaletrain.data.loader import Failure, Layout, Micro, Windows, passes
from scaletrain.errors import UserError


class Noisy(Dataset):
    """Number and noise of each example, so that order and randomness can be seen; example `broken` fails."""

    def __init__(self, size: int, broken: int | None = None):
        self.size, self.broken = size, broken

    def __len__(self) -> int:
        return self.size

    def example(self, index: int, rng: np.random.Generator) -> Example:
        if index == self.broken:
            raise UserError(f"row {index} is broken")
        return {"number": index, "noise": rng.standard_normal()}

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        return {k: torch.tensor([e[k] for e in examples]) for k in ("number", "noise")}


def read(world: int, micro: int, windows: int, start: int = 0, workers: int = 0) -> list[list[tuple[int, float]]]:
    """Return for each window its samples in the order of the micro-batches' numbers, over all ranks."""
    found: list[dict[int, list[tuple[int, float]]]] = [{} for _ in range(windows)]
    for rank in range(world):
        loader = Windows(Noisy(37), Layout(24, micro, world, rank), (0, "s"), start, workers)
        for window in found:
            for m in next(loader):
                assert tuple(m.tensors["number"].tolist()) == m.examples
                window[m.number] = list(zip(m.examples, m.tensors["noise"].tolist(), strict=True))
    return [[s for number in sorted(w) for s in w[number]] for w in found]


def test_order_and_noise_do_not_depend_on_processes_or_accumulation() -> None:
    one = read(1, 24, 4)
    assert read(1, 6, 4) == read(2, 6, 4) == read(3, 4, 4) == read(4, 2, 4) == one


def test_a_resume_seeks() -> None:
    assert read(2, 6, 2, start=3) == read(1, 24, 5)[3:]


def test_worker_processes_change_nothing() -> None:
    assert read(1, 6, 3, workers=2) == read(1, 6, 3)


def test_an_epoch_holds_each_sample_once() -> None:
    samples = [number for window in read(2, 6, 37) for number, _ in window]
    for epoch in range(24):
        assert sorted(samples[epoch * 37 : (epoch + 1) * 37]) == list(range(37))


class Ragged(Noisy):
    """With lengths that have nothing to do with the numbers."""

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return indices * 7 % 5


def test_examples_of_a_window_are_cut_by_their_lengths() -> None:
    """The window holds the same examples with the same noise; each micro-batch, on any rank, those of like lengths."""
    for dataset, world in ((Ragged(37), 1), (Ragged(37), 3), (Joined([Ragged(20), Ragged(17)], ["a", "b"]), 3)):
        plain = Noisy(37) if isinstance(dataset, Ragged) else Joined([Noisy(20), Noisy(17)], ["a", "b"])
        whole = Windows(plain, Layout(24, 24), (0, "s"), 2)
        ranks = [Windows(dataset, Layout(24, 4, world, rank), (0, "s"), 2) for rank in range(world)]
        for _ in range(3):
            (expected,) = next(whole)
            cut = sorted((micro for rank in ranks for micro in next(rank)), key=lambda micro: micro.number)
            assert [micro.number for micro in cut] == list(range(6))
            lengths = [int(dataset.lengths(np.array([i]))[0]) for micro in cut for i in micro.examples]
            assert lengths == sorted(lengths, reverse=True)
            drawn = {i: x for m in cut for i, x in zip(m.examples, m.tensors["noise"].tolist(), strict=True)}
            assert drawn == dict(zip(expected.examples, expected.tensors["noise"].tolist(), strict=True))


def test_a_pass_takes_the_longest_first() -> None:
    found = [i for micro in passes(Ragged(7), 2) for i in micro.examples]
    assert found == [2, 4, 1, 6, 3, 0, 5]  # of lengths 4 3 2 2 1 0 0


def test_a_row_that_cannot_be_read_is_told() -> None:
    loader = Windows(Noisy(8, broken=3), Layout(8, 8), (0,))
    assert next(loader) == Failure("row 3 is broken")


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.global_batch=10"):
        Layout(10, 4)
    with pytest.raises(UserError, match="multiple of 3"):
        Layout.derive(10, None, 3, 0)


def test_a_pass_takes_each_example_once_on_any_number_of_ranks() -> None:
    data = TensorDataset({"x": torch.arange(23)})
    for world in (1, 2, 3):
        seen = [m.tensors["x"] for rank in range(world) for m in passes(data, 5, world, rank)]
        assert sorted(torch.cat(seen).tolist()) == list(range(23))


def test_a_gpu_gets_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """DataLoader's thread pins what it knows, or what has a method for it."""
    from torch.utils.data._utils.pin_memory import pin_memory

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor + 1)
    pinned = pin_memory(Micro(3, 1, (7,), {"x": torch.zeros(2)}))
    assert (pinned.window, pinned.number, pinned.examples) == (3, 1, (7,))
    assert pinned.tensors["x"].tolist() == [1, 1]
