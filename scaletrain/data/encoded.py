"""What an autoencoder makes of pictures: written to the cache once, in parts, in half precision, and read.

Shapes: N pictures, B of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scaletrain.data.dataset import Dataset, Example
from scaletrain.data.images import ImageDataset
from scaletrain.data.kept import InBatches, Kept
from scaletrain.data.order import Int
from scaletrain.data.sources import Rows


@final
class Encodings(InBatches):
    """The latents of rows' pictures, of a variance of about 1.

    shape: of a latent. pictures: opens the rows' pictures. batch: how many are encoded at a time. about: what beside
    the rows determines the latents.
    """

    def __init__(
        self, rows: Rows, shape: tuple[int, ...], pictures: Callable[[], ImageDataset], batch: int, *about: object
    ):
        self.shape, self._pictures = shape, pictures
        self._opened: ImageDataset | None = None
        kept = Kept("latents", ("latent",), rows.fingerprint, len(rows), batch, *about)
        super().__init__(kept, "latent", len(rows), batch)

    def write(self, part: int, encode: Callable[[Tensor], Tensor]) -> None:
        """Write a part, whole or not at all. encode: pictures (B, C, H, W) in [-1, 1] -> latents (B, ...)."""
        self._opened = self._opened or self._pictures()
        found = []
        for numbers in self.calls(part):
            images = self._opened.batch(numbers.tolist(), np.zeros(len(numbers), np.uint64))["image"]
            found.append(encode(images).half().cpu())
        self.keep(part, torch.cat(found).numpy())

    def take(self, numbers: Int) -> Tensor:
        """Return latents (B, ...) float32. Raises UserError when they are not there."""
        return torch.from_numpy(self.kept(numbers, self.shape))


@final
class EncodedDataset(Dataset):
    """{latent (B, ...), and `tensors`, (N, ...) each}: the latents must have been written when they are taken."""

    def __init__(self, rows: Rows, encodings: Encodings, tensors: dict[str, Tensor]):
        self._rows, self._encodings, self.tensors = rows, encodings, tensors

    def __len__(self) -> int:
        return self._encodings.count

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Return the number of the example alone."""
        return {"number": index}

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Take latents and what stands beside them, of these numbers."""
        return self._taken(np.array([example["number"] for example in examples]))

    def batch(self, indices: Sequence[int], seeds: npt.NDArray[np.uint64]) -> dict[str, Tensor]:
        """Take them at once."""
        return self._taken(np.asarray(indices))

    def _taken(self, numbers: Int) -> dict[str, Tensor]:
        rows = torch.from_numpy(numbers)
        return {"latent": self._encodings.take(numbers), **{k: v[rows] for k, v in self.tensors.items()}}

    def name(self, index: int) -> str:
        """Return the row's name."""
        return self._rows.name(index)
