"""Streams against what other libraries wrote; faults by name; chunks in memory under threads, forks and a limit."""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import os
import pickle
import tarfile
import threading
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from scaletrain.config import SourceSpec
from scaletrain.data import shard_readers, shards
from scaletrain.data.images import ImageDataset
from scaletrain.data.sources import Rows, open_rows, split_holdout
from scaletrain.errors import UserError

RECORDS = [{"text": f"sentence {i} " + "ä" * (i % 7), "label": i % 3} for i in range(103)]
SHARDS = (40, 1, 62)
"""Rows of each."""
FORMATS = ("parquet", "jsonl", "jsonl.gz", "jsonl.zst", "tar", "mds")
Record = dict[str, Any]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Make chunks of a few rows, and keep no index between tests."""
    monkeypatch.setattr(shard_readers, "JSON_CHUNK", 200)
    monkeypatch.setattr(shard_readers, "SAMPLES_CHUNK", 1000)
    monkeypatch.setattr(shards, "_chunks", shards.Chunks())
    monkeypatch.setenv("SCALETRAIN_CACHE", str(tmp_path / "cache"))


def stream(path: object, **options: Any) -> Rows:
    return open_rows([SourceSpec(path=str(path), stream=True, **options)])


def fault(path: object, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        stream(path, **options)
    return str(caught.value)


def write_tar(path: Path, samples: Sequence[tuple[str, dict[str, bytes]]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, content in members.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_mds(folder: Path, parts: Sequence[Sequence[bytes]], columns: dict[str, tuple[str, int | None]]) -> None:
    """Write shards as the format's description says; samples are given encoded."""
    folder.mkdir()
    listed = []
    for number, samples in enumerate(parts):
        name = f"shard.{number:05}.mds"
        about = {
            "column_names": list(columns), "column_encodings": [c[0] for c in columns.values()],
            "column_sizes": [c[1] for c in columns.values()], "compression": None, "format": "mds", "hashes": [],
            "samples": len(samples), "size_limit": 1 << 26, "version": 2, "zip_data": None,
        }  # fmt: skip
        head = json.dumps(about, sort_keys=True).encode()
        begin = 4 + 4 * (len(samples) + 1) + len(head)
        offsets = np.cumsum([begin, *map(len, samples)]).astype("<u4")
        content = np.uint32(len(samples)).tobytes() + offsets.tobytes() + head + b"".join(samples)
        (folder / name).write_bytes(content)
        listed.append(about | {"raw_data": {"basename": name, "bytes": len(content), "hashes": {}}})
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": listed}))


def write(folder: Path, kind: str, records: Sequence[Record] = RECORDS, sizes: Sequence[int] = SHARDS) -> Path:
    """Write records to shards; return what is opened."""
    rest = iter(records)
    parts = [list(islice(rest, size)) for size in sizes]
    if kind == "mds":
        encoded = [[r["text"].encode() for r in part] for part in parts]
        samples = [
            [np.uint32(len(t)).tobytes() + t + np.int64(r["label"]).tobytes() for t, r in zip(texts, part, strict=True)]
            for texts, part in zip(encoded, parts, strict=True)
        ]
        write_mds(folder / "data", samples, {"text": ("str", None), "label": ("int", 8)})
        return folder / "data"
    (folder / "data").mkdir()
    for number, part in enumerate(parts):
        path = folder / f"data/{number}.{kind}"
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(part), path, row_group_size=9)
        elif kind == "tar":
            samples_ = [
                (f"s/{number}-{i}", {"txt": r["text"].encode(), "cls": b"%d" % r["label"]}) for i, r in enumerate(part)
            ]
            write_tar(path, samples_)
        else:
            content = "".join(json.dumps(r) + "\n" for r in part).encode()
            if kind == "jsonl":
                path.write_bytes(content)
            else:
                with pa.CompressedOutputStream(str(path), {"gz": "gzip", "zst": "zstd"}[kind[6:]]) as out:
                    out.write(content)
    return folder / "data"


