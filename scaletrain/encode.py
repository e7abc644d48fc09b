"""Latents of pictures, and what texts say, made of a data set once and written to Parquet, to train denoisers on.

Rows are read, encoded and written by the batch. What is being written stands in `.OUT.partial`; it gets its name when
it is whole, and the same command goes on with what a killed one left, file by file.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from scaletrain.callbacks.progress import clock
from scaletrain.checkpoint import reader
from scaletrain.config import NetworkSpec, SourceSpec
from scaletrain.data.images import ImageDataset
from scaletrain.data.sources import Rows, open_rows
from scaletrain.diffusion.pipelines import Pipeline
from scaletrain.errors import UserError
from scaletrain.finished import FinishedStage, default_device
from scaletrain.networks._latents import METADATA, Latents
from scaletrain.networks.build import build
from scaletrain.objectives._latents import NAME
from scaletrain.shelf import Shelf

log = logging.getLogger("scaletrain")

_BYTES = 64 << 20
"""Of encoded rows that are in memory before they are written."""
_ROWS = 10_000
"""Of a file, by default."""
_ABOUT = "about.json"
T = TypeVar("T")
S = TypeVar("S")


@dataclass(frozen=True)
class Options:
    """text: the column with prompts, if they are encoded. size: side of a square, that pictures are brought to; by
    default that of the run, or as they are. batch: rows encoded at a time. rows: of a file in a folder.
    """

    text: str | None = None
    size: int | None = None
    batch: int = 32
    rows: int | None = None
    dtype: Literal["float32", "float16"] = "float32"


class _Encoder(Protocol):
    """Makes columns (B, ...) of rows, in two parts, so that the next rows are read meanwhile."""

    def read(self, rows: Rows) -> Any: ...

    def make(self, read: Any) -> Mapping[str, torch.Tensor]: ...


@final
class _Pictures:
    """The column `latent`."""

    def __init__(self, network: nn.Module, size: Any, device: torch.device):
        channels: Any = network.config.in_channels  # type: ignore[union-attr]
        self._network, self._device = network.to(device).eval(), device
        self._how: dict[str, Any] = {"size": size, "channels": channels}
        self._shape: tuple[int, int, int] | None = None

    def read(self, rows: Rows) -> torch.Tensor:
        """Return pictures (B, C, H, W) in [-1, 1]. Raises UserError that names a row."""
        found = ImageDataset(rows, **self._how)
        if self._shape is None:
            self._network.latent_shape(found.shape)  # type: ignore[operator]
            self._shape = found.shape
        if found.shape != self._shape:
            raise UserError(f"{rows.name(0)} is {found.shape}, the first picture {self._shape}: give --size.")
        return found.batch(range(len(rows)), np.zeros(len(rows), np.uint64))["image"]

    def make(self, read: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return scaled latents."""
        return {"latent": self._network(read.to(self._device), "encode")}


@final
class _Texts:
    """What a pipeline's encoders say of a column."""

    def __init__(self, encoder: Callable[[list[str]], dict[str, torch.Tensor]], column: str):
        self.make, self._column = encoder, column

    def read(self, rows: Rows) -> list[str]:
        """Return prompts. Raises UserError that names a row without one."""
        found = list(rows.column(self._column))
        for number, value in enumerate(found):
            if not isinstance(value, str):
                raise UserError(f"{rows.name(number)}: `{self._column}` is {value!r}, not a text.")
        return found


def encode(source: str, run: Path | None, data: SourceSpec, out: Path, options: Options) -> int:
    """Encode a data set by the autoencoder of a run, or by a pipeline's own; returns how many rows it has.

    source: the pipeline, or what the run is called. run: its folder. out: a new folder, or a new file `*.parquet`. All
    columns but `image` are kept. Raises UserError.
    """
    if out.exists():
        raise UserError(f"{out} is there already: choose another name, or remove it.")
    rows = open_rows([data])
    if options.text:
        rows.require(options.text, "what is encoded, by --text")
    else:
        rows.require("image", "what is encoded")
    pictures = "image" in rows.columns
    if options.size and not pictures:
        raise UserError("--size is for pictures, and the data have no column `image`; leave it out.")
    network, latents, size = _of_run(run) if run else _of_pipeline(source, pictures)
    encoders: list[_Encoder] = []
    device = default_device()
    if network is not None and pictures:
        encoders.append(_Pictures(network, options.size or size, device))
    if options.text:
        pipeline = None if run else Pipeline.open(source)
        if pipeline is None:
            raise UserError(f"--text: `{source}` is no pipeline, and has no text encoders.")
        encoders.append(_Texts(pipeline.encoder(device), options.text))
    if not encoders:
        raise UserError(f"`{source}` has no autoencoder, and no --text is given: there is nothing to encode.")
    if options.rows and out.suffix == ".parquet":
        raise UserError(f"--rows is for a folder of files, and {out} is one file; leave it out.")
    per_file = len(rows) if out.suffix == ".parquet" else options.rows or _ROWS
    about = {"source": source, "rows": rows.fingerprint, "latents": latents and latents.autoencoder, **asdict(options)}
    partial = _partial(out, about)
    bounds = [*range(0, len(rows), per_file), len(rows)]
    names = [f"part-{i:05d}-of-{len(bounds) - 1:05d}.parquet" for i in range(len(bounds) - 1)]
    kept = [column for column in rows.columns if not (column == "image" and network is not None)]
    told, began = 0.0, time.monotonic()
    fresh = [(name, span) for name, span in zip(names, pairwise(bounds), strict=True) if not (partial / name).exists()]
    done = before = len(rows) - sum(last - first for _, (first, last) in fresh)
    for name, (first, last) in fresh:
        parts = (rows.select(np.arange(i, min(i + options.batch, last))) for i in range(first, last, options.batch))
        with _File(partial / name, latents) as file:
            for part, read in _ahead(parts, lambda part: [encoder.read(part) for encoder in encoders]):
                columns: dict[str, Any] = {key: part.take([key], np.arange(len(part)))[key] for key in kept}
                with torch.no_grad():
                    for encoder, own in zip(encoders, read, strict=True):
                        for key, value in encoder.make(own).items():
                            columns[key] = value.float().cpu().numpy().astype(options.dtype)
                file.add(columns)
                done += len(part)
                if time.monotonic() - told > 5 or done == len(rows):
                    told = time.monotonic()
                    rate = (done - before) / (told - began)
                    left = clock((len(rows) - done) / rate)
                    log.info("%s of %s rows, %s/s, ETA %s", f"{done:,}", f"{len(rows):,}", f"{rate:,.0f}", left)
    if out.suffix == ".parquet":
        os.replace(partial / names[0], out)
        shutil.rmtree(partial)
    else:
        (partial / _ABOUT).unlink()
        partial.rename(out)
    return len(rows)


