"""What frozen networks say of data, kept in the cache: arrays in parts, each written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scaletrain.data.cache import cache_root, cached, content_key
from scaletrain.errors import UserError

Arrays = dict[str, npt.NDArray[Any]]


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
                    f"{folder} is not there: what the teacher says of these data is written when a run starts, and was "
                    "removed since, or they are other data. Start the run again (scaletrain run)."
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