ROLES = {"tar": {"text": "txt", "label": "cls"}}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_stream_gives_the_records_that_were_written(tmp_path: Path, kind: str) -> None:
    rows = stream(write(tmp_path, kind), columns=ROLES.get(kind, {}))
    assert rows.streaming
    assert len(rows) == rows.chunks.sum() == 103
    assert len(rows.chunks) > len(SHARDS)
    texts, labels = [r["text"] for r in RECORDS], [r["label"] for r in RECORDS]
    assert list(rows.column("text")) == texts
    assert rows.column("label")[5:100:7] == labels[5:100:7]
    assert rows.column("text")[-1] == texts[-1]
    drawn = np.random.default_rng(0).integers(0, 103, 500)
    taken = rows.take(["label", "text"], drawn)
    assert taken == {"label": [labels[i] for i in drawn], "text": [texts[i] for i in drawn]}
    assert rows.row(40)["text"] == texts[40]
    assert rows.take(["text"], drawn[:0]) == {"text": []}
    for wrong in ([103], [-1]):
        with pytest.raises(IndexError):
            rows.take(["text"], np.array(wrong))
    copy = pickle.loads(pickle.dumps(rows))  # as worker processes get it
    assert copy.take(["text"], drawn)["text"] == taken["text"]


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_that_are_held_are_read_once(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = stream(write(tmp_path, kind), columns=ROLES.get(kind, {}))
    drawn = np.random.default_rng(0).permutation(103)[:60]
    held = rows.held(drawn)
    asked = []
    take = shards.ShardTable.take
    monkeypatch.setattr(shards.ShardTable, "take", lambda self, n, r: asked.append(len(r)) or take(self, n, r))
    texts = [held.take(["text"], part)["text"] for part in np.split(drawn, 6)]
    assert [text for part in texts for text in part] == [RECORDS[i]["text"] for i in drawn]
    assert held.take(["label"], drawn[:10])["label"] == [RECORDS[i]["label"] for i in drawn[:10]]
    assert asked == [60, 60]
    others = drawn[::-1][:7]
    assert held.take(["text"], others) == rows.take(["text"], others)
    assert asked[2:] == [7, 7]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz", "jsonl.zst"])
def test_a_stream_is_the_same_as_the_table_in_memory(tmp_path: Path, kind: str) -> None:
    nested = [{"m": [{"role": "user", "content": str(i)}], "x": None if i % 5 else i / 3, "i": i} for i in range(103)]
    path = write(tmp_path, kind, nested)
    whole = open_rows([SourceSpec(path=str(path))])
    rows = stream(path)
    assert rows.columns == whole.columns
    assert [rows.row(i) for i in range(103)] == [whole.row(i) for i in range(103)]
    assert [rows.name(i) for i in range(103)] == [whole.name(i) for i in range(103)]
    some = np.array([99, 3, 3, 50])
    assert whole.take(["m", "i"], some) == rows.take(["m", "i"], some)
    assert whole.chunks.tolist() == [103]
    assert not whole.streaming
    whole.prefetch(some)


@pytest.mark.parametrize(("kind", "names"), [
    ("parquet", {0: "0.parquet row 0", 39: "0.parquet row 39", 40: "1.parquet row 0", 102: "2.parquet row 61"}),
    ("jsonl.gz", {0: "0.jsonl.gz line 1", 40: "1.jsonl.gz line 1", 102: "2.jsonl.gz line 62"}),
    ("tar", {0: "0.tar sample s/0-0", 40: "1.tar sample s/1-0", 102: "2.tar sample s/2-61"}),
    ("mds", {0: "shard.00000.mds row 0", 102: "shard.00002.mds row 61"}),
])  # fmt: skip
def test_rows_say_where_they_stand(tmp_path: Path, kind: str, names: dict[int, str]) -> None:
    rows = stream(write(tmp_path, kind))
    for row, name in names.items():
        assert rows.name(row).endswith("/data/" + name)
    assert rows.folder(50) == str(tmp_path / "data")


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"n": 1}\r\n\r\n \t\n  {"n": 2}\n' + b"\n" * 300 + b'\n{"n": 3}')
    rows = stream(tmp_path / "a.jsonl")
    assert list(rows.column("n")) == [1, 2, 3]
    assert [rows.name(i).split()[-1] for i in range(3)] == ["1", "4", "306"]


@pytest.mark.parametrize("bad", [b'{"n": ', b"[1, 2]", b'{"n": "\xff"}'])
def test_a_line_that_is_no_object_is_told_when_it_is_read(tmp_path: Path, bad: bytes) -> None:
    lines = [b'{"n": %d}' % i for i in range(100)]
    lines[70] = bad
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    rows = stream(tmp_path / "a.jsonl")
    assert rows.take(["n"], np.array([69, 71])) == {"n": [69, 71]}
    with pytest.raises(UserError, match=r"a\.jsonl line 71 is not "):
        rows.row(70)
    lines[0] = bad
    (tmp_path / "b.jsonl").write_bytes(b"\n".join(lines))
    assert "b.jsonl line 1 is not " in fault(tmp_path / "b.jsonl")


