"""What lets a run train on while it saves: copies in host memory, and work beside the loop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import torch

Groups = Mapping[str, Mapping[str, torch.Tensor]]
"""Tensors by the name of a group and their own."""


class HostCopies:
    """Copies of tensors in host memory, in buffers that stay from one save to the next.

    On CUDA the buffers are pinned and the copying is asynchronous: `wait` before they are read.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], torch.Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def reserve(self, groups: Groups) -> None:
        """Make the buffers for some tensors, and have the system give their pages, which takes longer than copying."""
        named = {(group, name): tensor for group, tensors in groups.items() for name, tensor in tensors.items()}
        first = {id(tensor): key for key, tensor in reversed(named.items())}
        self._buffers = {key: _empty(named[key]).zero_() for key in first.values()}

    def take(self, groups: Groups) -> dict[str, dict[str, torch.Tensor]]:
        """Copy all tensors. A tensor that occurs twice, as tied weights do, is one copy under both names."""
        before, self._buffers = self._buffers, {}
        first: dict[int, torch.Tensor] = {}
        copies: dict[str, dict[str, torch.Tensor]] = {}
        with torch.no_grad():
            for group, tensors in groups.items():
                copies[group] = {}
                for name, tensor in tensors.items():
                    if id(tensor) not in first:
                        buffer = before.get((group, name))
                        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                            buffer = _empty(tensor)
                        first[id(tensor)] = self._buffers[group, name] = buffer.copy_(tensor, non_blocking=True)
                    copies[group][name] = first[id(tensor)]
        if any(tensor.is_cuda for tensors in groups.values() for tensor in tensors.values()):
            self._copied = torch.cuda.Event()
            self._copied.record()
        return copies

    def wait(self) -> None:
        """Wait until the copies of the last `take` are there."""
        if self._copied is not None:
            self._copied.synchronize()


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


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
