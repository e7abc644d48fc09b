"""Tensors by name in safetensors: read and written in pieces, so that no whole one need be in memory.

A folder may hold several files, one for each process that wrote. torch.distributed.checkpoint's safetensors storage
reads them as they are; its writer makes two more copies in memory and holds Python's lock while it does.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

WHOLE = "shard-00001-of-00001.safetensors"
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _TYPES.items()}


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a file of whole tensors. Raises OSError when the disk refuses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TensorFile(path, {name: (value.shape, value.dtype) for name, value in tensors.items()}) as file:
        for value in tensors.values():
            file.append([value])


class TensorFile:
    """A file that tensors are appended to, in the order of `kinds`: the shape and type of each, by name."""

    def __init__(self, path: Path, kinds: Mapping[str, tuple[torch.Size, torch.dtype]]):
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (shape, dtype) in kinds.items():
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._left = list(kinds.values())[::-1]
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def append(self, pieces: Iterable[torch.Tensor]) -> None:
        """Write the next tensor, by its flat pieces. Raises ValueError when it is not what was announced."""
        shape, dtype = self._left.pop()
        number = 0
        for piece in pieces:
            if piece.dtype != dtype:
                raise ValueError(f"{piece.dtype} in place of {dtype}")
            number += piece.numel()
            flat = piece.detach().cpu().reshape(-1).contiguous()
            if flat.numel():
                self._file.write(flat.view(torch.uint8).numpy().data)
        if number != shape.numel():
            raise ValueError(f"{number} elements in place of {tuple(shape)}")

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close it. Raises ValueError when tensors that were announced are not there."""
        self._file.close()
        if kind is None and self._left:
            raise ValueError(f"{len(self._left)} tensors are missing")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    path: Path
    dtype: torch.dtype
    shape: torch.Size
    begin: int
    """Byte of the file at which it begins."""

    def read(self, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Return elements `first` to `last` (by default all) of the flat tensor, on the CPU, in memory of its own."""
        last = self.shape.numel() if last is None else min(last, self.shape.numel())
        found = torch.empty(max(last - first, 0), dtype=self.dtype)
        if not found.numel():
            return found
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.begin + first * self.dtype.itemsize)
            view, at = found.view(torch.uint8).numpy().data, 0
            while at < len(view):
                got = file.readinto(view[at:])
                if not got:
                    raise OSError(f"{self.path} ends before its tensors do")
                at += got
        return found

    def whole(self) -> torch.Tensor:
        """Return all of it."""
        return self.read().view(self.shape)


def stored(folder: Path) -> dict[str, Stored]:
    """Return the tensors in the safetensors files of a folder, by name, without reading them; of the usual types.

    Raises OSError for a file that was cut.
    """
    assert sys.byteorder == "little"  # as the format is
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if path.stat().st_size < 8 + size + end:
            raise OSError(f"{path} ends before its tensors do")
        for name, entry in header.items():
            if entry["dtype"] in _TYPES:
                shape, begin = torch.Size(entry["shape"]), 8 + size + entry["data_offsets"][0]
                found[name] = Stored(path, _TYPES[entry["dtype"]], shape, begin)
    return found


class Tensors(Mapping[str, torch.Tensor]):
    """The tensors of a folder by name, each read when it is asked for."""

    def __init__(self, folder: Path):
        self._stored = stored(folder)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._stored[name].whole()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)
