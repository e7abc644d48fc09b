"""Every source type against what was written with another library; every fault is told by path, line or column."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from scaletrain.config import SourceSpec
from scaletrain.data import tables
from scaletrain.data.sources import Rows, open_rows, split_holdout
from scaletrain.errors import UserError

RECORDS = [{"text": f"sentence {i}", "label": i % 3} for i in range(7)]


def rows_of(path: object, **options: Any) -> Rows:
    return open_rows([SourceSpec(path=str(path), **options)])


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def fault(path: object, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        rows_of(path, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.csv", "a.tsv", "a.csv.gz"])
def test_formats_give_the_records_that_were_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if "parquet" in name:
        pq.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=3)
    else:
        mark = "\t" if "tsv" in name else ","
        lines = ["text" + mark + "label", *(f"{r['text']}{mark}{r['label']}" for r in RECORDS)]
        content = "\n".join(map(json.dumps, RECORDS) if "jsonl" in name else lines).encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    rows = rows_of(path)
    assert rows.columns == ("text", "label")
    assert [rows.row(i) for i in range(len(rows))] == RECORDS
    assert list(rows.column("label")) == [r["label"] for r in RECORDS]
    assert rows.column("text")[2:4] == ["sentence 2", "sentence 3"]
    assert pickle.loads(pickle.dumps(rows)).row(6) == RECORDS[6]  # as worker processes get it


def test_jsonl_keeps_nested_values_exactly(tmp_path: Path) -> None:
    records = [{"m": [{"a": 1}, {"b": None}]}, {"m": "text", "extra": 2.5}, {"m": {"x": []}}]
    rows = rows_of(write_jsonl(tmp_path / "a.jsonl", records))
    assert list(rows.column("m")) == [r["m"] for r in records]
    assert list(rows.column("extra")) == [None, 2.5, None]


def test_csv_quotes_hold_commas_and_line_breaks(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\n"one, ""two""\nthree",4\n')
    assert rows_of(tmp_path / "a.csv").row(0) == {"text": 'one, "two"\nthree', "label": 4}
    long = "line\n" * 300_000  # longer than the blocks that Arrow cuts a file into
    (tmp_path / "a.csv").write_text(f'text,label\n"{long}",4\n')
    assert rows_of(tmp_path / "a.csv").row(0) == {"text": long, "label": 4}


def test_text_is_one_row_for_each_file(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second\nfile")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfna\xc3\xafve")
    rows = rows_of(tmp_path)
    assert list(rows.column("text")) == ["naïve", "second\nfile"]
    assert rows.name(1).endswith("b.txt")


def test_image_folders_with_and_without_classes(tmp_path: Path) -> None:
    for name in ("cats/1.png", "cats/deep/2.PNG", "dogs/3.jpg", ".hidden/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / name)
    rows = rows_of(tmp_path)
    assert list(rows.column("label")) == ["cats", "cats", "dogs"]
    assert rows.name(0).endswith("cats/1.png")
    assert rows_of(tmp_path / "cats/*.png").columns == ("image",)
    Image.new("L", (4, 4)).save(tmp_path / "loose.png")
    assert "loose.png" in fault(tmp_path)


def test_globs_and_folders(tmp_path: Path) -> None:
    for name in ("_a.jsonl", "b.jsonl", "deep/c.jsonl", "deep/er/d.jsonl", ".e.jsonl", "f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / name, [{"n": name}])

    def found(pattern: str) -> list[str]:
        return list(rows_of(f"{tmp_path}/{pattern}", type="jsonl").column("n"))

    assert found("") == ["b.jsonl", "deep/c.jsonl", "deep/er/d.jsonl"]
    assert found("_*.jsonl") == ["_a.jsonl"]
    assert found("[ab].jsonl") == ["b.jsonl"]
    assert found("*/*.jsonl") == ["deep/c.jsonl"]
    assert found("deep/**/*.jsonl") == ["deep/c.jsonl", "deep/er/d.jsonl"]
    assert "can only be an entire path component" in fault(tmp_path / "a**.jsonl")


def test_saved_datasets_with_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_list(RECORDS)
    whole.select([5, 1]).save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=whole, test=whole.select([0])).save_to_disk(tmp_path / "two")
    assert rows_of(tmp_path / "one").row(0) == RECORDS[5]
    assert len(rows_of(tmp_path / "two", split="train")) == 7
    assert "train, test" in fault(tmp_path / "two")
    assert "Did you mean `test`?" in fault(tmp_path / "two", split="tset")


def test_bundled_sets() -> None:
    from sklearn.datasets import load_digits, load_iris

    digits = rows_of("sklearn:digits")
    restored = np.stack(list(digits.column("image"))) / 255 * 16
    np.testing.assert_allclose(restored, load_digits().images, atol=16 / 255 / 2)
    assert list(digits.column("label")) == load_digits().target.tolist()
    assert rows_of("sklearn:iris").row(149)["label"] == load_iris().target_names[2]
    assert "Did you mean `digits`?" in fault("sklearn:digit")


def test_urls_are_read_through_fsspec() -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/a.jsonl", json.dumps(RECORDS[0]).encode())
    with memory.open("/bucket/b.parquet", "wb") as stream:
        pq.write_table(pa.Table.from_pylist(RECORDS), stream)
    rows = open_rows([SourceSpec(path="memory://bucket/a.jsonl"), SourceSpec(path="memory://bucket/b.parquet")])
    assert [rows.row(i) for i in range(8)] == [RECORDS[0], *RECORDS]
    assert rows.name(0) == "memory:///bucket/a.jsonl line 1"


def test_sources_are_joined_by_role(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"sentence": "one", "gold": 1, "text": "hidden"}])
    write_jsonl(tmp_path / "b.jsonl", [{"text": "two", "label": 2, "own": 0}])
    rows = open_rows([
        SourceSpec(path=str(tmp_path / "a.jsonl"), columns={"text": "sentence", "label": "gold"}),
        SourceSpec(path=str(tmp_path / "b.jsonl")),
    ])  # fmt: skip
    assert rows.columns == rows_of(tmp_path / "a.jsonl", columns={"text": "sentence", "label": "gold"}).columns
    assert rows.columns == ("text", "label")
    assert [rows.row(i) for i in range(2)] == [{"text": "one", "label": 1}, {"text": "two", "label": 2}]
    with pytest.raises(UserError, match=r"a\.jsonl` has no column `own`"):
        rows.require("own", "anything")


def test_two_roles_may_swap_their_columns(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"a": 1, "b": 2}])
    assert rows_of(tmp_path / "a.jsonl", columns={"a": "b", "b": "a"}).row(0) == {"a": 2, "b": 1}


def test_selection_and_limits_keep_names(tmp_path: Path) -> None:
    for part in "ab":
        write_jsonl(tmp_path / f"{part}.jsonl", [{"n": f"{part}{i}"} for i in range(4)])
    specs = [SourceSpec(path=str(tmp_path / "a.jsonl"), rows=2), SourceSpec(path=str(tmp_path / "b.jsonl"))]
    rows = open_rows(specs)
    assert list(rows.column("n")) == ["a0", "a1", "b0", "b1", "b2", "b3"]
    some = rows.select([5, 0]).select([1, 0, 0])
    assert list(some.column("n")) == ["a0", "b3", "b3"]
    assert some.name(1).endswith("b.jsonl line 4")
    with pytest.raises(IndexError):
        rows.select([6])
    assert "fewer than" in fault(tmp_path / "a.jsonl", rows=5)


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"n": 1}\r\n\r\n{"n": 2}')
    rows = rows_of(tmp_path / "a.jsonl")
    assert list(rows.column("n")) == [1, 2]
    assert rows.name(1).endswith("a.jsonl line 3")


def test_fingerprint_follows_content_only(tmp_path: Path) -> None:
    first = rows_of(write_jsonl(tmp_path / "a.jsonl", RECORDS))
    assert rows_of(write_jsonl(tmp_path / "copy.jsonl", RECORDS)).fingerprint == first.fingerprint
    changed = [*RECORDS[:-1], {**RECORDS[-1], "label": 9}]  # same size
    assert rows_of(write_jsonl(tmp_path / "b.jsonl", changed)).fingerprint != first.fingerprint
    assert first.select([1, 0]).fingerprint != first.select([0, 1]).fingerprint
    assert rows_of(tmp_path / "a.jsonl", columns={"x": "text"}).fingerprint != first.fingerprint


def test_holdout_is_a_partition_that_follows_the_seed() -> None:
    rows = rows_of("sklearn:digits").select(range(1000))
    marked = {rows.row(i)["image"].tobytes(): i for i in range(1000)}
    places = []
    for seed in (0, 0, 1):
        train, held = split_holdout(rows, 0.2, seed)
        parts = [[marked[image.tobytes()] for image in part.column("image")] for part in (train, held)]
        assert sorted(parts[0] + parts[1]) == list(range(1000))
        assert len(held) == 200
        assert [p == sorted(p) for p in parts] == [True, True]
        places.append(parts[1])
    assert places[0] == places[1] != places[2]
    assert np.mean(places[0]) == pytest.approx(500, abs=80)  # not a run of neighbours at one end
    with pytest.raises(UserError, match="at least one"):
        split_holdout(rows.select([0, 1]), 0.1, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', "line 2 is not JSON"),
        (b'{"a": 1}\n\n[1, 2]\n', "line 3 is not a JSON object"),
        (b'{"a": "\xff"}\n', "line 1 is not JSON.*utf-8"),
        (b"\n\n", "has no rows"),
        (b"", "has no rows"),
    ],
)
def test_a_broken_jsonl_is_told_by_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        rows_of(tmp_path / "a.jsonl")


def test_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    assert "a.parquet" in fault(tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("a,b\n1,2\n3\n")
    assert "Row #3" in fault(tmp_path / "a.csv")
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    assert "a.jsonl.gz" in fault(tmp_path / "a.jsonl.gz")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    assert "a.txt" in fault(tmp_path / "a.txt")
    (tmp_path / "twice.csv").write_text("a,a\n1,2\n")
    assert "two columns `a`" in fault(tmp_path / "twice.csv")


def test_broken_pages_of_a_parquet_are_told_when_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": np.arange(5000).astype(str)}), path, use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[4:2000] = b"\xff" * 1996
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet"):
        rows_of(path).column("a")


def test_what_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert f"tried {tmp_path}/no.jsonl" in fault("no.jsonl")
    assert fault("data/no") == f"`data/no` is not there (tried {tmp_path}/data/no)"  # not asked of the Hub
    assert "no file matches" in fault("*.parquet")
    assert "no file" in fault("data")
    assert "not there" in fault("gone", type="arrow")
    assert "nothing://x" in fault("nothing://x")
    (tmp_path / "data/readme").write_text("?")
    assert "parquet, jsonl, csv, text, images, arrow, hub, sklearn" in fault("data/readme")
    write_jsonl(tmp_path / "data/a.jsonl", RECORDS)
    (tmp_path / "data/b.csv").write_text("a\n1\n")
    assert "several types (jsonl, csv)" in fault("data")
    assert len(rows_of("data", type="jsonl")) == 7
    assert "has no splits" in fault("data/a.jsonl", split="train")


def test_a_missing_column_is_told_with_the_closest(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    assert "Did you mean `label`?" in fault(path, columns={"label": "lable"})
    with pytest.raises(UserError, match=r"it has `text`, `label`.*labels: COLUMN"):
        rows_of(path).require("labels", "the class of a sentence")


def test_the_hub_is_asked_for_what_looks_like_an_id(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*arguments: object) -> object:
        asked.append(arguments)
        if arguments[0] == "some/thing":
            return datasets.DatasetDict(train=datasets.Dataset.from_list(RECORDS))
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(rows_of("some/thing:part").column("label")) == [r["label"] for r in RECORDS]
    assert asked == [("some/thing", "part")]
    message = fault("other/thing")
    assert "ConnectionError: no network" in message
    assert "no file or folder" in message


def test_a_large_file_of_lines_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALETRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "INDEXED_BYTES", 1)
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"b": 2}\n')
    first = rows_of(path)
    calls: list[int] = []
    parse = tables.parse_line
    monkeypatch.setattr(tables, "parse_line", lambda *a: calls.append(1) or parse(*a))
    again = rows_of(path)
    assert not calls
    for rows in (first, again):
        assert rows.columns == ("a", "b")
        assert list(rows.column("b")) == [None, 2]
        assert rows.name(1).endswith("a.jsonl line 3")
    path.write_text('{"c": 1}\n')
    assert rows_of(path).columns == ("c",)


def test_rows_that_are_alike(tmp_path: Path) -> None:
    for name, keys in (("a", "xy"), ("b", "yx"), ("c", "z"), ("d", "xy")):
        write_jsonl(tmp_path / f"{name}.jsonl", [{k: f"{name}{k}{i}" for k in keys} for i in range(3)])
    rows = rows_of(str(tmp_path / "*.jsonl"))
    assert [run.columns for run in rows.alike()] == [("x", "y"), ("z",), ("x", "y")]
    assert [len(run) for run in rows.alike()] == [6, 3, 3]
    some = rows.select([5, 7, 8, 0, 11])
    assert [[run.name(i) for i in range(len(run))] for run in some.alike()] == [
        [some.name(0)],
        [some.name(1), some.name(2)],
        [some.name(3), some.name(4)],
    ]
    assert [run.row(0) for run in some.alike()] == [{"x": "bx2", "y": "by2"}, {"z": "cz1"}, {"x": "ax0", "y": "ay0"}]
    assert some.alike()[2].row(1) == {"x": "dx2", "y": "dy2"}
