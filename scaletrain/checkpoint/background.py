"""What lets a run train on while it saves: copies in host memory, and work beside the loop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch

Key = tuple[str, str]
"""The name of a group, and a tensor's own."""
Groups = Mapping[str, Mapping[str, torch.Tensor]]
"""Tensors by the name of a group and their own."""


class Kind(Protocol):
    """What tells a tensor's shape and type."""

    @property
    def shape(self) -> torch.Size:
        """Its shape."""

    @property
    def dtype(self) -> torch.dtype:
        """Its type."""


class HostCopies:
    """Copies of tensors in host memory, in buffers that stay from one save to the next.

    On CUDA the buffers are pinned and the copying is asynchronous: `wait` before they are read.
    """

    def __init__(self) -> None:
        self._buffers: dict[Key, torch.Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def reserve(self, groups: Groups) -> None:
        """Make the buffers for some tensors, and have the system give their pages, which takes longer than copying."""
        named = {(group, name): tensor for group, tensors in groups.items() for name, tensor in tensors.items()}
        first = {id(tensor): key for key, tensor in reversed(named.items())}
        self._buffers = {
            key: torch.zeros(named[key].shape, dtype=named[key].dtype, pin_memory=named[key].is_cuda)
            for key in first.values()
        }

    def take(self, groups: Groups) -> dict[str, dict[str, torch.Tensor]]:
        """Copy all tensors. A tensor that occurs twice, as tied weights do, is one copy under both names."""
        named = {(group, name): tensor for group, tensors in groups.items() for name, tensor in tensors.items()}
        first = {id(tensor): key for key, tensor in reversed(named.items())}
        copies = self.fill((key, named[key], [named[key]]) for key in named if first[id(named[key])] == key)
        return {g: {n: copies[first[id(t)]] for n, t in tensors.items()} for g, tensors in groups.items()}

    def fill(self, entries: Iterable[tuple[Key, Kind, Iterable[torch.Tensor]]]) -> dict[Key, torch.Tensor]:
        """Copy tensors that come one at a time, each in pieces of its flat elements. Returns the copies."""
        before, self._buffers = self._buffers, {}
        on_device = False
        with torch.no_grad():
            for key, kind, pieces in entries:
                buffer = before.pop(key, None)
                at = 0
                for piece in pieces:
                    on_device |= piece.is_cuda
                    if buffer is None or buffer.shape != kind.shape or buffer.dtype != kind.dtype:
                        buffer = torch.empty(kind.shape, dtype=kind.dtype, pin_memory=piece.is_cuda)
                    flat = buffer.view(-1)[at : at + piece.numel()]
                    flat.copy_(piece.reshape(-1), non_blocking=True)
                    at += piece.numel()
                assert buffer is not None
                self._buffers[key] = buffer
        if on_device:
            self._copied = torch.cuda.Event()
            self._copied.record()
        return dict(self._buffers)

    def wait(self) -> None:
        """Wait until the copies of the last `take` are there."""
        if self._copied is not None:
            self._copied.synchronize()


class Background:
    """Does one piece of work at a time in a thread, and keeps its error until someone waits for it."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether the last work ended in an error that nobody has been told."""
        return self._error is not None

    @property
    def busy(self) -> bool:
        """Whether work is going on."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, work: Callable[[], None]) -> None:
        """Begin a piece of work, after the one before. Raises the error of that one."""
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="scaletrain-saving")
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is in flight. Raises the error of the work, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
