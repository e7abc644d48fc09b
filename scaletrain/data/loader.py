"""From positions to batches: each process makes its own micro-batches of each global batch, ahead of time.

A window is one global batch: `global_batch` consecutive positions of the order, cut into micro-batches that are
numbered 0, 1, ... Micro-batch m goes to rank m % world. Where batches are padded, the examples of a window are put in
the order of their lengths first: its gradient is the same, its padding less. So what a micro-batch holds, and all that
is random in it, depends on neither the number of processes nor on where a run was resumed.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count, repeat
from queue import Full, Queue
from threading import Event, Thread, current_thread
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from scaletrain.data.dataset import Dataset
from scaletrain.data.order import Int, Lanes, key_of, seeds
from scaletrain.data.stream import Cursor, Reader, Stream
from scaletrain.errors import UserError

T = TypeVar("T")

SPAN = 4096
"""Examples of a lane whose order is looked up at once, where they are read from chunks of at least so many."""
HINTS = 64
"""Rows of a chunk that are told to have it read ahead: in every order, one of them comes early."""


@dataclass(frozen=True)
class Micro:
    """A micro-batch: its window, its number in it, the examples in it, and their tensors.

    cursor: of a stream, where the lane stands after it.
    """

    window: int
    number: int
    examples: tuple[Any, ...]
    tensors: dict[str, torch.Tensor]
    cursor: Cursor | None = None

    def pin_memory(self) -> Micro:
        """Return the same in pinned memory, from which a GPU copies while it works. DataLoader asks for it, too."""
        return replace(self, tensors={name: tensor.pin_memory() for name, tensor in self.tensors.items()})


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
    def lanes(self) -> Lanes:
        """The lanes that the order of the data knows: the same for any number of processes."""
        return Lanes(self.global_batch // self.micro_batch, self.micro_batch)

    @property
    def own(self) -> range:
        """The numbers of this process's micro-batches: its lanes."""
        return range(self.rank, self.lanes.count, self.world)

    @property
    def accumulate(self) -> int:
        """Micro-batches of one process in a window."""
        return self.global_batch // (self.micro_batch * self.world)


class _Positions(Sampler[tuple[int, int]]):
    """(window, micro-batch number) of every micro-batch of this rank, from a window on, without end."""

    def __init__(self, layout: Layout, window: int, skipped: Collection[int]):
        self.layout, self.window, self.skipped = layout, window, skipped

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for window in count(self.window):
            if window not in self.skipped:
                for number in self.layout.own:
                    yield window, number


class _Span(NamedTuple):
    """Successive examples of a lane, from a place on, and the data set that may hold them."""

    begin: int
    examples: Int
    dataset: Dataset


