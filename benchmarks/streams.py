"""Streaming from sharded Parquet: how soon a resumed run has its first batch, memory, and rows/s beside peers.

Each measurement is made in a fresh process; contestants take turns, and figures are medians over the rounds. The data
are made once in FOLDER: rows of about 200 characters of text and two whole numbers, row groups of 10,000 rows, shards
of 100,000. Peers that are not installed are left out: `pip install datasets mosaicml-streaming torchdata`.

    python benchmarks/streams.py resume     [--rows 10_000_000] [--rounds 5] [--folder DIR]
    python benchmarks/streams.py memory     [--rows 10_000_000] [--rounds 3] [--folder DIR]
    python benchmarks/streams.py throughput [--rows 1_024_000] [--rounds 3] [--workers 0] [--folder DIR]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scaletrain.config import SourceSpec
from scaletrain.data.dataset import Dataset, Example
from scaletrain.data.loader import Layout, Windows
from scaletrain.data.order import Int, Lanes, Ordering
from scaletrain.data.sources import Rows, open_rows
from scaletrain.data.stream import WINDOW, Source, Stream
from scaletrain.data.text import Samples, Tokens

GROUP, SHARD = 10_000, 100_000
BATCH = 256
BUFFER = 10_000
"""Rows in the shuffle buffer of those that have one."""
SEQ_LEN = 2048
COLUMNS = ["text", "id", "length"]


def write(folder: Path, rows: int) -> Path:
    """Write shards, unless they are there. Each text begins with its row's number, so that no two are the same."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    target = folder / f"parquet-{rows}"
    if target.is_dir():
        return target
    rng = np.random.default_rng(0)
    words = np.array(["".join(map(chr, rng.integers(97, 123, n))) for n in rng.integers(2, 10, 5000)])
    pool = pa.array([" ".join(words[rng.integers(0, len(words), n)]) for n in rng.integers(10, 52, 20_000)])
    partial = Path(tempfile.mkdtemp(dir=folder))
    for number, start in enumerate(range(0, rows, SHARD)):
        ids = pa.array(np.arange(start, min(start + SHARD, rows)))
        picks = pool.take(pa.array(rng.integers(0, len(pool), len(ids))))
        text = pc.binary_join_element_wise(ids.cast(pa.string()), picks, " ")
        table = pa.table({"text": text, "id": ids, "length": pc.utf8_length(text)})
        pq.write_table(table, partial / f"{number:04}.parquet", row_group_size=GROUP)
    partial.rename(target)
    return target