def _of_run(folder: Path) -> tuple[nn.Module, Latents, Any]:
    """Return the autoencoder of a run's newest checkpoint, whose latents it makes, and the size of its pictures."""
    run = FinishedStage.open(folder)
    if NAME not in reader.manifest(run.checkpoint)["networks"]:
        raise UserError(f"{folder} has no network `{NAME}`: take a run of `type: {NAME}`.")
    module = Shelf(folder).open(run.checkpoint, NAME)
    latents: Latents = module.eval().latents(f"{folder} ({run.checkpoint.name})")  # type: ignore[operator]
    return module, latents, getattr(run.objective.config, "size", None)


def _of_pipeline(path: str, wanted: bool) -> tuple[nn.Module | None, Latents | None, None]:
    """Return a pipeline's autoencoder and whose latents it makes, where that is wanted and it has one."""
    found = Pipeline.open(path)
    if not wanted or (found is not None and not found.part("vae")):
        return None, None, None
    module = build(NAME, NetworkSpec(type="autoencoder_kl", path=path, frozen=True))
    return module, module.eval().latents(path), None  # type: ignore[operator]


def _partial(out: Path, about: Mapping[str, Any]) -> Path:
    """Return the folder of what is being written, with what an attempt with the same data and options left there."""
    folder = out.parent / f".{out.name}.partial"
    told = json.dumps(about, indent=2)
    try:
        if not (folder / _ABOUT).exists() or (folder / _ABOUT).read_text() != told:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            (folder / _ABOUT).write_text(told)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}") from error
    return folder


def _ahead(items: Iterable[T], read: Callable[[T], S]) -> Iterator[tuple[T, S]]:
    """Yield each item with what is read of it, which goes on by one item meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        waiting: list[tuple[T, Any]] = []
        for item in items:
            waiting.append((item, pool.submit(read, item)))
            if len(waiting) == 2:
                first, coming = waiting.pop(0)
                yield first, coming.result()
        for item, coming in waiting:
            yield item, coming.result()


class _File:
    """A Parquet file that gets its name when it is whole and on disk. Rows are written in groups of some size."""

    def __init__(self, path: Path, latents: Latents | None):
        self._path, self._hidden = path, path.with_suffix(".writing")
        self._notes = {METADATA: latents.model_dump_json()} if latents else {}
        self._tables: list[Any] = []
        self._writer: Any = None

    def __enter__(self) -> _File:
        return self

    def add(self, columns: Mapping[str, Sequence[Any] | npt.NDArray[Any]]) -> None:
        """Add rows."""
        import pyarrow as pa

        made = {}
        for key, values in columns.items():
            try:
                made[key] = _nested(values) if isinstance(values, np.ndarray) else pa.array(values)
            except pa.ArrowException as error:
                raise UserError(f"column `{key}` cannot be written to Parquet: {error}") from error
        self._tables.append(pa.table(made))
        if sum(table.nbytes for table in self._tables) > _BYTES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self._tables:
            return
        try:
            table = pa.concat_tables(self._tables, promote_options="permissive")
            if self._writer is None:
                schema = table.schema.with_metadata(self._notes)
                self._writer = pq.ParquetWriter(self._hidden, schema, compression="zstd")
            self._writer.write_table(table.cast(self._writer.schema))
        except pa.ArrowException as error:
            raise UserError(f"the values of a column are of several types: {error}") from error
        self._tables = []

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self._flush()
        if self._writer is not None:
            self._writer.close()
        if kind is None:
            with self._hidden.open("rb") as stream:
                os.fsync(stream.fileno())
            self._hidden.replace(self._path)


def _nested(values: npt.NDArray[Any]) -> Any:
    """Return an array (N, ...) as lists of lists of a fixed size."""
    import pyarrow as pa

    found = pa.array(np.ascontiguousarray(values).ravel())
    for size in values.shape[:0:-1]:
        found = pa.FixedSizeListArray.from_arrays(found, size)
    return found
