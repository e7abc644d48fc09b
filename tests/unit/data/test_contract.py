"""The data contract against a plain count, row by row."""

import json
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scaletrain.config import SourceSpec
from scaletrain.data import tables, text
from scaletrain.data.contract import Inspection, figures, fill, inspect
from scaletrain.data.formats import Chats, Completions, Documents, Format
from scaletrain.data.sources import Rows, open_rows
from scaletrain.data.text import Blocks, Samples, Tokens, learned, tokenise
from scaletrain.errors import UserError
from tests.unit.data.test_turns import TWO, said, tokenizer_like, tokenizer_of, user


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALETRAIN_CACHE", str(tmp_path / "cache"))


def rows_of(folder: Path, *rows: dict[str, Any]) -> Rows:
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return open_rows([SourceSpec(path=str(folder / "rows.jsonl"))])


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("at_once", [1, 40, 1 << 20])
def test_figures_equal_a_plain_count(marked: bool, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "TOKENS_AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 3, n) for n in [0, *rng.integers(0, 6, 200), 0]]
    offsets = np.concatenate([[0], np.cumsum([len(r) for r in rows])])
    flat = np.concatenate(rows).astype(np.uint16)
    marks = rng.integers(0, 2, len(flat)).astype(np.uint8)
    found = figures(Tokens(flat, marks if marked else None, offsets), [2])
    known: set[tuple[int, ...]] = set()
    again = []
    for i, row in enumerate(rows):
        assert found.largest[i] == max(row, default=-1)
        own = marks[offsets[i] : offsets[i + 1]] == 1
        learned = row[own] if marked else row
        assert found.ended[i] == (len(learned) > 0 and learned[-1] == 2)
        if tuple(row) in known:
            again.append(i)
        known.add(tuple(row))
    assert found.again.tolist() == again


@pytest.mark.parametrize("at_once", [1, 40, 1 << 20])
@pytest.mark.parametrize("limit", [None, 3])
def test_learned_equals_a_plain_count(limit: int | None, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "TOKENS_AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum([0, 0, *rng.integers(0, 6, 200), 1, 0])])
    ids = np.zeros(offsets[-1], np.uint16)
    marks = rng.integers(0, 2, len(ids)).astype(np.uint8)
    for own in (marks, None):
        told = np.ones_like(marks) if own is None else own
        plain = [told[a + 1 : b][:limit].sum() for a, b in pairwise(offsets)]
        assert learned(Tokens(ids, own, offsets), limit).tolist() == plain


def test_padding_of_batches() -> None:
    assert fill(np.full(10, 8), 4) == 1.0
    assert fill(np.array([4, 4]), 2) == 0.5  # a multiple of 8
    lengths = np.random.default_rng(0).integers(1, 200, 4000)
    order = np.random.default_rng(1).permutation(4000).reshape(-1, 8)
    width = -(-lengths[order].max(1) // 8) * 8
    assert fill(lengths, 8) == pytest.approx(lengths.sum() / (8 * width.sum()), abs=0.01)


def inspection(rows: Rows, fmt: Format, seq_len: int = 64, packed: bool = False, **options: Any) -> Inspection:
    tokens = tokenise(rows, fmt)
    own = {"embeddings": None, "micro_batch": 2, "max_lost": 0.05, **options}
    data = (
        Blocks(tokens, rows, seq_len, 0, packed)
        if isinstance(fmt, Documents)
        else Samples(tokens, rows, seq_len, 0, packed)
    )
    return inspect(data, lambda _: [fmt], fmt.tokenizer, **own)


def test_what_is_said_of_completions(tmp_path: Path) -> None:
    good = [{"prompt": f"{i:02}", "completion": "abc"} for i in range(96)]
    bad = [{"prompt": "x" * 30, "completion": "a"}, {"prompt": "x", "completion": ""}, good[7], good[8]]
    rows = rows_of(tmp_path, *good, *bad)
    fmt = Completions(tokenizer_of("", ["<s>", "</s>"]))
    found = inspection(rows, fmt, seq_len=20)
    said = "\n".join(found.lines)
    # 98 rows of 2 + 3 + 1 tokens, one of 30 + 1 + 1 and one of 1 + 0 + 1
    assert "100 rows, 622 tokens, of which 394 (63%) are learned" in said
    assert f"2 rows (such as {rows.name(98)}, {rows.name(99)}) occur again" in said
    assert f"1 rows (such as {rows.name(96)}) are cut at data.seq_len=20, 1 rows (such as {rows.name(96)}) lose" in said
    assert f"1 rows (such as {rows.name(97)}) have no answer" in said
    assert "every answer learns its end" in said
    assert found.wrong == ()
    assert found.more == ("≤       8         99 " + "█" * 40, "≤      16          0", "≤      32          1")
    (refused,) = inspection(rows, fmt, seq_len=20, max_lost=0.01).wrong
    assert refused.startswith("2.0% of the rows are left without an answer, more than objective.max_lost=0.01 allows")
    assert f"1 rows (such as {rows.name(96)}) are cut by data.seq_len=20 before it begins" in refused
    assert f"1 rows (such as {rows.name(97)}) have none: the completion is empty" in refused
    assert found.rows is not None
    assert found.rows(2) == [
        (rows.name(0), [("00", False), ("abc</s>", True)]),
        (rows.name(99), [("08", False), ("abc</s>", True)]),
    ]


def test_ids_that_the_network_does_not_embed(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"text": "abc"}, {"text": "abc"})
    fmt = Documents(tokenizer_of("", ["<s>", "</s>"]))
    end = fmt.tokenizer.eos_token_id
    assert inspection(rows, fmt, embeddings=end + 1).wrong == ()
    (refused,) = inspection(rows, fmt, embeddings=end).wrong
    assert rows.name(0) in refused
    assert f"the largest is {end}, it embeds {end}" in refused


@pytest.mark.parametrize(
    ("messages", "why"),
    [([user("a")], "there is no turn of the assistant"), ([user("a"), said(" ")], "what the assistant says is empty")],
)
def test_chats_without_an_answer(messages: Any, why: str, tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"messages": TWO}, {"messages": messages})
    (refused,) = inspection(rows, Chats(tokenizer_like("qwen25")), seq_len=256).wrong
    assert f"1 rows (such as {rows.name(1)}) have none: {why}" in refused


def test_tokens_that_are_not_the_template_s(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"messages": TWO})
    fmt = Chats(tokenizer_like("zephyr"))
    assert inspection(rows, fmt, seq_len=256).wrong == ()
    data = Samples(tokenise(rows, fmt), rows, 256, 0, packed=False)
    other = Chats(tokenizer_like("qwen25"))
    (refused,) = inspect(data, lambda _: [other], fmt.tokenizer, None, 2, 0.05).wrong
    assert refused == f"{rows.name(0)}: the tokens are not those of the tokenizer's own chat template."