class _Micros(TorchDataset[Micro | Failure]):
    """Makes one micro-batch from its place. Of data that stream, it looks up the order of many at once."""

    def __init__(self, dataset: Dataset, layout: Layout, shuffle: int, seed: tuple[object, ...]):
        self.dataset, self.layout, self.lanes = dataset, layout, layout.lanes
        self.order, self.key = dataset.order(layout.lanes, shuffle, *seed), key_of(*seed, "samples")
        self._spans: dict[int, _Span] = {}
        self._ragged = not self.order.ahead and dataset.lengths(np.arange(1)) is not None and layout.lanes.count > 1
        self._cut: tuple[int, Int, Int] | None = None

    def __getitem__(self, place: tuple[int, int]) -> Micro | Failure:
        window, number = place
        width = self.layout.micro_batch
        first = window * self.layout.global_batch + number * width
        positions = np.arange(first, first + width)
        try:
            if self.order.ahead:
                examples, dataset = self._streamed(number, window * width)
            elif self._ragged:
                positions, examples = (a[number * width :][:width] for a in self._by_length(window))
                dataset = self.dataset
            else:
                examples, dataset = self.order(positions), self.dataset
            indices = tuple(examples.tolist())
            return Micro(window, number, indices, dataset.batch(indices, seeds(positions, self.key)))
        except UserError as error:
            return Failure(str(error))

    def _by_length(self, window: int) -> tuple[Int, Int]:
        """Return the positions of a window and the examples there, the longest first: memory is short at once, or not.

        Each example keeps its position, and with it all that is random in it.
        """
        if self._cut is None or self._cut[0] != window:
            positions = np.arange(window * self.layout.global_batch, (window + 1) * self.layout.global_batch)
            examples = self.order(positions)
            lengths = self.dataset.lengths(examples)
            assert lengths is not None
            by_length = np.argsort(-lengths, kind="stable")
            self._cut = window, positions[by_length], examples[by_length]
        return self._cut[1:]

    def _streamed(self, lane: int, place: int) -> tuple[Int, Dataset]:
        """Return the examples of a micro-batch; now and then, tell the data set which come next, and much later."""
        width, order = self.layout.micro_batch, self.order
        span = self._spans.get(lane)
        if span is None or not span.begin <= place < span.begin + len(span.examples):
            places = np.arange(place, place + width * max(1, min(SPAN, order.chunk, order.ahead // 4) // width))
            examples = order(self.lanes.position(lane, places))
            some = slice(None, None, max(1, order.chunk // HINTS))
            later = order(self.lanes.position(lane, places[some] + order.ahead))
            self.dataset.prefetch(np.concatenate([examples[some], later]))
            span = self._spans[lane] = _Span(place, examples, self.dataset.held(examples))
        return span.examples[place - span.begin :][:width], span.dataset


def _leave_group(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which terminals and launchers send to a whole process group, to the loop."""
    os.setpgid(0, 0)


def _of_stream(
    reader: Reader, layout: Layout, window: int, skipped: Collection[int], cursors: Mapping[int, Cursor]
) -> Iterator[Micro | Failure]:
    """Yield this rank's micro-batches of a stream, from a window on, without end. Skipped windows are read past."""
    at = {lane: cursors.get(lane) or reader.start() for lane in layout.own}
    reader.begin(at)
    width = layout.micro_batch
    try:
        for now in count(window):
            for lane in layout.own:
                drawn, at[lane] = reader.draw(lane, now * width, width, at[lane])
                if now not in skipped:
                    names, examples = zip(*drawn, strict=True)
                    yield Micro(now, lane, names, reader.collate(examples), at[lane])
    except UserError as error:
        yield from repeat(Failure(str(error)))
    finally:
        reader.close()


def _ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """Yield what an iterator yields, which runs in a thread, up to `depth` items ahead."""
    queue: Queue[T | BaseException] = Queue(depth)
    ended = Event()

    def put(item: T | BaseException) -> bool:
        while not ended.is_set():
            try:
                queue.put(item, timeout=0.2)
            except Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item):
                    return
        except BaseException as error:  # raised again where it is waited for
            put(error)

    thread = Thread(target=work, name="batches", daemon=True)

    def end() -> None:
        ended.set()
        if thread is not current_thread():
            thread.join()

    # A daemon thread that is still in C++ code when the interpreter goes away takes the process with it (SIGABRT).
    atexit.register(end)
    thread.start()
    try:
        while True:
            item = queue.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        atexit.unregister(end)
        end()


class Windows:
    """Iterator over this rank's accumulation windows: lists of `layout.accumulate` micro-batches, in CPU memory.

    window: the first one. cursors: where each lane of a stream stands before it, by number; empty at the start.
    skipped: windows that are not to be trained on. shuffle: rows that are mixed where they are read from chunks.
    workers: processes that prepare batches of a data set ahead; None chooses none for cheap examples, else up to 4 of
    the free cores. A stream is read ahead in threads.
    """

    def __init__(
        self,
        data: Dataset | Stream,
        layout: Layout,
        seed: tuple[object, ...],
        window: int = 0,
        workers: int | None = None,
        pin_memory: bool = False,
        cursors: Mapping[int, Cursor] | None = None,
        skipped: Collection[int] = (),
        shuffle: int = 16_384,
    ):
        self.layout = layout
        skipped = frozenset(skipped)
        if isinstance(data, Stream):
            reader = Reader(data, layout.lanes, shuffle, *seed)
            micros = _of_stream(reader, layout, window, skipped, cursors or {})
            if pin_memory:
                micros = (micro.pin_memory() if isinstance(micro, Micro) else micro for micro in micros)
            self._micros: Iterator[Micro | Failure] = _ahead(micros, 4 * layout.accumulate)
            return
        if workers is None:
            cores = (os.cpu_count() or 1) // layout.world
            workers = min(4, max(1, cores - 1)) if data.decodes else 0
        # Workers keep at least two windows ahead of the loop. Without workers batches are made when they are asked for:
        # that is for data in memory, where a batch takes less time than handing it over between processes.
        self._micros = iter(
            DataLoader(
                _Micros(data, layout, shuffle, seed),
                sampler=_Positions(layout, window, skipped),
                batch_size=None,
                num_workers=workers,
                prefetch_factor=max(2, 2 * layout.accumulate // max(workers, 1)) if workers else None,
                pin_memory=pin_memory,
                worker_init_fn=_leave_group,
            )
        )

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


REPEATED = -1
"""The window of a batch that only keeps ranks in step."""


def passes(dataset: Dataset, batch: int, world: int = 1, rank: int = 0, even: bool = False) -> Iterator[Micro]:
    """Yield this rank's share of one pass, for evaluation: each example once, the last batch short.

    They come in order or, where batches are padded, the longest first.
    Augmentation draws from a generator of the example's number: the same at every evaluation. even: ranks that have a
    batch less than others get the first one again, with REPEATED for its window.
    """
    batches, every = -(-len(dataset) // batch), np.arange(len(dataset))
    lengths = dataset.lengths(every)
    every = every if lengths is None else np.argsort(-lengths, kind="stable")
    for number in range(rank, -(-batches // world) * world if even else batches, world):
        first = number * batch if number < batches else 0
        examples = every[first : first + batch]
        tensors = dataset.batch(examples.tolist(), seeds(examples, key_of("evaluate")))
        yield Micro(0 if number < batches else REPEATED, number, tuple(examples.tolist()), tensors)
