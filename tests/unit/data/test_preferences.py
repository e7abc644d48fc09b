"""Rows of preferences as batches: what is learned of each answer, cut, left out, packed, mismatched."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from scaletrain.config import SourceSpec
from scaletrain.data import text
from scaletrain.data.formats import Format, language_format
from scaletrain.data.preference_contract import inspect
from scaletrain.data.preferences import (
    MISMATCHED,
    Answered,
    Preferences,
    Sequences,
    Shape,
    judgements,
    pairs,
    ratings,
)
from scaletrain.data.sources import Rows, open_rows
from scaletrain.data.text import Tokens, encode
from scaletrain.errors import UserError

WORDS = ["<pad>", "</s>", "<s>", "<|im_start|>", "<|im_end|>", "user", "assistant", *"abcdefghijklmnop"]


def tokenizer_of(end: str = "</s>") -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token="<pad>")


def rows_of(folder: Path, *rows: dict[str, Any]) -> Rows:
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return open_rows([SourceSpec(path=str(folder / "rows.jsonl"))])


def answered(rows: Rows, column: str, chat: bool = False, whole: str | None = None) -> Sequences:
    tokenizer = tokenizer_of()
    written = language_format("chat" if chat else "completion", tokenizer)
    return Sequences.of(encode(rows, Answered(tokenizer, written, column, chat, whole)))


def both(rows: Rows, shape: Shape, chat: bool = False, implicit: bool = False) -> Preferences:
    columns = ("chosen", "rejected")
    found = [answered(rows, c, chat, o if implicit else None) for c, o in zip(columns, columns[::-1], strict=True)]
    return pairs(*found, rows, shape)


def told(batch: dict[str, torch.Tensor], group: str = "") -> list[tuple[str, str]]:
    """Write out each sequence of a batch: what is before the answer, and the answer."""
    own = {k.removeprefix(group): v for k, v in batch.items() if k.startswith(group)}
    ids, width = own["input_ids"].flatten(), own["input_ids"].shape[1]
    positions = own.get("position_ids", torch.arange(width).expand(len(own["input_ids"]), -1)).flatten()
    found = []
    for s in range(len(own["answers"])):
        places = own["learned"][own["segments"] == s]
        targets = own["targets"][own["segments"] == s]
        assert len(targets) == own["answers"][s]
        assert (places.diff() == 1).all()
        start = int(places[0] - positions[places[0]])
        assert torch.equal(ids[places[1:]], targets[:-1])
        prompt = ids[start : int(places[0]) + 1]
        found.append((" ".join(WORDS[i] for i in prompt), " ".join(WORDS[i] for i in targets)))
    return found


def whole_batch(dataset: Preferences) -> dict[str, torch.Tensor]:
    return dataset.batch(range(len(dataset)), np.zeros(len(dataset), np.uint64))


ROWS = [
    {"prompt": "a b", "chosen": "c d e", "rejected": "f"},
    {"prompt": "g", "chosen": "h", "rejected": "i j k"},
    {"prompt": "l m n", "chosen": "o", "rejected": "p"},
]
TOLD = [("a b", "c d e </s>"), ("a b", "f </s>"), ("g", "h </s>"), ("g", "i j k </s>")]
TOLD += [("l m n", "o </s>"), ("l m n", "p </s>")]


@pytest.mark.parametrize("packed", [False, True])
def test_pairs_of_texts(packed: bool, tmp_path: Path) -> None:
    found = both(rows_of(tmp_path, *ROWS), Shape(8, 0, packed))
    batch = whole_batch(found)
    assert sorted(told(batch)) == sorted(TOLD)
    for chosen, rejected in zip(told(batch)[0::2], told(batch)[1::2], strict=True):
        assert TOLD.index(rejected) == TOLD.index(chosen) + 1  # whole pairs, in this order
    assert int(batch["lengths"].sum()) == sum(len(f"{p} {a}".split()) - 1 for p, a in TOLD)
    if packed:
        assert len(found) == len(batch["input_ids"]) == 2
        assert batch["lengths"].max() <= 16
        real = torch.arange(batch["position_ids"].shape[1]) < batch["lengths"][:, None]
        assert int((real & (batch["position_ids"] == 0)).sum()) == 6
    names = [name[-6:] for i in range(len(found)) for name in found.name(i).split(", ")]
    assert sorted(names) == ["line 1", "line 2", "line 3"]


@pytest.mark.parametrize("at_once", [1, 8, 1 << 20])
def test_the_last_marked_stretch_is_the_answer(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "TOKENS_AT_ONCE", at_once)
    sequences = [[0, 1, 1, 0, 0, 1, 1], [1, 1, 0], [0, 0], [0, 1], [1], [0, 1, 0]]
    marks = np.array([m for s in sequences for m in s], np.uint8)
    tokens = Tokens(np.arange(len(marks)), marks, np.cumsum([0, *map(len, sequences)]))
    found = Sequences.of(tokens)
    assert found.answers.begins.tolist()[:2] == [5, 8]
    assert found.answers.lengths.tolist() == [2, 1, 0, 1, 0, 1]
    assert found.prompts.lengths.tolist()[:2] == [5, 1]
    assert [found.answers.at(i).tolist() for i in (0, 1, 3, 5)] == [[5, 6], [8], [13], [16]]


CHATS = [
    {
        "prompt": [{"role": "user", "content": "a"}],
        "chosen": [{"role": "assistant", "content": "b c"}],
        "rejected": [{"role": "assistant", "content": "d"}],
    },
    {
        "prompt": [
            {"role": "user", "content": "e"},
            {"role": "assistant", "content": "f"},
            {"role": "user", "content": "g"},
        ],
        "chosen": "h",
        "rejected": "i",
    },
]


def test_chats_learn_the_last_turn_of_the_assistant(tmp_path: Path) -> None:
    explicit = told(whole_batch(both(rows_of(tmp_path, *CHATS), Shape(64, 0, False), chat=True)))
    assert [answer.split() for _, answer in explicit] == [
        [*words.split(), "<|im_end|>"] if "<|im_end|>" in explicit[0][1] else [*words.split(), "</s>"]
        for words in ("b c", "d", "h", "i")
    ]
    assert "f" in explicit[2][0].split()
    whole = [
        {
            column: [
                *row["prompt"],
                *(answer if isinstance(answer := row[column], list) else [{"role": "assistant", "content": answer}]),
            ]
            for column in ("chosen", "rejected")
        }
        for row in CHATS
    ]
    implicit = whole_batch(both(rows_of(tmp_path, *whole), Shape(64, 0, False), chat=True, implicit=True))
    assert told(implicit) == explicit


def test_prompts_are_cut_alike_and_answers_are_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = rows_of(tmp_path, {"prompt": "a b c d e f", "chosen": "g h i", "rejected": "j"}, ROWS[2])
    with caplog.at_level(logging.WARNING, "scaletrain"):
        found = both(rows, Shape(6, 0, False))
    assert told(whole_batch(found))[:2] == [("d e f", "g h i </s>"), ("d e f", "j </s>")]
    assert "1 of 2 rows are longer than data.seq_len=6: their prompts lose their beginning" in caplog.text
    kept = both(rows, Shape(6, 0, False, before=tuple(WORDS.index(w) for w in "ab")))
    assert told(whole_batch(kept))[0] == ("a b f", "g h i </s>")
    assert whole_batch(found)["input_ids"].shape[1] == 8
    assert whole_batch(found)["lengths"].max() == 6


def test_rows_that_teach_nothing_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    same = {"prompt": "a", "chosen": "b", "rejected": "b"}
    long = {"prompt": "a", "chosen": "b c d e f g h i", "rejected": "b"}
    rows = rows_of(tmp_path, ROWS[0], same, long)
    with caplog.at_level(logging.WARNING, "scaletrain"):
        found = both(rows, Shape(6, 0, True))
    assert told(whole_batch(found)) == TOLD[:2]
    assert re.search(r"1 of 3 rows are left out: .* more than data.seq_len=6, as in .*rows.jsonl line 3", caplog.text)
    assert re.search(r"1 of 3 rows .* chosen and rejected are the same, as in .*rows.jsonl line 2", caplog.text)
    with pytest.raises(UserError, match=r"no row of 1 is left to learn from: chosen and rejected are the same"):
        both(rows_of(tmp_path, same), Shape(6, 0, True))


@pytest.mark.parametrize("packed", [False, True])
def test_ratings_stand_beside_the_answer_to_another_prompt(packed: bool, tmp_path: Path) -> None:
    letters = "abcdefgh"
    rows = rows_of(
        tmp_path,
        *(
            {"prompt": letters[i // 2], "completion": f"{letters[i]} {letters[i]}", "label": i % 3 == 0}
            for i in range(8)
        ),
    )
    labels = judgements(rows.column("label"), rows)
    found = ratings(answered(rows, "completion"), labels, rows, Shape(8, 0, packed), seed=0)
    batch = whole_batch(found)
    own, others = told(batch), told(batch, MISMATCHED)
    assert sorted(own) == sorted((letters[i // 2], f"{letters[i]} {letters[i]} </s>") for i in range(8))
    answers = dict(zip((a for _, a in own), (p for p, _ in own), strict=True))
    assert [p for p, _ in others] == [p for p, _ in own]
    assert all(answers[answer] != prompt for prompt, answer in others)
    assert sorted(a for _, a in others) == sorted(a for _, a in own) or len({a for _, a in others}) > 2
    judged = dict(zip((a for _, a in own), batch["labels"].tolist(), strict=True))
    assert judged == {f"{letters[i]} {letters[i]} </s>": i % 3 == 0 for i in range(8)}
    again = ratings(answered(rows, "completion"), labels, rows, Shape(8, 0, packed), seed=0)
    assert told(whole_batch(again), MISMATCHED) == others


def text_pair(**change: Any) -> dict[str, Any]:
    return {"prompt": "a", "chosen": "b", "rejected": "c"} | change


USER, ASSISTANT = ({"role": role, "content": "a"} for role in ("user", "assistant"))


@pytest.mark.parametrize(
    ("row", "chat", "implicit", "message"),
    [
        (text_pair(chosen=" "), False, False, r"line 1: `chosen` is empty"),
        (text_pair(rejected=None), False, False, r"line 1: `rejected` must be a text, not nothing"),
        (text_pair(chosen=[USER]), True, False, r"line 1: `chosen` must end with a message of the assistant"),
        (text_pair(prompt=7), True, False, r"line 1: `prompt` must be a list of messages, not int"),
        (text_pair(chosen=[]), True, False, r"line 1: `chosen` must be a list of messages, not an empty list"),
        (text_pair(chosen=[ASSISTANT | {"content": ""}]), True, False, r"line 1: `chosen` is empty"),
        (
            {"chosen": [USER, ASSISTANT], "rejected": [USER | {"content": "b"}, ASSISTANT]},
            True,
            True,
            r"line 1: `chosen` and `rejected` begin with different messages",
        ),
        (
            {"chosen": "a b", "rejected": [USER, ASSISTANT]},
            True,
            True,
            r"`chosen` must be a list of messages, not str",
        ),
    ],
)
def test_bad_rows_are_named(row: dict[str, Any], chat: bool, implicit: bool, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        both(rows_of(tmp_path, row), Shape(32, 0, False), chat, implicit)


def test_bad_labels(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"label": True}, {"label": "yes"})
    with pytest.raises(UserError, match=r"line 2: `label` must be true \(desirable\) or false, not 'yes'"):
        judgements(rows.column("label"), rows)
    row = {"prompt": "a", "completion": "b", "label": True}
    alike = rows_of(tmp_path, row, row)
    sequences = answered(alike, "completion")
    with pytest.raises(UserError, match=r"all prompts are the same, as in .*rows.jsonl line 1"):
        ratings(sequences, np.array([True, False]), alike, Shape(8, 0, False), 0)
    rows = rows_of(tmp_path, row, row | {"prompt": "c"})
    held = ratings(answered(rows, "completion"), np.array([True, True]), rows, Shape(8, 0, False), 0, training=False)
    assert len(held) == 2
    with pytest.raises(UserError, match=r"every `label` is True: rows of both kinds are needed"):
        ratings(answered(rows, "completion"), np.array([True, True]), rows, Shape(8, 0, False), 0)


@pytest.mark.parametrize("packed", [False, True])
def test_a_window_of_a_stream_may_come_to_nothing(packed: bool, tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "b", "completion": "b c d", "label": True})
    assert len(pairs(answered(rows, "chosen"), answered(rows, "rejected"), rows, Shape(2, 0, packed), quiet=True)) == 0
    sequences, labels = answered(rows, "completion"), np.array([True])
    assert len(ratings(sequences, labels, rows, Shape(2, 0, packed), 0, quiet=True)) == 0
    with pytest.raises(UserError, match=r"no row of 1 is left to learn from: their answer has no tokens, or more than"):
        ratings(sequences, labels, rows, Shape(2, 0, packed), 0)


def formats_of(*columns: str, chat: bool = False) -> list[Format]:
    written = language_format("chat" if chat else "completion", tokenizer_of())
    return [Answered(written.tokenizer, written, column, chat) for column in columns]


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_said_of_pairs(packed: bool, tmp_path: Path) -> None:
    same = {"prompt": "a", "chosen": "b", "rejected": "b"}
    long = {"prompt": "a", "chosen": "b c d e f g h i", "rejected": "b"}
    cut = {"prompt": "a b c d", "chosen": "e f g", "rejected": "h"}
    rows = rows_of(tmp_path, ROWS[0], same, long, cut, ROWS[0])
    dataset = both(rows, Shape(6, 0, packed))
    fmts, tokenizer = formats_of("chosen", "rejected"), tokenizer_of()
    found = inspect(dataset, fmts, tokenizer, None, 4, 0.3)
    names = [rows.name(i) for i in range(5)]
    # With ends of text: (2 + 4) + (2 + 2), 3 + 3, 10 + 3, 8 + 6 and the first again.
    lines = [
        f"5 rows, 53 tokens, of which 33 (62%) are of answers; 1 rows (such as {names[4]}) occur again",
        "tokens of a prompt with an answer: half ≤ 5, 95% ≤ 9, 99% ≤ 9, longest 10",
        f"1 rows (such as {names[2]}) are left out: their answer has no tokens, or more than data.seq_len=6",
        f"1 rows (such as {names[1]}) are left out: chosen and rejected are the same",
        f"1 rows (such as {names[3]}) are cut at data.seq_len=6: their prompts lose their beginning",
        "every answer learns its end",
        # Two lines of 8 places for each of three rows, 5 + 3, 6 + 4 and 5 + 3 of them taken; or one of 16 and one of 8.
        f"{'2 packs' if packed else '3 examples'}; batches are {26 / 48:.0%} full"
        + ("" if packed else " (data.packing=true fills more)"),
    ]
    sizes = [int(size) for line in whole_batch(dataset)["lengths"].reshape(len(dataset), -1) for size in line]
    assert dataset.sizes().flatten().tolist() == sizes
    if packed:
        lines[-1] = f"{len(dataset)} packs; batches are {26 / whole_batch(dataset)['input_ids'].numel():.0%} full"
    assert list(found.lines) == lines
    (wrong,) = found.wrong
    assert "40.0% of the rows are left out, more than objective.max_lost=0.3 allows: of 1 rows" in wrong
    assert not inspect(dataset, fmts, tokenizer, None, 4, 0.4).wrong
    assert found.rows is not None
    told = found.rows(9)
    assert told[:2] == [
        (f"{names[0]}, chosen", [("a b", False), ("c d e </s>", True)]),
        (f"{names[0]}, rejected", [("a b", False), ("f </s>", True)]),
    ]
    assert told[2] == (f"{names[3]}, chosen", [("b c d", False), ("e f g </s>", True)])
    assert len(told) == 6


def test_tokens_that_cannot_be_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of()
    dataset, fmts = both(rows_of(tmp_path, *ROWS), Shape(6, 0, False)), formats_of("chosen", "rejected")
    assert not inspect(dataset, fmts, tokenizer, WORDS.index("p") + 1, 4, 0).wrong
    (wrong,) = inspect(dataset, fmts, tokenizer, WORDS.index("p"), 4, 0).wrong
    assert re.match(r"1 rows .* line 3\) have tokens that the network has no embedding for: it embeds 22", wrong)
    monkeypatch.setattr(type(fmts[0].written), "official", lambda self, values, names: [[0]] * len(names))
    (wrong,) = inspect(dataset, fmts, tokenizer, None, 4, 0).wrong
    assert "line 1: the tokens are not those of the tokenizer's own chat template" in wrong
    lines = inspect(dataset, fmts, tokenizer_of("<s>"), None, 4, 0).lines
    assert any(re.match(r"3 rows .* do not learn an end of the answer", line) for line in lines)