@pytest.mark.parametrize("kind", ["parquet", "mds"])
def test_shards_that_declare_other_columns_are_named(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    if kind == "parquet":
        pq.write_table(pa.table({"text": ["a"], "lable": [0]}), path / "1.parquet")
        names = ("0.parquet", "1.parquet", "label")
    else:
        index = json.loads((path / "index.json").read_text())
        index["shards"][1]["column_names"] = ["text", "lable"]
        (path / "index.json").write_text(json.dumps(index))
        names = ("shard.00000.mds", "shard.00001.mds", "label")
    message = fault(path)
    assert f"{names[1]}` (unlike `{path / names[0]}`) has no column `{names[2]}`" in message


def test_a_key_that_some_jsonl_shard_never_has_is_told_when_it_is_needed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "extra": 1}\n{"text": "b"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "c"}\n')
    rows = stream(tmp_path)
    assert rows.columns == ("text",)
    with pytest.raises(UserError, match=r"b\.jsonl` \(unlike `.*a\.jsonl`\) has no column `extra`"):
        rows.require("extra", "anything")
    assert "unlike" in fault(tmp_path, columns={"label": "extra"})
    assert list(stream(tmp_path / "a.jsonl").column("extra")) == [1, None]


@pytest.mark.parametrize("kind", FORMATS)
def test_an_empty_shard_is_skipped_and_told(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "scaletrain")
    if kind == "parquet":
        path = tmp_path / "data"
        path.mkdir()
        for i, n in enumerate((40, 0, 63)):
            pq.write_table(pa.table({"text": ["x"] * n, "label": [1] * n}), path / f"{i}.parquet")
    else:
        path = write(tmp_path, kind, sizes=(40, 0, 63))
    rows = stream(path)
    assert len(rows) == 103
    assert len([m for m in caplog.messages if "has no rows" in m]) == 1
    assert rows.name(40).split()[0].endswith(("2." + kind, "00002.mds"))
    for file in path.iterdir():
        if file.name != "index.json" and not file.name.startswith(("1.", "shard.00001")):
            file.unlink()
    if kind == "mds":
        index = json.loads((path / "index.json").read_text())
        (path / "index.json").write_text(json.dumps(index | {"shards": index["shards"][1:2]}))
    assert f"`{path}` has no rows" in fault(path)


def test_an_empty_tar_file_is_an_empty_shard(tmp_path: Path) -> None:
    path = write(tmp_path, "tar")
    (path / "3.tar").write_bytes(b"")
    assert len(stream(path)) == 103


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "tar", "mds"])
@pytest.mark.parametrize("how", ["gone", "truncated"])
def test_a_shard_that_goes_or_is_cut_off_in_mid_run_is_named(tmp_path: Path, kind: str, how: str) -> None:
    path = write(tmp_path, kind)
    rows = stream(path, columns=ROLES.get(kind, {}))
    assert rows.row(102)["label"] == RECORDS[102]["label"]
    shards._chunks = shards.Chunks()
    shard = next(path.glob("*2.*"))
    if how == "gone":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    rows.prefetch(np.array([102]))
    assert rows.row(0)["label"] == RECORDS[0]["label"]
    with pytest.raises(UserError, match=shard.name):
        rows.row(102)


def test_a_parquet_that_is_replaced_in_mid_run_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "parquet")
    rows = stream(path)
    pq.write_table(pa.table({"text": ["new"] * 500, "label": [5] * 500}), path / "0.parquet", row_group_size=9)
    with pytest.raises(UserError, match=r"0\.parquet` has [\d,]+ bytes; it had [\d,]+ when it was indexed"):
        rows.row(0)


