"""From a source's path and type to its tables: what is there, of which format, and how each format is opened."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from scaletrain.config import SourceSpec
from scaletrain.data.shard_readers import (
    FileShards,
    IterableShards,
    JsonLinesShards,
    MdsShards,
    ParquetShards,
    TarShards,
)
from scaletrain.data.shards import ShardTable
from scaletrain.data.store import COMPRESSED, attempt
from scaletrain.data.tables import ArrayTable, ArrowTable, DocumentTable, File, JsonLinesTable, ParquetTable, Table
from scaletrain.errors import UserError, did_you_mean

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SUFFIXES: dict[str, tuple[str, ...]] = {
    "parquet": (".parquet", ".pq"),
    "jsonl": tuple(name + end for name in (".jsonl", ".ndjson") for end in ("", ".gz", ".zst")),
    "csv": (".csv", ".tsv", ".csv.gz", ".tsv.gz"),
    "text": (".txt", ".txt.gz"),
    "images": IMAGES,
    "arrow": (".arrow",),
    "webdataset": (".tar",),
}
STREAMING = ("parquet", "jsonl", "hub", "webdataset", "mds")
MDS_INDEX = "index.json"
SKLEARN = ("breast_cancer", "digits", "iris", "wine")
SAVED = ("dataset_dict.json", "state.json")
"""A folder that has one of these was written by `save_to_disk` of the `datasets` library."""
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?")


def open_tables(spec: SourceSpec) -> list[Table]:
    """Open one source. Raises UserError that names the path, file or line."""
    kind = spec.type or _infer(spec.path)
    if spec.split and kind not in ("arrow", "hub"):
        raise UserError(f"`{spec.path}` is of type {kind}, which has no splits: leave `split` out")
    if spec.stream and kind not in STREAMING:
        raise UserError(
            f"`{spec.path}` is of type {kind}, which does not stream; those that do: {', '.join(STREAMING)}"
        )
    return _OPEN[kind](spec)


def _infer(path: str) -> str:
    """Return the type of a source from its path and, for a folder, from the names in it."""
    for name in ("sklearn", "noise"):
        if path.startswith(f"{name}:"):
            return name
    fs, root = _file_system(path)
    if _what(fs, root, path) == "directory":
        inside = {os.path.basename(p) for p in _tree(fs, root, path, depth=1)}
        if not inside.isdisjoint(SAVED):
            return "arrow"
        if MDS_INDEX in inside:
            return "mds"
    # `data/trian` beside a folder `data` is a slip of the pen and no Hub id.
    if _HUB_ID.fullmatch(path) and not _suffix_types([path]) and not fs.exists(os.path.dirname(root)):
        return "hub"
    types = _suffix_types([f.path for f in _files(path)])
    if len(types) != 1:
        found = f"files of several types ({', '.join(types)})" if types else "no file whose name tells its type"
        raise UserError(
            f"`{path}`: {found}. Say which one by `type`, one of {', '.join(_OPEN)}; types by name are "
            + "; ".join(f"{kind} ({', '.join(suffixes)})" for kind, suffixes in SUFFIXES.items())
        )
    return types[0]


def _suffix_types(paths: Sequence[str]) -> list[str]:
    return [kind for kind, suffixes in SUFFIXES.items() if any(p.lower().endswith(suffixes) for p in paths)]


def _file_system(path: str) -> tuple[Any, str]:
    import fsspec

    try:
        fs, root = fsspec.core.url_to_fs(path)
    except (ValueError, ImportError) as error:  # an unknown protocol, or one whose package is not installed
        raise UserError(f"`{path}` cannot be opened: {error}") from error
    return fs, root


def _what(fs: Any, root: str, path: str) -> str:
    """Return `file`, `directory`, or '' where there is nothing. (`fs.isfile` takes a fault for a no.)"""

    def ask() -> str:
        try:
            return str(fs.info(root)["type"])
        except (FileNotFoundError, NotADirectoryError):
            return ""

    return attempt(path, ask, retry="file" not in fs.protocol)


def _tree(fs: Any, root: str, path: str, depth: int | None = None, hidden: bool = False) -> list[str]:
    """Return the files below a folder, down to `depth`. (`fs.find` and `fs.glob` leave out what they fail to list.)

    hidden: names that start with `.` or `_` too.
    """
    found = []
    for entry in attempt(path, lambda: fs.ls(root, detail=True), retry="file" not in fs.protocol):
        name = entry["name"].rstrip("/")
        if name == root.rstrip("/") or (not hidden and os.path.basename(name).startswith((".", "_"))):
            continue
        if entry["type"] != "directory":
            found.append(name)
        elif depth is None or depth > 1:
            found += _tree(fs, name, path, None if depth is None else depth - 1, hidden)
    return found


def _matches(fs: Any, pattern: str, path: str) -> list[str]:
    """Return the files that match a glob."""
    from fsspec.utils import glob_translate

    parts = pattern.split("/")
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root = "/".join(parts[:fixed]) or "/"
    if not _what(fs, root, path):
        return []
    try:
        matching = re.compile(glob_translate(pattern))
    except ValueError as error:
        raise UserError(f"`{path}`: {error}") from error
    names = _tree(fs, root, path, None if "**" in pattern else len(parts) - fixed, hidden=True)
    return [name for name in names if matching.match(name)]


def _files(path: str, kind: str | None = None) -> list[File]:
    """Return the files of a path, a glob or a folder (those of one type, if given), sorted by name.

    Names in folders that start with `.` or `_` are passed over. Raises UserError when there is none.
    """
    fs, root = _file_system(path)
    tried = "" if "://" in path or os.path.isabs(path) else f" (tried {root})"
    what = _what(fs, root, path)
    if what == "file":
        names, missing = [root], ""
    elif what == "directory":
        names = [p for p in _tree(fs, root, path) if kind is None or p.lower().endswith(SUFFIXES[kind])]
        missing = f"`{path}` has no files" + (f" of type {kind} ({', '.join(SUFFIXES[kind])})" if kind else "")
    elif glob.has_magic(root):
        names, missing = _matches(fs, root, path), f"no file matches `{path}`{tried}"
    else:
        names, missing = [], f"`{path}` is not there{tried}"
    if not names:
        raise UserError(missing)
    return [File(fs, name) for name in sorted(names)]


def _shards(spec: SourceSpec, kind: str, shards: type[FileShards]) -> list[Table]:
    """Return one table of all files of a source, of which none is read whole."""
    return [ShardTable(spec.path, shards(_files(spec.path, kind), int(spec.cache_gb * 1e9)))]


def _parquet(spec: SourceSpec) -> list[Table]:
    if spec.stream:
        return _shards(spec, "parquet", ParquetShards)
    return [ParquetTable(f) for f in _files(spec.path, "parquet")]


def _jsonl(spec: SourceSpec) -> list[Table]:
    if spec.stream:
        return _shards(spec, "jsonl", JsonLinesShards)
    return [JsonLinesTable(f) for f in _files(spec.path, "jsonl")]


def _webdataset(spec: SourceSpec) -> list[Table]:
    return _shards(spec, "webdataset", TarShards)


def _mds(spec: SourceSpec) -> list[Table]:
    """Open the shards that the index of an MDS folder lists. Raises UserError when it is none, or cannot be read."""
    fs, root = _file_system(spec.path)
    listing = File(fs, f"{root.rstrip('/')}/{MDS_INDEX}")
    files, entries = [], []
    try:
        content = json.loads(listing.content())
        for entry in content["shards"]:
            if (entry["format"], entry["version"]) != ("mds", 2):
                raise UserError(f"`{listing.label}` lists shards of {entry['format']} {entry['version']}, not of mds 2")
            plain = File(fs, f"{root}/{entry['raw_data']['basename']}")
            packed = File(fs, f"{root}/{entry['zip_data']['basename']}") if entry["zip_data"] else plain
            if ".." in (*plain.path.split("/"), *packed.path.split("/")):
                raise UserError(f"`{listing.label}` lists `{packed.path}`, which is not in its folder")
            if packed is not plain and plain.local and os.path.exists(plain.path):
                packed = plain
            if packed is not plain and not packed.path.endswith(COMPRESSED):
                raise UserError(f"`{packed.label}` is compressed by {entry['compression']}: only zstd and gz are read")
            files.append(packed)
            entries.append(entry)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"`{listing.label}` is no index of MDS shards: {type(error).__name__} {error}") from error
    return [ShardTable(spec.path, MdsShards(files, int(spec.cache_gb * 1e9), entries))]


def _csv(spec: SourceSpec) -> list[Table]:
    import pyarrow as pa
    from pyarrow import csv

    tables: list[Table] = []
    for file in _files(spec.path, "csv"):
        content = pa.BufferReader(file.content())
        parse = csv.ParseOptions(delimiter="\t" if ".tsv" in file.path.lower() else ",", newlines_in_values=True)
        try:
            # One thread, because only then does a message give the number of the row.
            table = csv.read_csv(content, csv.ReadOptions(use_threads=False), parse)
        except pa.ArrowException as error:
            raise UserError(f"`{file.label}`: {error}") from error
        tables.append(ArrowTable(file.label, table, [file], file.folder))
    return tables


def _text(spec: SourceSpec) -> list[Table]:
    files = _files(spec.path, "text")
    texts = []
    for file in files:
        try:
            texts.append(file.content().decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise UserError(f"`{file.label}` is not UTF-8 text: {error}") from error
    if not any(map(str.strip, texts)):
        raise UserError(f"`{spec.path}` has no text in it")
    return [DocumentTable(spec.path, files, {"text": texts})]


def _images(spec: SourceSpec) -> list[Table]:
    files = _files(spec.path, "images")
    values = {"image": [f.label for f in files]}
    fs, root = _file_system(spec.path)
    if fs.isdir(root):
        parts = [f.path[len(root) :].strip("/").split("/") for f in files]
        if len({len(p) > 1 for p in parts}) > 1:
            loose = next(f for f, p in zip(files, parts, strict=True) if len(p) == 1)
            raise UserError(
                f"`{spec.path}` has pictures in folders, one for each class, and beside them `{loose.label}`"
            )
        if len(parts[0]) > 1:
            values["label"] = [p[0] for p in parts]
    return [DocumentTable(spec.path, files, values)]


def _arrow(spec: SourceSpec) -> list[Table]:
    import datasets

    fs, root = _file_system(spec.path)
    if not fs.isdir(root):
        return [t for f in _files(spec.path) for t in _dataset(spec, partial(datasets.Dataset.from_file, f.path))]
    return _dataset(spec, lambda: datasets.load_from_disk(spec.path))


def _hub(spec: SourceSpec) -> list[Table]:
    import datasets

    name, _, config = spec.path.partition(":")
    if spec.stream:
        return _hub_stream(spec, _loaded(spec, lambda: datasets.load_dataset_builder(name, config or None)))
    return _dataset(spec, lambda: datasets.load_dataset(name, config or None))


def _hub_stream(spec: SourceSpec, builder: Any) -> list[Table]:
    """Stream a Hub data set: its Parquet files by themselves, where it has them, else what the library iterates."""
    if builder.config.data_files:
        paths = builder.config.data_files[_split(spec, list(builder.config.data_files))]
        if all(path.endswith(SUFFIXES["parquet"]) for path in paths):
            files = [File(*_file_system(path)) for path in paths]
            return [ShardTable(spec.path, ParquetShards(files, int(spec.cache_gb * 1e9)))]
    found = _loaded(spec, builder.as_streaming_dataset)
    split = _split(spec, list(found))
    identity = f"{builder.hash} {builder.config_id} {split}"
    return [ShardTable(spec.path, IterableShards(spec.path, found[split], identity))]


def _loaded(spec: SourceSpec, load: Callable[[], Any]) -> Any:
    """Load something by the `datasets` library. Raises UserError with the library's reason."""
    try:
        return load()
    except Exception as error:  # the library lets through what its many back ends raise
        reason = (str(error).splitlines() or [""])[0]
        here = f"is no file or folder (tried {os.path.abspath(spec.path)}) and " if _HUB_ID.fullmatch(spec.path) else ""
        raise UserError(f"`{spec.path}` {here}could not be loaded: {type(error).__name__}: {reason}") from error


