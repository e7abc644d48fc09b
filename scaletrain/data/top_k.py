"""A teacher's most likely tokens at every learned place of a data set: written to the cache once, in parts, and read.

Shapes: K learned places of a batch, k tokens of each, n places of one example.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from scaletrain.data.cache import content_key
from scaletrain.data.dataset import Dataset, Example
from scaletrain.data.kept import Arrays, Kept
from scaletrain.data.order import Int
from scaletrain.data.text import LanguageDataset

CALLS = 16
"""Batches of a part. Each part has as many: processes that hold a teacher together call it equally often."""


class TopK:
    """What is kept of a teacher for one data set.

    ids: (places, k) uint16 or int32. logs: (places, k or k + 1) float16, logarithms of their probabilities, and of all
    others together. starts: (examples + 1,) int64, where the places of each example begin.

    about: what beside the examples determines it: the teacher, the temperature, how many tokens. batch: examples that
    the teacher is given at a time.
    """

    def __init__(self, dataset: LanguageDataset, batch: int, *about: object):
        self.dataset, self.batch = dataset, batch
        self._kept = Kept("top_k", ("ids", "logs", "starts"), _content(dataset), batch, *about)

    @property
    def parts(self) -> int:
        """How many there are."""
        return -(-len(self.dataset) // self._size)

    @property
    def _size(self) -> int:
        return CALLS * self.batch

    def missing(self) -> list[int]:
        """Return the numbers of the parts that are not written yet."""
        return self._kept.missing(self.parts)

    def calls(self, part: int) -> list[range]:
        """Return the examples of each batch of a part; at the end of the data, some have none."""
        begin, end = part * self._size, min((part + 1) * self._size, len(self.dataset))
        starts = range(begin, begin + self._size, self.batch)
        return [range(min(start, end), min(start + self.batch, end)) for start in starts]

    def write(self, part: int, found: Sequence[tuple[torch.Tensor, torch.Tensor]], lengths: Sequence[int]) -> None:
        """Write a part, whole or not at all. found: (K, k) tokens and (K, k or k + 1) logarithms of each batch.

        lengths: learned places of each example.
        """
        ids, logs = (torch.cat(column).cpu().numpy() for column in zip(*found, strict=True))
        arrays: Arrays = {
            "ids": ids.astype(np.uint16 if ids.max(initial=0) < 1 << 16 else np.int32),
            "logs": logs.astype(np.float16),
            "starts": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        }
        self._kept.write(part, arrays)

    def of(self, example: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.float16]]:
        """Return tokens (n, k) and logarithms (n, k or k + 1) at the learned places of an example."""
        number, own = divmod(example, self._size)
        part = self._kept.part(number)
        span = slice(*part["starts"][own : own + 2].tolist())
        return part["ids"][span], part["logs"][span]


class WithTopK(Dataset):
    """A language model's examples with what a teacher says of each, which must have been written when one is taken.

    Batches: teacher_ids (K, k) and teacher_logs (K, k or k + 1) float32, normalised, beside those of the data set.
    """

    def __init__(self, dataset: LanguageDataset, kept: TopK):
        self.dataset, self.kept = dataset, kept
        self.decodes, self.tokens_per_example = dataset.decodes, dataset.tokens_per_example

    def __len__(self) -> int:
        return len(self.dataset)

    def lengths(self, indices: Int) -> Int | None:
        """Return those of the data set."""
        return self.dataset.lengths(indices)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Return the example, with what the teacher says of it."""
        ids, logs = self.kept.of(index)
        return {**self.dataset.example(index, rng), "teacher_ids": ids, "teacher_logs": logs}

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Collate as the data set does: its learned places stand example by example, too."""
        ids = np.concatenate([example["teacher_ids"] for example in examples]).astype(np.int64)
        logs = torch.from_numpy(np.concatenate([example["teacher_logs"] for example in examples])).float()
        batch = self.dataset.collate(examples)
        return {**batch, "teacher_ids": torch.from_numpy(ids), "teacher_logs": logs.log_softmax(-1)}

    def name(self, index: int) -> str:
        """Say which rows these are."""
        return self.dataset.name(index)


def _content(dataset: LanguageDataset) -> str:
    """Hash the examples: all tokens, what is learned of them, and how they are cut and packed."""
    digest = hashlib.sha256()
    for array in (*dataset.tokens, *dataset.layout()):
        if array is not None:
            digest.update(np.ascontiguousarray(array).data)
    shapes = type(dataset).__name__, len(dataset), dataset.seq_len, dataset.packed
    return content_key(digest.hexdigest(), *shapes)