def test_an_end_that_the_template_does_not_write(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"messages": TWO}, {"messages": TWO[:2]})
    found = inspection(rows, Chats(tokenizer_like("glm")), seq_len=256)
    assert f"2 rows (such as {rows.name(0)}, {rows.name(1)}) do not learn an end of the answer" in "\n".join(
        found.lines
    )


def test_packs_are_fuller(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, *({"prompt": "a" * (i % 37), "completion": "b"} for i in range(200)))
    fmt = Completions(tokenizer_of("", ["<s>", "</s>"]))
    single, packed = (inspection(rows, fmt, packed=p).lines[-1] for p in (False, True))
    full = [int(line.split("batches are ")[1].split("%")[0]) for line in (single, packed)]
    assert single.startswith("200 examples; ")
    assert "packs; " in packed
    assert full[1] > 90 > 70 > full[0]


def test_the_default_refuses_nothing_that_is_good(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to learn"):
        inspection(rows_of(tmp_path, {"prompt": "a", "completion": ""}), Completions(tokenizer_of("", ["<s>", "</s>"])))


@pytest.mark.parametrize("packed", [False, True])
def test_memory_does_not_grow_with_the_rows(packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "INDEXED_BYTES", 1)
    monkeypatch.setattr(text, "ROWS_AT_ONCE", 20)
    monkeypatch.setattr(text, "TOKENS_AT_ONCE", 4096)
    fmt = Completions(tokenizer_of("", ["<s>", "</s>"]))

    def peak(count: int) -> int:
        path = tmp_path / f"{count}.jsonl"
        with path.open("w") as file:
            file.writelines(json.dumps({"prompt": f"{i:900}", "completion": f"{i:100}"}) + "\n" for i in range(count))
        tracemalloc.start()
        inspection(open_rows([SourceSpec(path=str(path))]), fmt, 1024, packed)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(50)  # what is imported and made once
    few, many = peak(1500), peak(4500)
    assert (many - few) / 3000 < 100  # bytes a row, of which the line alone has 1,030