def test_a_parquet_that_is_replaced_by_one_of_the_same_size_is_read_anew(tmp_path: Path) -> None:
    pq.write_table(pa.table({"one": [1, 2, 3]}), tmp_path / "a.parquet")
    first, size = stream(tmp_path / "a.parquet"), (tmp_path / "a.parquet").stat().st_size
    pq.write_table(pa.table({"two": [1, 2, 3]}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size == size
    second = stream(tmp_path / "a.parquet")
    assert second.columns == ("two",)
    assert second.fingerprint != first.fingerprint


def test_broken_shards_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, "parquet")
    content = bytearray((path / "2.parquet").read_bytes())
    content[10:200] = b"\xff" * 190
    (path / "2.parquet").write_bytes(content)
    rows = stream(path)
    with pytest.raises(UserError, match=r"2\.parquet` cannot be read as Parquet"):
        list(rows.column("text"))
    (path / "2.parquet").write_bytes(b"PAR1 no")
    assert "2.parquet` cannot be read as Parquet" in fault(path)
    write_tar(tmp_path / "a.tar", [(str(i), {"txt": b"x" * 600}) for i in range(4)])
    broken = bytearray((tmp_path / "a.tar").read_bytes())
    broken[2 * 1536 : 2 * 1536 + 8] = b"\xff" * 8
    (tmp_path / "a.tar").write_bytes(broken)
    assert "a.tar` cannot be read as a tar: no header at byte 3,072" in fault(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(b"no tar" * 1000)
    assert "a.tar` cannot be read as a tar" in fault(tmp_path / "a.tar")
    write_tar(tmp_path / "a.tar", [("x", {"txt": b"1"})])
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes() * 2)
    assert "a.tar` goes on after its end at byte 1,024: give joined tars as several" in fault(tmp_path / "a.tar")
    write_tar(tmp_path / "a.tar", [("x", {"txt": b"1"}), ("x", {"txt": b"2"})])
    assert "a.tar` sample x has two members .txt" in fault(tmp_path / "a.tar")


def test_the_fingerprint_follows_the_content_and_not_the_path(tmp_path: Path) -> None:
    for kind in FORMATS:
        (tmp_path / kind).mkdir()
        path = write(tmp_path / kind, kind)
        first = stream(path).fingerprint
        moved = path.rename(tmp_path / kind / "moved")
        assert stream(moved).fingerprint == first
        assert stream(moved, rows=50).fingerprint != first
        shards_ = sorted(p for p in moved.iterdir() if p.name != "index.json")
        if kind == "mds":
            continue
        shards_[0].rename(moved / f"9.{kind}")  # another order
        assert stream(moved).fingerprint != first
    changed = [*RECORDS[:-1], {**RECORDS[-1], "label": 9}]
    (tmp_path / "changed").mkdir()
    assert (
        stream(write(tmp_path / "changed", "jsonl", changed)).fingerprint
        != stream(tmp_path / "jsonl" / "moved").fingerprint
    )


def test_an_index_is_made_once_for_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    index = shard_readers.JsonLinesShards.index

    def counted(self: Any, shard: int) -> Any:
        made.append(shard)
        return index(self, shard)

    monkeypatch.setattr(shard_readers.JsonLinesShards, "index", counted)
    path = write(tmp_path, "jsonl")
    first = stream(path)
    assert sorted(made) == [0, 1, 2]
    second = stream(path)
    assert sorted(made) == [0, 1, 2]
    assert second.fingerprint == first.fingerprint
    assert list(second.column("text")) == list(first.column("text"))
    with (path / "1.jsonl").open("a") as out:
        out.write('{"text": "more", "label": 1}\n')
    assert len(stream(path)) == 104
    assert sorted(made) == [0, 1, 1, 2]


def test_an_index_is_made_anew_for_a_file_of_the_same_size_and_time(tmp_path: Path) -> None:
    found = []
    for content in ('{"n": 1}\n', '{"m": 2}\n'):
        (tmp_path / "a.jsonl").write_text(content)
        os.utime(tmp_path / "a.jsonl", (1, 1))  # as an unpacked archive gives it
        found.append(stream(tmp_path / "a.jsonl"))
    assert [rows.columns for rows in found] == [("n",), ("m",)]
    assert found[0].fingerprint != found[1].fingerprint


def test_limits_and_selections_keep_chunks_and_need_no_list_of_rows(tmp_path: Path) -> None:
    path = write(tmp_path, "parquet")  # row groups of 9: 9 9 9 9 4 | 1 | 9 9 9 9 9 9 8
    head = stream(path, rows=43)
    assert head._indices is None
    assert head.chunks.tolist() == [9, 9, 9, 9, 4, 1, 2]
    assert list(head.column("text")) == [r["text"] for r in RECORDS[:43]]
    assert head.name(42).endswith("2.parquet row 1")
    with pytest.raises(IndexError):
        head.take(["text"], np.array([43]))
    assert "fewer than" in fault(path, rows=104)
    both = open_rows([SourceSpec(path=str(path), stream=True, rows=10), SourceSpec(path=str(path), stream=True)])
    assert both._indices is None
    assert both.take(["label"], np.array([112, 9, 10]))["label"] == [RECORDS[i]["label"] for i in (102, 9, 0)]
    assert both.chunks[:3].tolist() == [9, 1, 9]
    some = stream(path).select([0, 1, 8, 9, 40, 41, 102, 8])
    assert some.chunks.tolist() == [3, 1, 1, 1, 1, 1]
    assert list(some.column("text")) == [RECORDS[i]["text"] for i in (0, 1, 8, 9, 40, 41, 102, 8)]
    assert some.select([7, 0]).take(["text"], np.array([0, 1]))["text"] == [RECORDS[8]["text"], RECORDS[0]["text"]]
    with pytest.raises(UserError, match=r"data\.eval"):
        split_holdout(stream(path), 0.5, 0)


def test_streams_and_tables_in_memory_are_joined_by_role(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sentence,label\nfirst,7\n")
    rows = open_rows([
        SourceSpec(path=str(tmp_path / "a.csv"), columns={"text": "sentence"}),
        SourceSpec(path=str(write(tmp_path, "tar")), columns=ROLES["tar"]),
    ])  # fmt: skip
    assert rows.streaming
    assert rows.columns == ("text", "label")
    assert rows.row(0) == {"text": "first", "label": 7}
    assert rows.take(["label", "text"], np.array([1, 0])) == {"label": [0, 7], "text": [RECORDS[0]["text"], "first"]}
    rows.prefetch(np.arange(104))
    assert list(rows.column("label")) == [7, *(r["label"] for r in RECORDS)]


def test_other_types_do_not_stream(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a\n1\n")
    assert "type csv, which does not stream; those that do: parquet, jsonl" in fault(tmp_path / "a.csv")


# --- WebDataset -------------------------------------------------------------------------------------------------------


def picture(colour: int, end: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (colour,) * 3).save(out, {"jpg": "jpeg"}.get(end, end))
    return out.getvalue()


def test_members_are_decoded_by_extension(tmp_path: Path) -> None:
    long = "folder/" * 30 + "sample"  # longer than a plain header holds
    write_tar(tmp_path / "a.tar", [
        (long, {"JSON": b'{"a": [1]}', "txt": "é".encode(), "index": b" 12\n", "npy": b"\x93N", "meta.json": b"[2]"}),
        ("._junk", {"txt": b"?"}), ("b", {"txt": b"x"}),
    ])  # fmt: skip
    rows = stream(tmp_path / "a.tar")
    assert rows.columns == ("__key__", "json", "txt", "index", "npy", "meta.json")
    assert rows.row(0) == {
        "__key__": long, "json": {"a": [1]}, "txt": "é", "index": 12, "npy": b"\x93N", "meta.json": [2]
    }  # fmt: skip
    assert rows.row(1) == dict.fromkeys(rows.columns) | {"__key__": "b", "txt": "x"}
    write_tar(tmp_path / "b.tar", [("x/y", {"cls": b"two"})])
    with pytest.raises(UserError, match=r"b\.tar sample x/y: \.cls cannot be decoded"):
        stream(tmp_path / "b.tar").row(0)


def test_pictures_of_a_tar_train_without_a_column_named(tmp_path: Path) -> None:
    ends = ("png", "jpg", "webp")
    write_tar(tmp_path / "a.tar", [(str(i), {ends[i % 3]: picture(40 * i, ends[i % 3])}) for i in range(6)])
    rows = open_rows([SourceSpec(path=str(tmp_path / "a.tar"))])  # has no other way than to stream
    assert rows.streaming
    data = ImageDataset(rows)
    assert [round(float(data.pixels(i).mean()), -1) for i in range(6)] == [0, 40, 80, 120, 160, 200]
    named = stream(tmp_path / "a.tar", columns={"image": "png"})
    assert [v is None for v in named.column("image")] == [False, True, True] * 2


# --- MDS --------------------------------------------------------------------------------------------------------------


def test_mds_encodings(tmp_path: Path) -> None:
    numbers = {"i8": np.int8(-3), "u16": np.uint16(65535), "f16": np.float16(0.5), "f64": np.float64(1e300)}
    raw = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    png = picture(9, "png")
    varying = [
        b"\x00\xff",
        json.dumps({"k": [1]}).encode(),
        np.array([2, 2, 3], "<u4").tobytes() + b"RGB" + raw.tobytes(),
        png,
    ]
    sample = np.array([len(v) for v in varying], "<u4").tobytes()
    sample += varying[0] + b"".join(v.tobytes() for v in numbers.values()) + b"".join(varying[1:])
    columns: dict[str, tuple[str, int | None]] = {"raw": ("bytes", None)}
    columns |= {k: (v.dtype.name, v.dtype.itemsize) for k, v in numbers.items()}
    columns |= {"json": ("json", None), "pil": ("pil", None), "png": ("png", None)}
    write_mds(tmp_path / "data", [[sample, sample]], columns)
    rows = open_rows([SourceSpec(path=str(tmp_path / "data"))])
    row = rows.row(1)
    np.testing.assert_array_equal(row.pop("pil"), raw)
    assert row == {"raw": b"\x00\xff", "json": {"k": [1]}, "png": png, "i8": -3, "u16": 65535, "f16": 0.5, "f64": 1e300}
    index = json.loads((tmp_path / "data/index.json").read_text())
    index["shards"][0]["column_encodings"][0] = "pkl"
    (tmp_path / "data/index.json").write_text(json.dumps(index))
    rows = open_rows([SourceSpec(path=str(tmp_path / "data"))])
    assert rows.take(["u16"], np.array([0])) == {"u16": [65535]}
    with pytest.raises(UserError, match=r"shard.00000.mds row 0: `raw` is encoded as pkl, which is not read"):
        rows.row(0)


@pytest.mark.parametrize(("name", "end"), [("zstd", "zstd"), ("zstd:7", "zstd"), ("gz:9", "gz")])
def test_compressed_mds_is_read_from_a_copy(tmp_path: Path, name: str, end: str) -> None:
    path = write(tmp_path, "mds")
    index = json.loads((path / "index.json").read_text())
    for entry in index["shards"]:
        plain = path / entry["raw_data"]["basename"]
        with pa.CompressedOutputStream(f"{plain}.{end}", "gzip" if end == "gz" else "zstd") as out:
            out.write(plain.read_bytes())
        plain.unlink()
        entry |= {"compression": name, "zip_data": {"basename": f"{plain.name}.{end}", "bytes": 1, "hashes": {}}}
    (path / "index.json").write_text(json.dumps(index))
    assert list(stream(path).column("text")) == [r["text"] for r in RECORDS]
    index["shards"][0] |= {"compression": "br", "zip_data": {"basename": "a.mds.br", "bytes": 1, "hashes": {}}}
    (path / "index.json").write_text(json.dumps(index))
    assert "a.mds.br` is compressed by br: only zstd and gz" in fault(path)


def test_an_index_keeps_to_its_folder(tmp_path: Path) -> None:
    path = write(tmp_path, "mds")
    (path / "shard.00000.mds").rename(tmp_path / "other.mds")
    index = json.loads((path / "index.json").read_text())
    index["shards"][0]["raw_data"]["basename"] = "../other.mds"
    (path / "index.json").write_text(json.dumps(index))
    assert "index.json` lists `" in (message := fault(path))
    assert "other.mds`, which is not in its folder" in message


def test_a_sample_that_is_cut_short_is_named(tmp_path: Path) -> None:
    write_mds(tmp_path / "data", [[np.uint32(1).tobytes() + b"a", b"\x00"]], {"text": ("str", None)})
    rows = open_rows([SourceSpec(path=str(tmp_path / "data"))])
    assert rows.row(0) == {"text": "a"}
    with pytest.raises(UserError, match=r"shard\.00000\.mds row 1 is broken: its columns do not fill it"):
        rows.row(1)


def test_an_index_that_is_none_is_told(tmp_path: Path) -> None:
    path = write(tmp_path, "mds")
    (path / "index.json").write_text('{"shards": [{}]}')
    assert "index.json` is no index of MDS shards: KeyError 'format'" in fault(path)
    (path / "index.json").write_text('{"shards": [{"format": "mds", "version": 2, "raw_data": {"basename": 3}}]}')
    assert "index.json` is no index of MDS shards" in fault(path)
    (path / "index.json").write_text("{")
    assert "index.json` is no index of MDS shards" in fault(path)


# --- `datasets` -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_a_hub_set_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    datasets = pytest.importorskip("datasets")
    path = write(tmp_path, "parquet" if kind == "parquet" else "jsonl")
    builder = datasets.load_dataset_builder(
        kind, data_files={"train": [str(p) for p in sorted(path.iterdir())]}, cache_dir=str(tmp_path / "hf")
    )
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: builder)
    rows = stream("some/set", type="hub")
    assert rows.chunks.tolist() == ([9, 9, 9, 9, 4, 1, *[9] * 6, 8] if kind == "parquet" else list(SHARDS))
    drawn = np.random.default_rng(0).integers(0, 103, 200)
    assert rows.take(["text", "label"], drawn)["text"] == [RECORDS[i]["text"] for i in drawn]
    assert list(rows.column("label")) == [r["label"] for r in RECORDS]
    assert pickle.loads(pickle.dumps(rows)).row(102) == RECORDS[102]
    assert stream("some/set", type="hub").fingerprint == rows.fingerprint
    assert rows.name(41).endswith("2.parquet row 0" if kind == "parquet" else "some/set shard 2 row 0")
    assert "no split `test`" in fault("some/set", type="hub", split="test")


def _generated(files: list[str]) -> Any:
    for file in files:
        for i in range(1500):
            yield {"text": f"{file}{i}", "late": None if i < 1200 else i}


def test_a_generated_set_streams_with_values_that_come_late() -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.IterableDataset.from_generator(_generated, gen_kwargs={"files": ["a", "b", "c"]})
    table = shards.ShardTable("made", shard_readers.IterableShards("made", made, "identity"))
    assert table.chunks.tolist() == [1500, 1500, 1500]
    assert table.take(["late", "text"], np.array([4499, 0, 2700])) == {
        "late": [1499, None, 1200], "text": ["c1499", "a0", "b1200"]
    }  # fmt: skip
    assert table.name(4499) == "made shard 2 row 1499"


# --- chunks in memory -------------------------------------------------------------------------------------------------


class Block(shard_readers.Chunk):
    def __init__(self, nbytes: int):
        self.nbytes = nbytes

    def values(self, names: Sequence[str], rows: Any) -> Any:
        return {}


class Reads:
    """Reads that say when they happen, and wait until they may end."""

    def __init__(self, nbytes: int = 10):
        self.done: list[Any] = []
        self.may_end = threading.Event()
        self.may_end.set()
        self._nbytes = nbytes

    def __call__(self, key: Any) -> Any:
        def read() -> Block:
            self.done.append(key)
            assert self.may_end.wait(10)
            return Block(self._nbytes)

        return read


def settle(chunks: shards.Chunks) -> None:
    end = time.monotonic() + 10
    while chunks._reading and time.monotonic() < end:
        time.sleep(0.001)


def test_a_chunk_is_read_once_even_when_many_ask_at_once() -> None:
    chunks, reads = shards.Chunks(), Reads()
    reads.may_end.clear()
    chunks.want([(("a",), 99, reads("a"))])
    got: list[Any] = []
    threads = [threading.Thread(target=lambda: got.append(chunks.get(("a",), 99, 1, reads("a")))) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    reads.may_end.set()
    for thread in threads:
        thread.join()
    assert reads.done == ["a"]
    assert len(set(map(id, got))) == 1


def test_the_limit_holds_and_what_is_used_up_goes_first() -> None:
    chunks, reads = shards.Chunks(limit=35), Reads()

    def use(key: str, asked: int = 1) -> None:
        chunks.get((key,), 4, asked, reads(key))

    for key in "abc":
        use(key)
    use("a")
    use("d")  # b was used longest ago
    assert chunks._size == 30
    use("a")
    assert reads.done == list("abcd")
    use("b")
    assert reads.done == list("abcdb")  # and c goes
    use("a")  # the fourth of a's four rows
    assert {k for (k,) in chunks._entries} == {"d", "b"}  # type: ignore[misc]
    assert chunks._size == 20
    big = shards.Chunks(limit=5)
    assert big.get(("x",), 4, 1, reads("x")).nbytes == 10
    assert big.get(("x",), 4, 1, reads("y")).nbytes == 10
    assert reads.done[-1] == "x"  # one chunk is kept whatever its size


def test_a_chunk_that_nobody_asks_for_any_more_goes() -> None:
    chunks, reads = shards.Chunks(), Reads()
    for key in "abc":
        chunks.get((key,), 4, 1, reads(key))
    chunks._entries[("a",)].since -= shards.IDLE_SECONDS
    chunks.get(("b",), 4, 1, reads("b"))
    chunks.get(("d",), 4, 1, reads("d"))
    assert {k for (k,) in chunks._entries} == {"b", "c", "d"}  # type: ignore[misc]
    assert chunks._size == 30


def test_reading_ahead_is_bounded_and_goes_on_when_there_is_room() -> None:
    chunks, reads = shards.Chunks(limit=100, threads=1), Reads()
    wanted = [((i,), 1, reads(i)) for i in range(20)]
    chunks.want(wanted)
    settle(chunks)
    assert reads.done == [0, 1, 2, 3, 4]  # half of the limit
    chunks.want(wanted)
    for i in range(20):
        chunks.get((i,), 1, 1, reads(i))
        settle(chunks)
    assert sorted(reads.done) == list(range(20))
    assert chunks._size == chunks._unused == 0


def test_what_was_read_ahead_and_nobody_came_for_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks, reads = shards.Chunks(limit=100, threads=1), Reads()
    chunks.want([((i,), 1, reads(i)) for i in range(10)])
    settle(chunks)
    chunks.want([(("other",), 1, reads("other"))])
    settle(chunks)
    assert reads.done == [0, 1, 2, 3, 4]
    monkeypatch.setattr(shards, "STALE_SECONDS", 0.2)
    time.sleep(0.2)
    chunks.want([(("third",), 1, reads("third"))])
    settle(chunks)
    assert reads.done == [0, 1, 2, 3, 4, "third"]


def test_a_chunk_that_takes_long_to_read_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "STALE_SECONDS", 0.05)
    chunks, slow, reads = shards.Chunks(limit=20, threads=2), Reads(), Reads()
    slow.may_end.clear()
    chunks.want([(("slow",), 1, slow("slow")), (("full",), 1, reads("full"))])
    time.sleep(0.1)
    chunks.want([(("more",), 1, reads("more"))])  # for which `full` goes
    slow.may_end.set()
    settle(chunks)
    chunks.get(("slow",), 1, 1, slow("slow"))
    chunks.get(("more",), 1, 1, reads("more"))
    assert slow.done == ["slow"]
    assert reads.done == ["full", "more"]
    assert chunks._size == chunks._unused == 0


def test_a_fault_is_raised_where_the_chunk_is_asked_for_and_not_kept() -> None:
    chunks, reads = shards.Chunks(), Reads()

    def broken() -> Block:
        raise UserError("a.jsonl is gone")

    chunks.want([(("a",), 1, broken)])
    settle(chunks)
    with pytest.raises(UserError, match="gone"):
        chunks.get(("a",), 1, 1, broken)
    assert chunks.get(("a",), 1, 1, reads("a")).nbytes == 10


def _child(rows: Rows, out: Any) -> None:
    rows.prefetch(np.arange(103))
    out.put(rows.take(["text"], np.arange(103))["text"])


def test_a_forked_worker_reads_for_itself_while_the_parent_is_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = stream(write(tmp_path, "parquet"))
    rows.take(["text"], np.array([0]))
    reads = Reads()
    reads.may_end.clear()
    shards._chunks.want([((i,), 1, reads(i)) for i in range(8)])
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    with shards._chunks._lock:  # as another thread may hold it at the moment of a fork
        process = context.Process(target=_child, args=(rows, out))
        process.start()
    try:
        assert out.get(timeout=20) == [r["text"] for r in RECORDS]
    finally:
        reads.may_end.set()
        process.join(10)
        process.kill()


def test_reading_ahead_reads_what_was_asked_for_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = stream(write(tmp_path, "parquet"))
    read = shard_readers.ParquetShards.read
    seen: list[Any] = []

    def told(self: Any, shard: int, index: Any, chunk: int, names: Any) -> Any:
        seen.append((shard, chunk, names))
        return read(self, shard, index, chunk, names)

    monkeypatch.setattr(shard_readers.ParquetShards, "read", told)
    rows.prefetch(np.array([50]))  # of which columns is not known yet
    settle(shards._chunks)
    assert seen == []
    rows.take(["label"], np.array([0]))
    rows.prefetch(np.array([50, 40, 51, 9]))
    settle(shards._chunks)
    assert seen[0] == (0, 0, ("label",))
    assert sorted(seen[1:]) == [(0, 1, ("label",)), (1, 0, ("label",)), (2, 1, ("label",))]
    rows.take(["label"], np.array([9, 40, 50]))
    assert len(seen) == 4
