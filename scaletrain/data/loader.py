"""From positions to batches: each process makes its own micro-batches of each global batch, ahead of time.

A window is one global batch: `global_batch` consecutive positions of the order, cut into micro-batches that are
numbered 0, 1, ... Micro-batch m goes to rank m % world. So what a micro-batch holds, and all that is random in it,
depends on neither the number of processes nor on where a run was resumed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from scaletrain.data.dataset import Dataset
from scaletrain.data.order import Order, key_of, seeds
from scaletrain.errors import UserError


@dataclass(frozen=True)
class Micro:
    """A micro-batch: its number in the window, the examples in it, and their tensors."""

    number: int
    examples: tuple[int, ...]
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Failure:
    """What a worker could not decode; raised where all ranks can hear of it."""

    message: str


@dataclass(frozen=True)
class Layout:
    """How a global batch is cut: global = micro x accumulate x world."""

    global_batch: int
    micro_batch: int
    world: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        if self.global_batch % (self.micro_batch * self.world):
            raise UserError(
                f"train.global_batch={self.global_batch} does not divide into micro-batches of {self.micro_batch} on "
                f"{self.world} process(es): set train.global_batch to a multiple of {self.micro_batch * self.world}, "
                f"or change train.micro_batch."
            )

    @classmethod
    def derive(cls, global_batch: int, micro_batch: int | None, world: int, rank: int) -> Layout:
        """Fill in the micro-batch. Raises UserError when the batch does not divide."""
        if micro_batch is None and global_batch % world:
            raise UserError(
                f"train.global_batch={global_batch} does not divide over {world} processes: "
                f"set it to a multiple of {world}."
            )
        return cls(global_batch, micro_batch or global_batch // world, world, rank)

    @property
    def accumulate(self) -> int:
        """Micro-batches of one process in a window."""
        return self.global_batch // (self.micro_batch * self.world)


class _Positions(Sampler[tuple[int, int]]):
    """(window, micro-batch number) of every micro-batch of this rank, from a window on, without end."""

    def __init__(self, layout: Layout, window: int):
        self.layout, self.window = layout, window

    def __iter__(self) -> Iterator[tuple[int, int]]:
        window = self.window
        while True:
            for turn in range(self.layout.accumulate):
                yield window, turn * self.layout.world + self.layout.rank
            window += 1


class _Micros(TorchDataset[Micro | Failure]):
    """Makes one micro-batch from its place."""

    def __init__(self, dataset: Dataset, layout: Layout, seed: tuple[object, ...]):
        self.dataset, self.layout = dataset, layout
        self.order, self.key = Order(len(dataset), *seed), key_of(*seed, "samples")

    def __getitem__(self, place: tuple[int, int]) -> Micro | Failure:
        window, number = place
        first = window * self.layout.global_batch + number * self.layout.micro_batch
        positions = np.arange(first, first + self.layout.micro_batch)
        examples = tuple(self.order(positions).tolist())
        try:
            return Micro(number, examples, self.dataset.batch(examples, seeds(positions, self.key)))
        except UserError as error:
            return Failure(str(error))


def _leave_group(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which terminals and launchers send to a whole process group, to the loop."""
    os.setpgid(0, 0)


class Windows:
    """Iterator over this rank's accumulation windows: lists of `layout.accumulate` micro-batches, in CPU memory.

    workers: processes that prepare batches ahead; None chooses none for cheap examples, else up to 4 of the free cores.
    """

    def __init__(
        self,
        dataset: Dataset,
        layout: Layout,
        seed: tuple[object, ...],
        window: int = 0,
        workers: int | None = None,
        pin_memory: bool = False,
    ):
        if workers is None:
            cores = (os.cpu_count() or 1) // layout.world
            workers = min(4, max(1, cores - 1)) if dataset.decodes else 0
        self.layout = layout
        # Workers keep at least two windows ahead of the loop. Without workers batches are made when they are asked for:
        # that is for data in memory, where a batch takes less time than handing it over between processes.
        self._loader: DataLoader[Micro | Failure] = DataLoader(
            _Micros(dataset, layout, seed),
            sampler=_Positions(layout, window),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=max(2, 2 * layout.accumulate // max(workers, 1)) if workers else None,
            pin_memory=pin_memory,
            worker_init_fn=_leave_group,
        )
        self._micros = iter(self._loader)

    def __iter__(self) -> Windows:
        return self

    def __next__(self) -> list[Micro] | Failure:
        micros: list[Micro] = []
        failure = None
        for _ in range(self.layout.accumulate):
            micro = next(self._micros)
            if isinstance(micro, Failure):
                failure = failure or micro
            else:
                micros.append(micro)
        return failure or micros


def passes(dataset: Dataset, batch: int, world: int = 1, rank: int = 0) -> Iterator[Micro]:
    """Yield this rank's share of one pass in order, for evaluation: each example once, the last batch short.

    Augmentation draws from a generator of the example's number: the same at every evaluation.
    """
    for number, first in enumerate(range(0, len(dataset), batch)):
        if number % world != rank:
            continue
        examples = np.arange(first, min(first + batch, len(dataset)))
        tensors = dataset.batch(examples.tolist(), seeds(examples, key_of("evaluate")))
        yield Micro(number, tuple(examples.tolist()), tensors)