def _split(spec: SourceSpec, names: Sequence[str]) -> str:
    """Return the split that is meant. Raises UserError that lists them."""
    split = spec.split or (names[0] if len(names) == 1 else "")
    if split not in names:
        wrong = f"no split `{split}`.{did_you_mean(split, names)}" if split else "several splits"
        raise UserError(f"`{spec.path}` has {wrong} Choose one by `split`: {', '.join(names)}")
    return split


def _dataset(spec: SourceSpec, load: Callable[[], Any]) -> list[Table]:
    """Make a table of what the `datasets` library loads, whose data stay mapped from disk."""
    import datasets
    import fsspec

    found = _loaded(spec, load)
    if isinstance(found, datasets.DatasetDict):
        found = found[_split(spec, list(found))]
    elif spec.split:
        raise UserError(f"`{spec.path}` is one data set without splits: leave `split` out")
    local = fsspec.filesystem("file")
    files = [File(local, f["filename"]) for f in found.cache_files]
    return [
        ArrowTable(spec.path, found.with_format("arrow")[:], files, os.path.dirname(files[0].path) if files else "")
    ]


def _sklearn(spec: SourceSpec) -> list[Table]:
    from sklearn import datasets

    name = spec.path.removeprefix("sklearn:")
    if name not in SKLEARN:
        raise UserError(f"`{spec.path}`: no such bundled set.{did_you_mean(name, SKLEARN)}")
    bunch = getattr(datasets, f"load_{name}")()
    if name == "digits":  # 17 levels of grey, to the 256 of a picture
        arrays = {"image": np.rint(bunch.images * (255 / 16)).astype(np.uint8), "label": bunch.target}
    else:
        arrays = {"features": bunch.data.astype(np.float32), "label": np.asarray(bunch.target_names)[bunch.target]}
    return [ArrayTable(spec.path, arrays)]


def _noise(spec: SourceSpec) -> list[Table]:
    """Make rows that hold nothing but their numbers, for objectives that make their data themselves."""
    count = spec.path.removeprefix("noise:").replace("_", "")
    if not count.isdigit() or int(count) < 1:
        raise UserError(f"`{spec.path}`: write how many draws an epoch has, such as `noise:100_000`")
    return [ArrayTable(spec.path, {"draw": np.arange(int(count))})]


_OPEN: dict[str, Callable[[SourceSpec], list[Table]]] = {
    "parquet": _parquet,
    "jsonl": _jsonl,
    "csv": _csv,
    "text": _text,
    "images": _images,
    "arrow": _arrow,
    "hub": _hub,
    "sklearn": _sklearn,
    "noise": _noise,
    "webdataset": _webdataset,
    "mds": _mds,
}
