"""What frozen networks say of data, kept in the cache: arrays in parts, each written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scaletrain.data.cache import cache_root, cached, content_key
from scaletrain.data.order import Int, groups
from scaletrain.errors import UserError

Arrays = dict[str, npt.NDArray[Any]]
CALLS = 16
"""Batches of a part at most. Each part has as many: processes that hold a network together call it equally often."""


class Kept:
    """Parts 0, 1, ... of what is determined by `about`, and so is found again whatever run asks.

    kind: a folder of the cache. names: of the arrays that each part has.
    """

    def __init__(self, kind: str, names: tuple[str, ...], *about: object):
        self._kind, self._names = f"{kind}/{content_key(*about)}", names
        self._open: dict[int, Arrays] = {}

    def missing(self, parts: int) -> list[int]:
        """Return the numbers of the parts, of so many, that are not written yet."""
        folder = cache_root() / self._kind
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        return [number for number in range(parts) if _name(number) not in there]

    def write(self, part: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Write a part, whole or not at all. Raises UserError when the cache cannot be written."""

        def fill(folder: Path) -> None:
            for name in self._names:
                np.save(folder / f"{name}.npy", arrays[name])

        cached(self._kind, _name(part), fill)

    def part(self, number: int) -> Arrays:
        """Return the arrays of a part, mapped into memory. Raises UserError when they are not there."""
        if number not in self._open:
            folder = cache_root() / self._kind / _name(number)
            if not folder.is_dir():
                raise UserError(
                    f"{folder} is not there: what frozen networks say of these data is written when a run starts, and "
                    "was removed since, or they are other data. Start the run again (scaletrain run)."
                )
            try:
                self._open[number] = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in self._names}
            except (OSError, ValueError) as error:
                raise UserError(
                    f"{folder} is damaged ({error}): remove it, and start the run again (scaletrain run), which writes "
                    "it anew."
                ) from None
        return self._open[number]


def _name(part: int) -> str:
    return f"{part:06d}"


_PRETENDED: ContextVar[bool] = ContextVar("pretended", default=False)


@contextmanager
def pretended() -> Iterator[None]:
    """Have what is made by the batch be zeros, whether or not it is there: for plans, which ask for shapes alone."""
    token = _PRETENDED.set(True)
    try:
        yield
    finally:
        _PRETENDED.reset(token)


class InBatches:
    """An array (N, ...) of what a network makes of rows 0 to N − 1 by the batch, kept in parts of some batches.

    name: of the array in each part of `kept`.
    """

    def __init__(self, kept: Kept, name: str, count: int, batch: int):
        self.count = count
        self._kept, self._name, self._batch = kept, name, batch
        self._size = min(CALLS, -(-count // batch)) * batch

    @property
    def parts(self) -> int:
        """How many there are."""
        return -(-self.count // self._size)

    def missing(self) -> list[int]:
        """Return the numbers of the parts that are not written yet."""
        return self._kept.missing(self.parts)

    def calls(self, part: int) -> Iterator[Int]:
        """Yield the numbers (B,) of each batch of a part; at the end, what is beyond begins anew and is not kept."""
        for begin in range(part * self._size, (part + 1) * self._size, self._batch):
            yield np.arange(begin, begin + self._batch) % self.count

    def keep(self, part: int, made: npt.NDArray[Any]) -> None:
        """Write what was made of all batches of a part."""
        self._kept.write(part, {self._name: made[: self.count - part * self._size]})

    def kept(self, numbers: Int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """Return what was made of rows (B, *shape). Raises UserError when it is not there."""
        if _PRETENDED.get():
            return np.zeros((len(numbers), *shape), np.float32)
        part, own = np.divmod(numbers, self._size)
        made = np.empty((len(numbers), *shape), np.float32)
        for number, chosen in groups(part):
            made[chosen] = self._kept.part(number)[self._name][own[chosen]]
        return made
