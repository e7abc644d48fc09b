"""Pairs of noise and what a teacher makes of it: its samples are written to the cache once, in parts, and read.

Noise is not kept: it is a function of the pair's number; nor is what the teacher is told. Shapes: N pairs, B of a
batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scaletrain.data.dataset import Dataset, Example
from scaletrain.data.kept import InBatches, Kept
from scaletrain.data.order import Int, key_of, seeds

Labels = npt.NDArray[np.int64]


def normal(numbers: Int, shape: tuple[int, ...], key: int) -> Tensor:
    """Return N(0, I) noise (B, *shape) float32 for numbers (B,): a function of each number and the key alone."""
    size = int(np.prod(shape))
    bits = seeds((numbers[:, None] * size + np.arange(size)).ravel(), key)
    uniform = torch.from_numpy(((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)
    return torch.special.ndtri(uniform).float().view(len(numbers), *shape)


def drawn_labels(count: int, classes: int, key: int) -> Labels:
    """Return a class for each of the numbers 0 to count − 1, (N,): a function of each number and the key alone."""
    return (seeds(np.arange(count), key_of(key, "label")) % np.uint64(classes)).astype(np.int64)


def drawn_scales(count: int, low: float, high: float, key: int) -> npt.NDArray[np.float32]:
    """Return a scale of guidance for each of the numbers 0 to count − 1, (N,), evenly spread; a function like that."""
    share = (seeds(np.arange(count), key_of(key, "guidance")) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return (low + (high - low) * share).astype(np.float32)


class Pairs(InBatches):
    """What a teacher makes of the noise of numbers 0 to count − 1.

    shape: of a sample. key: of the noise. told: what the teacher is told, (N, ...) each, by name. batch: samples that
    it makes at a time. stored: how they are kept. about: what else determines them, and what `told` follows from.
    """

    def __init__(
        self,
        count: int,
        shape: tuple[int, ...],
        key: int,
        told: Mapping[str, Tensor],
        batch: int,
        stored: Literal["float32", "float16"],
        *about: object,
    ):
        self.shape, self.key, self.told, self.stored = shape, key, told, stored
        super().__init__(Kept("pairs", ("made",), shape, key, count, batch, stored, *about), "made", count, batch)

    def given(self, numbers: Int) -> dict[str, Tensor]:
        """Return what the teacher makes samples of: noise (B, ...) float32, and what it is told, (B, ...) each."""
        rows = torch.from_numpy(numbers)
        return {"noise": normal(numbers, self.shape, self.key), **{k: v[rows] for k, v in self.told.items()}}

    def write(self, part: int, made: Callable[[dict[str, Tensor]], Tensor]) -> None:
        """Write a part, whole or not at all. made: says what the teacher makes of what it is given."""
        found = torch.cat([made(self.given(numbers)).float().cpu() for numbers in self.calls(part)])
        self.keep(part, found.numpy().astype(self.stored))

    def take(self, numbers: Int) -> dict[str, Tensor]:
        """Return pairs (B,): `noise` and `made` (B, ...) float32, and what the teacher was told, (B, ...) each. Raises
        UserError when they are not there.
        """
        return {**self.given(numbers), "made": torch.from_numpy(self.kept(numbers, self.shape))}


class WithPairs(Dataset):
    """Examples with the pair of each one's number, which must have been written when it is taken."""

    def __init__(self, dataset: Dataset, pairs: Pairs):
        self.dataset, self.pairs, self.decodes = dataset, pairs, dataset.decodes

    def __len__(self) -> int:
        return len(self.dataset)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Return the example, and its number."""
        return {**self.dataset.example(index, rng), "pair": index}

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Collate as the data set does, and add the pairs."""
        return {**self.dataset.collate(examples), **self.pairs.take(np.array([e["pair"] for e in examples]))}

    def batch(self, indices: Sequence[int], seeds: npt.NDArray[np.uint64]) -> dict[str, Tensor]:
        """Return the data set's batch, and the pairs."""
        return {**self.dataset.batch(indices, seeds), **self.pairs.take(np.asarray(indices))}

    def name(self, index: int) -> str:
        """Say which row this is."""
        return self.dataset.name(index)
