"""Data sets one after the other: an example's number counts through all of them."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import PurePosixPath

import numpy as np
import torch

from scaletrain.data.dataset import Dataset, Example
from scaletrain.data.order import Int


class Joined(Dataset):
    """Data sets of one kind, each with a label."""

    def __init__(self, datasets: Sequence[Dataset], labels: Sequence[str]):
        self.datasets, self.labels = list(datasets), tuple(labels)
        self._starts = [0, *accumulate(map(len, self.datasets))]
        self.decodes = any(d.decodes for d in self.datasets)

    def __len__(self) -> int:
        return self._starts[-1]

    def lengths(self, indices: Int) -> Int | None:
        """Return those that the data sets tell, where all do."""
        found = np.empty(len(indices), np.int64)
        for number, dataset in enumerate(self.datasets):
            own = dataset.lengths(self._of(number, indices))
            if own is None:
                return None
            first, last = self._starts[number : number + 2]
            found[(indices >= first) & (indices < last)] = own
        return found

    def prefetch(self, indices: Int) -> None:
        """Tell the data sets."""
        for number, dataset in enumerate(self.datasets):
            dataset.prefetch(self._of(number, indices))

    def held(self, indices: Int) -> Dataset:
        """Let each data set hold its own."""
        found = copy.copy(self)
        found.datasets = [dataset.held(self._of(number, indices)) for number, dataset in enumerate(self.datasets)]
        return found

    def _of(self, number: int, indices: Int) -> Int:
        """Return those that belong to one data set, as it numbers them."""
        first, last = self._starts[number : number + 2]
        return indices[(indices >= first) & (indices < last)] - first

    def _locate(self, index: int) -> tuple[Dataset, int]:
        number = bisect_right(self._starts, index) - 1
        return self.datasets[number], index - self._starts[number]

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Return the example of the data set that it belongs to."""
        dataset, own = self._locate(index)
        return dataset.example(own, rng)

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Collate as the first does: all are of one kind."""
        return self.datasets[0].collate(examples)

    def name(self, index: int) -> str:
        """Return the name that its data set has for it."""
        dataset, own = self._locate(index)
        return dataset.name(own)


def parts_of(dataset: Dataset) -> Mapping[str, Dataset]:
    """Return the data sets that one is made of, by label; itself, without one, where it is made of none."""
    if isinstance(dataset, Joined):
        return dict(zip(dataset.labels, dataset.datasets, strict=True))
    return {"": dataset}


def short_names(paths: Sequence[str]) -> list[str]:
    """Return the stem of each path, with as many of its folders as tell it from others, or else its number.

    `a/dev.jsonl`, `b/dev.jsonl`, `test.csv` are a/dev, b/dev and test.
    """
    parts = [PurePosixPath(path.replace("\\", "/").partition("://")[2] or path).parts for path in paths]
    stems = [(*p[:-1], PurePosixPath(p[-1]).stem) if p else ("",) for p in parts]
    names = [stem[-1] for stem in stems]
    for depth in range(2, max(map(len, stems), default=0) + 1):
        seen = Counter(names)
        names = ["/".join(stem[-depth:]) if seen[name] > 1 else name for name, stem in zip(names, stems, strict=True)]
    seen, found = Counter(names), Counter[str]()
    out = []
    for name in names:
        found[name] += 1
        out.append(f"{name}-{found[name]}" if seen[name] > 1 else name)
    return out