def fresh(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def available(folder: Path) -> str:
    return f"{sum(p.stat().st_size for p in folder.iterdir()) / 1e9:.2f} GB in {len(list(folder.iterdir()))} shards"


# --- Ours -------------------------------------------------------------------------------------------------------------


class Lines(Dataset):
    """Rows as they are: batches are a list of texts and tensors of numbers."""

    def __init__(self, rows: Rows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def order(self, lanes: Lanes, shuffle: int, *seed: object) -> Ordering:
        return self.rows.order(lanes, shuffle, *seed)

    def prefetch(self, indices: Int) -> None:
        self.rows.prefetch(indices)

    def held(self, indices: Int) -> Dataset:
        return Lines(self.rows.held(indices))

    def example(self, index: int, rng: np.random.Generator) -> Example:
        return self.rows.row(index)

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        return self._of({name: [e[name] for e in examples] for name in COLUMNS})

    def batch(self, indices: Sequence[int], seeds: Any) -> dict[str, Any]:
        return self._of(self.rows.take(COLUMNS, np.asarray(indices)))

    def _of(self, values: dict[str, Any]) -> dict[str, Any]:
        return {"text": values["text"], **{name: torch.from_numpy(np.array(values[name])) for name in COLUMNS[1:]}}


def packs(rows: Rows) -> Samples:
    """Pack the bytes of some texts: what a tokenizer would add is the same at every row."""
    texts = [text.encode() for text in rows.take(["text"], np.arange(len(rows)))["text"]]
    ids = np.frombuffer(b"".join(texts), np.uint8).astype(np.int64)
    tokens = Tokens(ids, None, np.concatenate([[0], np.cumsum([len(text) for text in texts])]))
    return Samples(tokens, rows, SEQ_LEN, 0, packed=True, empty=True)


def opened(folder: Path) -> Rows:
    return open_rows([SourceSpec(path=str(folder), stream=True)])


# --- Resume -----------------------------------------------------------------------------------------------------------

RESUMED = Layout(100, 25)


def first_batch(folder: Path, cache: Path, row: int, text: bool) -> float:
    """Open the data and go on at a row. Returns the seconds until the first window is there."""
    import fsspec  # noqa: F401 (imports are not what is measured)
    import pyarrow.compute
    import pyarrow.parquet  # noqa: F401

    os.environ["SCALETRAIN_CACHE"] = str(cache)
    began = time.perf_counter()
    rows = opened(folder)
    if text:
        sample = packs(rows.sample(WINDOW))  # a run looks at a part first
        stream = Stream((Source("text", rows, packs, sample.tokens_per_example),))
        window, rest = divmod(row // RESUMED.lanes.count, stream.window_of(0, RESUMED.lanes))
        given = rest * 200 // SEQ_LEN
        cursors = {lane: [[window, given]] for lane in RESUMED.own}
        batch = next(Windows(stream, RESUMED, (0,), row // RESUMED.global_batch, cursors=cursors))
    else:
        batch = next(Windows(Lines(rows), RESUMED, (0,), row // RESUMED.global_batch))
    seconds = time.perf_counter() - began
    assert isinstance(batch, list)
    return seconds


def resume(options: argparse.Namespace, folder: Path) -> None:
    """Time near the start and near the end, in turn."""
    data = write(folder, options.rows)
    early, late = 100, options.rows * 99 // 100
    print(f"{options.rows:,} rows, {available(data)}; seconds at row {early:,} and at row {late:,}")
    for text in (False, True):
        for indexed in (True, False):
            pairs = []
            for number in range(options.rounds + 1):
                pair = []
                for row in (early, late) if number % 2 else (late, early):
                    with tempfile.TemporaryDirectory(dir=folder) as empty:
                        cache = folder / "cache" if indexed else Path(empty)
                        pair.append(fresh(first_batch, data, cache, row, text))
                pairs.append(pair if number % 2 else pair[::-1])
            a, b = (statistics.median(column) for column in zip(*pairs[1:], strict=True))  # the first is a warm-up
            name = f"{'windowed text' if text else 'rows'}, index {'kept' if indexed else 'made anew'}"
            ratio = statistics.median(late / early for early, late in pairs[1:])
            print(f"{name:<32} {a:.3f} s {b:.3f} s: ratio {ratio:.2f} (median of {options.rounds} pairs)")


# --- Memory -----------------------------------------------------------------------------------------------------------


def resident(name: str) -> float:
    """Return a size from the process's status, in MB."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) / 1e3


def occupied(folder: Path, cache: Path, shuffle: int, windows: int) -> tuple[float, float, float]:
    """Read so many batches from the middle on. Returns MB before the data are opened, after, and at the peak."""
    import pyarrow.parquet  # noqa: F401

    import scaletrain.objectives.causal_lm
    import scaletrain.runs  # noqa: F401

    os.environ["SCALETRAIN_CACHE"] = str(cache)
    before = resident("VmRSS")
    data = Lines(opened(folder))
    loader = Windows(data, Layout(BATCH, BATCH // 4), (0,), len(data) // BATCH // 2, shuffle=shuffle)
    sizes = []
    for _ in range(windows):
        assert isinstance(next(loader), list)
        sizes.append(resident("VmRSS"))
    return before, statistics.median(sizes[windows // 3 :]), resident("VmHWM")


def memory(options: argparse.Namespace, folder: Path) -> None:
    """Compare sets of 100,000 and 1,000,000 rows with a large one."""
    sets = {rows: write(folder, rows) for rows in (100_000, 1_000_000, options.rows)}
    print(f"{options.windows} batches of {BATCH}; MB while reading (median), at the peak")
    for shuffle in (16_384, 32_768, 65_536):
        found: dict[int, list[tuple[float, float, float]]] = {rows: [] for rows in sets}
        for _ in range(options.rounds):
            for rows, path in sets.items():
                found[rows].append(fresh(occupied, path, folder / "cache", shuffle, options.windows))
        medians = {r: [statistics.median(x) for x in zip(*figures, strict=True)] for r, figures in found.items()}
        last = medians[options.rows]
        for rows, (_, reading, peak) in medians.items():
            grown = f"from here to {options.rows:,} rows {last[1] / reading - 1:+.1%}, peak {last[2] / peak - 1:+.1%}"
            print(f"shuffle {shuffle:,}, {rows:>10,} rows: {reading:.1f}, {peak:.1f}; {grown}")
    print(f"imports alone: {last[0]:.1f} MB")


# --- Throughput -------------------------------------------------------------------------------------------------------


def ours(folder: Path, copy: Path, rows: int, workers: int) -> Iterator[dict[str, Any]]:
    """Our loader: permuted shards, windows of 65,536 rows."""
    loader = Windows(Lines(opened(folder)), Layout(BATCH, BATCH), (0,), workers=workers, shuffle=65_536)
    for _ in range(rows // BATCH):
        (micro,) = next(loader)
        yield micro.tensors


def bare(folder: Path, copy: Path, rows: int, workers: int) -> Iterator[dict[str, Any]]:
    """pyarrow alone, in the order of the files."""
    import pyarrow.parquet as pq

    for path in sorted(folder.iterdir()):
        for batch in pq.ParquetFile(path).iter_batches(BATCH, columns=COLUMNS):
            yield batch.to_pydict()


def huggingface(folder: Path, copy: Path, rows: int, workers: int) -> Iterable[dict[str, Any]]:
    """`datasets`, streaming, with a shuffle buffer."""
    from datasets import load_dataset
    from torch.utils.data import DataLoader

    files = [str(path) for path in sorted(folder.iterdir())]
    data = load_dataset("parquet", data_files=files, split="train", streaming=True, cache_dir=str(copy / "hub"))
    data = data.shuffle(seed=0, buffer_size=BUFFER)
    return DataLoader(data, BATCH, num_workers=workers) if workers else data.iter(BATCH)


def mosaic(folder: Path, copy: Path, rows: int, workers: int) -> Iterable[dict[str, Any]]:
    """MosaicML `streaming`, from MDS shards of its own."""
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    data = StreamingDataset(local=str(copy / "mds"), shuffle=True, batch_size=BATCH)
    return DataLoader(data, BATCH, num_workers=workers)


def write_mds(folder: Path, copy: Path) -> None:
    """Write the rows as MDS."""
    import pyarrow.parquet as pq
    from streaming import MDSWriter

    if (copy / "mds").is_dir():
        return
    with MDSWriter(out=str(copy / "mds"), columns={"text": "str", "id": "int64", "length": "int64"}) as writer:
        for path in sorted(folder.iterdir()):
            for row in pq.read_table(path).to_pylist():
                writer.write(row)


class Buffered(torch.utils.data.IterableDataset[dict[str, Any]]):
    """What a person writes for torchdata: rows of Parquet through a shuffle buffer; workers share out the files."""

    def __init__(self, folder: Path):
        self.files = sorted(folder.iterdir())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        import pyarrow.parquet as pq

        rng = np.random.default_rng(0)
        worker = torch.utils.data.get_worker_info()
        files = self.files[worker.id :: worker.num_workers] if worker else self.files
        buffer: list[dict[str, Any]] = []
        for number in rng.permutation(len(files)).tolist():
            for batch in pq.ParquetFile(files[number]).iter_batches(BUFFER, columns=COLUMNS):
                for row, place in zip(batch.to_pylist(), rng.integers(0, BUFFER, len(batch)).tolist(), strict=True):
                    if len(buffer) < BUFFER:
                        buffer.append(row)
                    else:
                        yield buffer[place]
                        buffer[place] = row
        yield from (buffer[i] for i in rng.permutation(len(buffer)).tolist())


def stateful(folder: Path, copy: Path, rows: int, workers: int) -> Iterable[dict[str, Any]]:
    """`torchdata`'s StatefulDataLoader."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(Buffered(folder), BATCH, num_workers=workers)


def nodes(folder: Path, copy: Path, rows: int, workers: int) -> Iterable[dict[str, Any]]:
    """`torchdata`'s nodes, batches made in a thread."""
    from torch.utils.data import default_collate
    from torchdata import nodes as n

    batches = n.Batcher(n.IterableWrapper(Buffered(folder)), BATCH, drop_last=False)
    return n.Loader(n.ParallelMapper(batches, default_collate, num_workers=max(1, workers), method="thread"))


CONTESTANTS = {
    "scaletrain": (ours, None),
    "pyarrow, sequential": (bare, None),
    "datasets": (huggingface, "datasets"),
    "MosaicML streaming": (mosaic, "streaming"),
    "torchdata StatefulDataLoader": (stateful, "torchdata"),
    "torchdata nodes": (nodes, "torchdata"),
}


def rate(name: str, folder: Path, copy: Path, rows: int, workers: int) -> float:
    """Read an epoch. Returns rows/s, from opening the data to the last batch."""
    import fsspec  # noqa: F401
    import pyarrow.compute
    import pyarrow.parquet  # noqa: F401

    os.environ["SCALETRAIN_CACHE"] = str(copy / "cache")
    make, module = CONTESTANTS[name]
    if module:
        __import__(module)
    ids = []
    began = time.perf_counter()
    for batch in make(folder, copy, rows, workers):
        assert len(batch["text"]) == len(batch["length"])
        ids.append(batch["id"])
    seconds = time.perf_counter() - began
    seen = np.concatenate([np.asarray(x) for x in ids])
    assert np.array_equal(np.sort(seen), np.arange(rows)), f"{name} does not give each row once"
    return rows / seconds


def throughput(options: argparse.Namespace, folder: Path) -> None:
    """Read whole epochs, in turn."""
    from importlib.util import find_spec

    rows = options.rows // BATCH * BATCH
    data = write(folder, rows)
    copy = folder / f"peers-{rows}"
    copy.mkdir(exist_ok=True)
    present = []
    for name, (_, module) in CONTESTANTS.items():
        if module and find_spec(module) is None:
            print(f"{name} is not installed: left out")
        else:
            present.append(name)
    if "MosaicML streaming" in present:
        write_mds(data, copy)
    found: dict[str, list[float]] = {name: [] for name in present}
    for number in range(options.rounds + 1):
        for name in present:
            measured = fresh(rate, name, data, copy, rows, options.workers)
            if number:  # the first round warms the page cache
                found[name].append(measured)
    print(f"{rows:,} rows, {available(data)}, batches of {BATCH}; worker processes: {options.workers}")
    for name, figures in found.items():
        ratio = statistics.median(a / b for a, b in zip(found["scaletrain"], figures, strict=True))
        print(f"{name:<30} {statistics.median(figures):>11,.0f} rows/s   scaletrain / this: {ratio:.2f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for action, rows, rounds in ((resume, 10_000_000, 5), (memory, 10_000_000, 3), (throughput, 1_024_000, 3)):
        command = commands.add_parser(action.__name__, help=action.__doc__)
        command.set_defaults(action=action)
        command.add_argument("--rows", type=int, default=rows)
        command.add_argument("--rounds", type=int, default=rounds)
        command.add_argument("--folder", type=Path, help="where the data are kept; a temporary folder by default")
    commands.choices["memory"].add_argument("--windows", type=int, default=300, help="batches to read")
    commands.choices["throughput"].add_argument("--workers", type=int, default=0, help="worker processes of each")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        options.action(options, folder)


if __name__ == "__main__":
    main()
