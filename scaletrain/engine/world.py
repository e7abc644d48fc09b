"""The processes of a run: who they are, and how they agree. Small facts travel over gloo on the host, so that asking
never makes a GPU wait."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from scaletrain.engine.rendezvous import fresh
from scaletrain.errors import UserError, agreed

T = TypeVar("T")


def _join(backend: str) -> None:
    """Join the workers of torchrun's agents, which may be restarted."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=fresh(store, rank, size), rank=rank, world_size=size)


class World:
    """This process among its peers. Make one with `World.start`, end it with `close`."""

    def __init__(self, device: torch.device, rank: int = 0, size: int = 1):
        self.device, self.rank, self.size = device, rank, size
        self._beside: World | None = None
        self._host = dist.new_group(backend="gloo", timeout=timedelta(hours=2)) if size > 1 else None

    @classmethod
    def start(cls) -> World:
        """Join the processes that `accelerate launch` or `torchrun` started, or stand alone.

        The device is the local GPU where there is one, unless ACCELERATE_USE_CPU is set.
        """
        from accelerate import PartialState

        use_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        cpu = use_cpu or not torch.cuda.is_available()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            backend = "gloo" if cpu else "nccl"
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                _join(backend)
            state = PartialState(cpu=cpu, backend=backend)
            device = torch.device("cpu") if cpu else state.device
            return cls(device, state.process_index, state.num_processes)
        return cls(torch.device("cpu") if cpu else torch.device("cuda", torch.cuda.current_device()))

    def beside(self) -> World:
        """Return the same processes over a group of their own, for threads beside the loop."""
        if self._beside is None:
            self._beside = World(self.device, self.rank, self.size)
        return self._beside

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Sum each number over the processes, on the host, in double precision."""
        if self._host is None:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(tensor, group=self._host)
        return tensor.tolist()

    def gather(self, value: T) -> list[T]:
        """Return the value of every process, by rank."""
        if self._host is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._host)
        return values

    def broadcast(self, value: T) -> T:
        """Return the value of rank 0."""
        if self._host is None:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, group=self._host)
        return box[0]

    def agree(self, work: Callable[[], T], main_first: bool = False) -> T:
        """Do the same work on every rank; when it fails on one, raise the UserError or OSError of the first on all.

        main_first: rank 0 does it before the others, which then find its files.
        """
        if main_first and self.size > 1:
            if self.main:
                result = self._try(work)
            self.barrier()
            if not self.main:
                result = self._try(work)
        else:
            result = self._try(work)
        errors = [e for e in self.gather(result if isinstance(result, (UserError, OSError)) else None) if e is not None]
        if errors:
            raise self._agreed(errors[0])
        return result  # type: ignore[return-value]

    def on_main(self, work: Callable[[], T]) -> T:
        """Do work on rank 0 alone and give everyone its result, or raise its UserError or OSError everywhere."""
        result = self.broadcast(self._try(work) if self.main else None)
        if isinstance(result, (UserError, OSError)):
            raise self._agreed(result)
        return result  # type: ignore[return-value]

    @staticmethod
    def _agreed(error: UserError | OSError) -> UserError | OSError:
        return agreed(error) if isinstance(error, UserError) else error

    @staticmethod
    def _try(work: Callable[[], T]) -> T | UserError | OSError:
        try:
            return work()
        except (UserError, OSError) as error:
            return error

    def barrier(self) -> None:
        """Wait for all."""
        if self._host is not None:
            dist.barrier(group=self._host)

    def mean_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Average tensors of the device over the processes, in place."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def close(self) -> None:
        """Leave the process group, so that launchers see a clean end."""
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
