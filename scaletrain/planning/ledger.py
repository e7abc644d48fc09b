"""An account of memory: which storages are alive while operations run, real or fake, and what they are for."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WEIGHTS, GRADIENTS, OPTIMISER, AVERAGE = "weights", "gradients", "optimiser", "average"
COMMUNICATION, ACTIVATIONS = "communication", "activations"
_COLLECTIVE = ("c10d", "fsdp")
_STAGED = {"c10d._allgather_base_.default": 0, "c10d._reduce_scatter_base_.default": 1}
"""What gloo copies before it sends it: an argument by its place. nccl works in place."""


class _Held:
    """A storage that is alive."""

    __slots__ = ("kind", "size", "watch")

    def __init__(self, size: int, kind: str, watch: weakref.ref[Any]):
        self.size, self.kind, self.watch = size, kind, watch


class Ledger(TorchDispatchMode):
    """Keeps count of bytes by kind while it is active; new storages are activations until `note` says otherwise.

    gloo: count the copies that gloo makes. peak: the most bytes at a time since `begin`, and `at_peak` what they were.
    moments: (bytes without gradients, bytes of gradients) at each time that something was added since then.
    largest: the largest activation since then, as (bytes, shape, type).
    """

    def __init__(self, gloo: bool = False) -> None:
        super().__init__()
        self._gloo = gloo
        self._held: dict[int, _Held] = {}
        self.totals: dict[str, int] = dict.fromkeys(
            (WEIGHTS, GRADIENTS, OPTIMISER, AVERAGE, COMMUNICATION, ACTIVATIONS), 0
        )
        self.begin()

    def begin(self) -> None:
        """Look for a new peak from now on."""
        self.peak, self.at_peak = 0, dict(self.totals)
        self.moments: set[tuple[int, int]] = set()
        self.largest: tuple[int, tuple[int, ...], str] = (0, (), "")
        self._look()

    def note(self, tensors: Iterable[torch.Tensor], kind: str) -> None:
        """Say what tensors are for, whether they are known already or not."""
        for tensor in tensors:
            held = self._hold(tensor, kind)
            if held is not None and held.kind != kind:
                self.totals[held.kind] -= held.size
                self.totals[kind] += held.size
                held.kind = kind
        self._look()

    def settle(self, kind: str) -> None:
        """Say what all present activations are for."""
        for held in self._held.values():
            if held.kind == ACTIVATIONS:
                self.totals[ACTIVATIONS] -= held.size
                self.totals[kind] += held.size
                held.kind = kind

    def _hold(self, tensor: torch.Tensor, kind: str) -> _Held | None:
        storage = (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()
        key = id(storage)
        held = self._held.get(key)
        if held is not None:
            return held
        size = storage.nbytes()
        if size:
            held = self._held[key] = _Held(size, kind, weakref.ref(storage, self._forget(key)))
            self.totals[kind] += size
        return held

    def _forget(self, key: int) -> Callable[[Any], None]:
        def gone(_: Any) -> None:
            held = self._held.pop(key, None)
            if held is not None:
                self.totals[held.kind] -= held.size

        return gone

    def _look(self, more: int = 0) -> None:
        total = sum(self.totals.values()) + more
        self.moments.add((total - self.totals[GRADIENTS], self.totals[GRADIENTS]))
        if total > self.peak:
            self.peak, self.at_peak = total, dict(self.totals)
            self.at_peak[COMMUNICATION] += more

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and take note of what it made."""
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its operations on what this process holds come by themselves
        out = func(*args, **(kwargs or {}))
        before = len(self._held)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                held = self._hold(tensor, ACTIVATIONS)
                made = func.overloadpacket is not torch.ops.aten.empty and tensor.is_floating_point()
                if made and held is not None and held.size > self.largest[0]:
                    self.largest = (held.size, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        more = 0
        if func.namespace in _COLLECTIVE:
            more = self._collective(str(func), args, kwargs or {})
        if more or len(self._held) != before:
            self._look(more)
        return out

    def _collective(self, name: str, args: Any, kwargs: Any) -> int:
        """Take note of what is sent and received. Returns the bytes that the sending itself takes."""
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        unknown = [t for t in tensors if (h := self._hold(t, COMMUNICATION)) is not None and h.kind == ACTIVATIONS]
        self.note(unknown, COMMUNICATION)
        if name == "c10d._reduce_scatter_base_.default":
            self.note([args[0]], GRADIENTS)
        if self._gloo and name in _STAGED:
            staged: torch.Tensor = args[_STAGED[name]]
            return staged.numel() * staged.element_size()
        return 0

    @contextmanager
    def watching(self) -> Iterator[Ledger]:
        """Be active; also take note of storages that are resized, which is no operation."""
        original = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            found = original(storage, size)
            held = self._held.pop(id(storage), None)
            kind = held.kind if held else COMMUNICATION
            if held:
                self.totals[kind] -= held.size
            if size:
                key = id(storage)
                self._held[key] = _Held(size, kind, weakref.ref(storage, self._forget(key)))
                self.totals[kind] += size
                self._look()
            return found

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        try:
            with self:
                yield self
        finally:
            torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]
