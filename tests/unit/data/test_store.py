"""Flaky and refusing stores, and the local cache: its limit, its order, copies that go while they are read."""

from __future__ import annotations

import gzip
import json
import os
import threading
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from scaletrain.config import SourceSpec
from scaletrain.data import shards, store
from scaletrain.data.cache import cache_root
from scaletrain.data.sources import Rows, open_rows
from scaletrain.data.tables import File
from scaletrain.errors import UserError

RECORDS = [{"text": f"sentence {i}", "label": i % 3} for i in range(50)]


class Flaky(MemoryFileSystem):  # type: ignore[misc]
    """A store in memory each of whose calls fails `faults` times before it works. calls: of each, with its path."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    cachable = False
    faults: ClassVar[int] = 0
    calls: ClassVar[dict[tuple[str, str], int]] = {}
    fetched: ClassVar[int] = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("flaky://").strip("/")

    def _call(self, what: str, path: str) -> None:
        key = what, self._strip_protocol(path)
        self.calls[key] = self.calls.get(key, 0) + 1
        if self.calls[key] <= self.faults:
            raise ConnectionError("the line is busy")

    def info(self, path: str, **options: Any) -> Any:
        self._call("info", path)
        return super().info(path, **options)

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        self._call("ls", path)
        return super().ls(path, detail, **options)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        self._call("cat", f"{path} {start}")
        if self._strip_protocol(path) not in self.store:
            raise FileNotFoundError(path)
        content: bytes = self.store[self._strip_protocol(path)].getvalue()[start:end]
        Flaky.fetched += len(content)
        return content

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "rb":
            self._call("open", path)
        return super().open(path, mode, **options)


@pytest.fixture(autouse=True)
def flaky(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Flaky:
    monkeypatch.setattr(store, "WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setenv("SCALETRAIN_CACHE", str(tmp_path / "cache"))
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.store, Flaky.pseudo_dirs, Flaky.calls, Flaky.faults, Flaky.fetched = {}, [""], {}, 0, 0
    return Flaky()


def put(fs: Any, path: str, records: list[dict[str, Any]], groups: int = 10) -> None:
    if path.endswith(".parquet"):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(records), sink, row_group_size=groups)
        content = sink.getvalue().to_pybytes()
    else:
        content = "".join(json.dumps(r) + "\n" for r in records).encode()
    fs.pipe_file(path, gzip.compress(content) if path.endswith(".gz") else content)


def stream(path: str, **options: Any) -> Rows:
    return open_rows([SourceSpec(path=path, stream=True, **options)])


@pytest.mark.parametrize("end", ["parquet", "jsonl", "jsonl.gz"])
@pytest.mark.parametrize("path", ["flaky://bucket/data", "flaky://bucket/data/*", "flaky://bucket/data/0.{end}"])
def test_three_faults_of_each_call_are_survived(flaky: Flaky, end: str, path: str) -> None:
    for shard in range(2):
        put(flaky, f"/bucket/data/{shard}.{end}", RECORDS)
    Flaky.faults, Flaky.calls = 3, {}
    rows = stream(path.format(end=end))
    assert [rows.row(i) for i in range(len(rows))] == RECORDS * (1 if "0." in path else 2)
    assert rows.name(49).startswith(f"flaky:///bucket/data/0.{end} ")


def test_faults_are_survived_by_what_is_read_whole(flaky: Flaky) -> None:
    flaky.pipe_file("/bucket/a.csv", b"n,text\n1,a\n")
    flaky.pipe_file("/bucket/b.txt", b"some text")
    entry = {"format": "mds", "version": 2, "samples": 0, "zip_data": None, "column_names": ["n"], "column_sizes": [8]}
    entry |= {"column_encodings": ["int"], "raw_data": {"basename": "0.mds", "bytes": 8}}
    flaky.pipe_file("/bucket/mds/index.json", json.dumps({"shards": [entry]}).encode())
    flaky.pipe_file("/bucket/mds/0.mds", bytes(8))
    Flaky.faults, Flaky.calls = 3, {}
    rows = open_rows([SourceSpec(path="flaky://bucket/a.csv")])
    assert rows.row(0) == {"n": 1, "text": "a"}
    Flaky.calls = {}
    assert len(rows.fingerprint) == 64
    assert open_rows([SourceSpec(path="flaky://bucket/b.txt")]).row(0) == {"text": "some text"}
    with pytest.raises(UserError, match="has no rows"):
        open_rows([SourceSpec(path="flaky://bucket/mds")])


def test_a_store_that_refuses_is_named_after_three_retries(flaky: Flaky) -> None:
    put(flaky, "/bucket/a.parquet", RECORDS)
    Flaky.faults, Flaky.calls = 1000, {}
    with pytest.raises(
        UserError, match=r"`flaky://bucket/a\.parquet` cannot be read after 3 retries: the line is busy"
    ):
        stream("flaky://bucket/a.parquet")
    assert list(Flaky.calls.values()) == [4]


def test_what_a_store_says_is_not_there_is_not_asked_for_again(flaky: Flaky) -> None:
    with pytest.raises(UserError, match=r"`flaky://bucket/b\.parquet` is not there"):
        stream("flaky://bucket/b.parquet")
    assert max(Flaky.calls.values()) < 4
    put(flaky, "/bucket/a.parquet", RECORDS)
    rows = stream("flaky://bucket/a.parquet")
    del Flaky.store["/bucket/a.parquet"]
    Flaky.calls = {}
    with pytest.raises(UserError, match=r"`flaky:///bucket/a\.parquet` is not there \(any more\)"):
        rows.row(0)
    assert list(Flaky.calls.values()) == [1]


def test_only_the_wanted_columns_of_a_remote_parquet_are_fetched(flaky: Flaky) -> None:
    wide = [{"text": "x", "image": os.urandom(5000)} for _ in range(100)]
    put(flaky, "/bucket/a.parquet", wide)
    rows = stream("flaky://bucket/a.parquet")
    before = Flaky.fetched
    assert list(rows.column("text")) == ["x"] * 100
    assert Flaky.fetched - before < 5000
    assert rows.take(["image"], np.array([0, 99]))["image"] == [wide[0]["image"], wide[99]["image"]]
    assert Flaky.fetched - before > 2 * 10 * 5000


def copies() -> set[int]:
    return {p.stat().st_size for p in (cache_root() / "shards").iterdir() if p.suffix != ".lock"}


def test_the_cache_keeps_to_its_limit_and_loses_the_least_recent_first(flaky: Flaky) -> None:
    def use(size: int, limit: int = 9500) -> None:
        if not flaky.exists(f"/bucket/{size}"):
            flaky.pipe_file(f"/bucket/{size}", bytes(size))
        file = File(flaky, f"/bucket/{size}")
        with store.opened(file, store.version(file), limit) as content:
            assert content.read() == bytes(size)
        for path in (cache_root() / "shards").iterdir():  # a second later
            os.utime(path, (0, path.stat().st_mtime - 1))

    for size in (3000, 4000, 3000):
        use(size)
    assert copies() == {3000, 4000}
    use(5000)
    assert copies() == {3000, 5000}  # 4000 was used longest ago
    assert Flaky.calls["open", "/bucket/3000"] == 1
    use(4000)
    assert copies() == {4000, 5000}
    use(3000, limit=1)
    assert copies() == {3000}  # larger than the limit, but the newest stays


def test_a_copy_that_goes_stays_readable_and_is_fetched_again(flaky: Flaky) -> None:
    put(flaky, "/bucket/a.jsonl", RECORDS)
    rows = stream("flaky://bucket/a.jsonl")
    file = File(flaky, "/bucket/a.jsonl")
    with store.opened(file, store.version(file), 10**9) as held:
        for path in (cache_root() / "shards").iterdir():
            path.unlink()
        assert len(held.read().splitlines()) == 50
    assert rows.row(3) == RECORDS[3]
    assert Flaky.calls["open", "/bucket/a.jsonl"] == 2


def test_a_copy_that_was_left_half_written_is_not_read_and_goes(flaky: Flaky) -> None:
    folder = cache_root() / "shards"
    folder.mkdir(parents=True)
    for name, age in ((".part-old", 10_000), (".part-new", 0)):
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (folder.stat().st_mtime - age,) * 2)
    put(flaky, "/bucket/a.jsonl", RECORDS)
    assert len(stream("flaky://bucket/a.jsonl")) == 50
    assert {p.name for p in folder.iterdir() if p.name.startswith(".part")} == {".part-new"}


def test_a_copy_is_fetched_once_by_many_and_again_when_the_origin_changes(flaky: Flaky) -> None:
    put(flaky, "/bucket/a.jsonl.gz", RECORDS)
    file = File(flaky, "/bucket/a.jsonl.gz")
    of = store.version(file)
    Flaky.calls = {}
    threads = [threading.Thread(target=lambda: store.opened(file, of, 10**9).close()) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Flaky.calls["open", "/bucket/a.jsonl.gz"] == 1
    put(flaky, "/bucket/a.jsonl.gz", RECORDS[:7])
    assert len(stream("flaky://bucket/a.jsonl.gz")) == 7


@pytest.mark.parametrize("where", ["store", "disk"])
def test_a_copy_is_never_of_another_version(flaky: Flaky, tmp_path: Path, where: str) -> None:
    """The file changes in the midst of a run, and its copy has been evicted."""
    fs, path = (
        (flaky, "/bucket/a.jsonl.gz") if where == "store" else (fsspec.filesystem("file"), f"{tmp_path}/a.jsonl.gz")
    )
    put(fs, path, RECORDS)
    rows = stream("flaky://bucket/a.jsonl.gz" if where == "store" else path)
    put(fs, path, [{**r, "label": 9} for r in RECORDS])
    assert rows.row(0) == RECORDS[0]
    for copy in (cache_root() / "shards").iterdir():
        copy.unlink()
    shards._chunks = shards.Chunks()
    with pytest.raises(UserError, match=r"a\.jsonl\.gz` has changed since it was indexed"):
        rows.row(0)
    assert copies() == set()
    assert stream("flaky://bucket/a.jsonl.gz" if where == "store" else path).row(0) == {**RECORDS[0], "label": 9}


def test_a_copy_that_breaks_off_is_begun_anew(flaky: Flaky, monkeypatch: pytest.MonkeyPatch) -> None:
    put(flaky, "/bucket/a.jsonl", RECORDS)
    whole = store.shutil.copyfileobj
    broken = []

    def breaks(source: Any, out: Any, length: int) -> None:
        if not broken:
            broken.append(out.write(b"x" * 99_999))
            raise ConnectionResetError("the line went dead")
        whole(source, out, length)

    monkeypatch.setattr(store.shutil, "copyfileobj", breaks)
    assert [len(stream("flaky://bucket/a.jsonl")), len(broken)] == [50, 1]


def test_no_room_for_a_copy_is_told(flaky: Flaky, monkeypatch: pytest.MonkeyPatch) -> None:
    put(flaky, "/bucket/a.jsonl", RECORDS)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.shutil, "copyfileobj", full)
    with pytest.raises(UserError, match=r"no room for a copy of `flaky:///bucket/a\.jsonl` in .*cache_gb"):
        stream("flaky://bucket/a.jsonl")
    assert not any(p.name.startswith(".part") for p in (cache_root() / "shards").iterdir())


@pytest.mark.parametrize("end", ["gz", "zst"])
def test_a_compressed_shard_that_is_cut_off_is_named(tmp_path: Path, end: str) -> None:
    path = tmp_path / f"a.jsonl.{end}"
    with pa.CompressedOutputStream(str(path), "gzip" if end == "gz" else "zstd") as out:
        out.write(os.urandom(10_000).hex().encode())
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=rf"a\.jsonl\.{end}` cannot be read"):
        stream(str(path))
