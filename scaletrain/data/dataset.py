"""What stands between rows and batches: a `Dataset` knows examples by number, and how examples become a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from scaletrain.data.order import Int, Lanes, Order, Ordering

Example = dict[str, Any]


class Dataset(ABC):
    """Examples by number. Prepared once before training; everything random is drawn from the generator it is given.

    Instances are sent to worker processes: keep large arrays in numpy or torch tensors, which fork shares.
    """

    decodes: bool = False
    """Whether `example` does enough work (decoding files, augmentation) to deserve worker processes."""
    tokens_per_example: float | None = None
    """Mean number of tokens, where the word has a meaning; durations in tokens need it."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of examples in an epoch."""

    @abstractmethod
    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Return example `index`, augmented with `rng`, which is a function of the sample's position alone.

        Raises UserError that names the row when it cannot be decoded.
        """

    @abstractmethod
    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Return a batch of CPU tensors, first dimension the example."""

    def batch(self, indices: Sequence[int], seeds: npt.NDArray[np.uint64]) -> dict[str, torch.Tensor]:
        """Return the batch of these examples; `seeds` has one seed for each. Override it where one call can do all."""
        generators = [np.random.Generator(np.random.Philox(key=seed)) for seed in seeds.tolist()]
        return self.collate([self.example(i, g) for i, g in zip(indices, generators, strict=True)])

    def lengths(self, indices: Int) -> Int | None:
        """Return how long examples are, of data whose batches are padded to the longest; None where that is nothing."""
        return None

    def order(self, lanes: Lanes, shuffle: int, *seed: object) -> Ordering:
        """Return the order in which examples are trained on; `shuffle` matters where they are read from chunks."""
        return Order(len(self), *seed)

    def prefetch(self, indices: Int) -> None:  # noqa: B027 (most have nothing to prefetch)
        """Take a hint: these examples will be wanted before long."""

    def held(self, indices: Int) -> Dataset:
        """Return a data set of the same examples, of which these are wanted next: it may read them all at once."""
        return self

    def name(self, index: int) -> str:
        """Say which row an example comes from, for messages."""
        return f"example {index}"


class First(Dataset):
    """The first examples of another data set."""

    def __init__(self, dataset: Dataset, count: int):
        self.dataset, self.count = dataset, min(count, len(dataset))

    def __len__(self) -> int:
        return self.count

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Return the other's example."""
        return self.dataset.example(index, rng)

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Collate as the other does."""
        return self.dataset.collate(examples)

    def batch(self, indices: Sequence[int], seeds: npt.NDArray[np.uint64]) -> dict[str, torch.Tensor]:
        """Return the other's batch."""
        return self.dataset.batch(indices, seeds)


class TensorDataset(Dataset):
    """Examples that are already rows of equally long tensors: {name: (N, ...)}."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        lengths = {len(t) for t in tensors.values()}
        if len(lengths) != 1:
            raise ValueError(f"tensors of different lengths: { {k: len(v) for k, v in tensors.items()} }")
        self.tensors = tensors
        self._length = lengths.pop()

    def __len__(self) -> int:
        return self._length

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Return the row with this number."""
        return {name: tensor[index] for name, tensor in self.tensors.items()}

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Stack."""
        return {name: torch.stack([e[name] for e in examples]) for name in self.tensors}

    def batch(self, indices: Sequence[int], seeds: npt.NDArray[np.uint64]) -> dict[str, torch.Tensor]:
        """Take the rows at once."""
        rows = torch.as_tensor(indices)
        return {name: tensor[rows] for name, tensor in self.tensors.items()}
