"""Tokenised text: what is learned, what is cut, and what a batch holds, spelled out by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scaletrain.config import SourceSpec
from scaletrain.data import text as text_module
from scaletrain.data.formats import Chats, Completions, Documents, Pairs, detect, language_format, texts
from scaletrain.data.sources import Rows, open_rows
from scaletrain.data.text import IGNORE, Blocks, LabelledTexts, Samples, Tokens, tokenise
from scaletrain.data.tokenizers import (
    check_vocabulary,
    identity,
    leading,
    load_tokenizer,
    pieces,
    train_tokenizer,
)
from scaletrain.errors import UserError

CORPUS = ["the cat sat on the mat", "the dog sat on the log"] * 20


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SCALETRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tokenizer() -> Any:
    return train_tokenizer(CORPUS, 270, "corpus")


def rows_of(folder: Path, *rows: dict[str, Any], name: str = "rows.jsonl") -> Rows:
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    return open_rows([SourceSpec(path=str(folder / name))])


def with_bos(tokenizer: Any) -> Any:
    """A tokenizer that puts a token of its own before every text, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def learned(tokenizer: Any, tokens: Tokens, row: int) -> str:
    a, b = tokens.offsets[row : row + 2]
    assert tokens.marks is not None
    return tokenizer.decode(tokens.ids[a:b][tokens.marks[a:b] == 1])


def test_tokenizer_is_a_function_of_the_text_and_is_kept(tokenizer: Any, cache: Path) -> None:
    sentence = "Ünknown bytes: \U0001f600 <cat>\n\tsat "
    assert tokenizer.decode(tokenizer(sentence)["input_ids"]) == sentence
    assert len(tokenizer) == 270
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    code = "import sys; from scaletrain.data.tokenizers import train_tokenizer, identity; " \
        f"print(identity(train_tokenizer({CORPUS!r}, 270, 'corpus')))"  # fmt: skip
    env = {**os.environ, "SCALETRAIN_CACHE": str(cache.parent / "other"), "PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == identity(tokenizer)
    assert identity(train_tokenizer(iter(()), 270, "corpus")) == identity(tokenizer)  # not trained again


def test_tokenizer_of_too_little_text() -> None:
    with pytest.raises(UserError, match=r"vocab_size=5000: the training text gives only"):
        train_tokenizer(CORPUS, 5000, "small")


def test_pieces_do_not_change_the_tokens(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    document = "\n".join(CORPUS) + "\n\n  the\n\n\ncat \n sat" * 10
    whole = tokenizer(document)["input_ids"]
    monkeypatch.setattr("scaletrain.data.tokenizers.PIECE", 50)
    assert len(list(pieces(document))) > 5
    assert "".join(pieces(document)) == document
    assert Documents(tokenizer).encode([[document]], ["row"]).ids == [[*whole, tokenizer.eos_token_id]]


def test_vocabulary_that_is_too_large(tokenizer: Any) -> None:
    check_vocabulary(tokenizer, 270, "networks.model")
    with pytest.raises(UserError, match=r"270 tokens, the network embeds 269"):
        check_vocabulary(tokenizer, 269, "networks.model")


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"networks.model.path: no tokenizer can be read"):
        load_tokenizer(str(tmp_path), "networks.model.path")


def test_documents_become_blocks_that_learn_every_token_once(tokenizer: Any, tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"text": "the cat"}, {"text": ""}, {"text": "the dog sat on the mat"})
    tokens = tokenise(rows, language_format(detect(rows, None), tokenizer))
    end = [tokenizer.eos_token_id]
    stream = tokenizer("the cat")["input_ids"] + end + tokenizer("the dog sat on the mat")["input_ids"] + end
    assert tokens.ids.tolist() == stream
    blocks = Blocks(tokens, rows, 4, fill=1, isolated=False)
    examples = [blocks.at(i) for i in range(len(blocks))]
    assert np.concatenate([e["input_ids"] for e in examples]).tolist() == stream[:-1]
    assert np.concatenate([e["labels"] for e in examples]).tolist() == stream[1:]
    assert {len(e["labels"]) for e in examples[:-1]} == {4}
    batch = blocks.batch([0, len(blocks) - 1], np.zeros(2, np.uint64))
    assert batch["input_ids"].shape == (2, 8)  # a multiple of 8
    assert batch["labels"][0, 4:].tolist() == [IGNORE] * 4
    assert batch["lengths"].tolist() == [4, len(examples[-1]["labels"])]


def test_isolated_blocks_restart_with_each_document(tokenizer: Any, tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"text": "a b"}, {"text": "c"}, {"text": "d e f g"})
    tokens = tokenise(rows, Documents(tokenizer))
    stream, starts = tokens.ids.tolist(), set(tokens.offsets.tolist())
    for seq_len in (1, 2, 3, 5, 100):
        blocks = Blocks(tokens, rows, seq_len, fill=1, isolated=True)
        place = 0
        for i in range(len(blocks)):
            example = blocks.at(i)
            for t, (position, label) in enumerate(zip(example["position_ids"], example["labels"], strict=True)):
                begin = max([s for s in starts if s <= place] + [i * seq_len]) if t else place
                assert position == place - begin
                assert label == (IGNORE if place + 1 in starts else stream[place + 1])
                place += 1
        assert place == len(stream) - 1


@pytest.mark.parametrize("bos", [False, True])
def test_completion_and_end_are_learned_and_nothing_else(tokenizer: Any, tmp_path: Path, bos: bool) -> None:
    if bos:
        tokenizer = with_bos(tokenizer)
    prompts = ["the cat", "<s>the cat" if bos else "the cat", ""]
    rows = rows_of(
        tmp_path,
        {"prompt": prompts[0], "completion": " sat"},
        {"prompt": prompts[1], "completion": " sat<|endoftext|>"},
        {"prompt": prompts[2], "completion": "mat"},
    )
    tokens = tokenise(rows, language_format(detect(rows, None), tokenizer))
    assert [learned(tokenizer, tokens, i) for i in range(3)] == [" sat<|endoftext|>"] * 2 + ["mat<|endoftext|>"]
    first = tokens.ids[: tokens.offsets[1]].tolist()
    assert tokens.ids[tokens.offsets[1] : tokens.offsets[2]].tolist() == first  # neither begun nor ended twice
    assert first.count(tokenizer.eos_token_id) == 1
    assert leading(tokenizer) == ([tokenizer.bos_token_id] if bos else [])
    assert Completions(tokenizer).prompt(prompts[0]) == tokenizer("the cat")["input_ids"] == first[: len(first) - 2]
    assert first[0] == (tokenizer.bos_token_id if bos else first[0])


CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "the cat?"},
    {"role": "assistant", "content": "sat"},
    {"role": "user", "content": "the dog?"},
    {"role": "assistant", "content": "on the log"},
]
UNMARKED = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize("template", [None, UNMARKED])
def test_only_the_assistant_is_learned(tokenizer: Any, tmp_path: Path, template: str | None) -> None:
    tokenizer.chat_template = template
    rows = rows_of(tmp_path, {"messages": CHAT}, {"messages": CHAT[:3]})
    fmt = language_format(detect(rows, None), tokenizer)
    tokens = tokenise(rows, fmt)
    assert learned(tokenizer, tokens, 0) == "sat<|endoftext|>on the log<|endoftext|>"
    assert learned(tokenizer, tokens, 1) == "sat<|endoftext|>"
    written = tokenizer.decode(tokens.ids[: tokens.offsets[1]])
    assert written == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert isinstance(fmt, Chats)
    prompt = tokenizer.decode(fmt.prompt("the cat?"))
    assert tokenizer.apply_chat_template([*CHAT[1:3]], tokenize=False).startswith(prompt)
    assert prompt.rstrip("\n").endswith("assistant" if template is None else "[assistant]")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": None}, "line 2: `text` must be a text, not nothing"),
        ({"prompt": "a", "completion": 3}, "line 2: `completion` must be a text, not int"),
        ({"messages": []}, "line 2: `messages` must be a list"),
        ({"messages": [{"role": "user"}]}, "line 2: message 1 must have a `role` and a `content`"),
    ],
)
def test_bad_rows_are_named(tokenizer: Any, tmp_path: Path, row: dict[str, Any], message: str) -> None:
    good = {"text": "a", "prompt": "a", "completion": "b", "messages": CHAT}
    rows = rows_of(tmp_path, {k: good[k] for k in row}, row)
    name = detect(rows, None)
    with pytest.raises(UserError, match=message):
        tokenise(rows, language_format(name, tokenizer))
    with pytest.raises(UserError, match=message):
        list(texts(rows, name))


def hand_made(*marks: list[int]) -> Tokens:
    lengths = np.array([len(m) for m in marks])
    ids = np.arange(1, lengths.sum() + 1).astype(np.uint16)
    return Tokens(ids, np.concatenate(marks).astype(np.uint8), np.concatenate([[0], lengths.cumsum()]))


def test_rows_with_nothing_left_to_learn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens = hand_made([0, 0, 1, 1], [0, 0, 0, 0, 0, 1], [1], [0, 1], [0, 0, 0])
    rows = rows_of(tmp_path, *[{"text": "x"}] * 5)
    samples = Samples(tokens, rows, 3, fill=0, packed=False)
    assert [samples.name(i) for i in range(len(samples))] == [rows.name(0), rows.name(3)]
    assert samples.at(0)["input_ids"].tolist() == [1, 2, 3]
    assert samples.at(0)["labels"].tolist() == [IGNORE, 3, 4]
    assert samples.at(1)["labels"].tolist() == [13]
    assert "1 of 5 rows are longer than data.seq_len=3" in caplog.text
    assert "3 rows are left out: nothing is left to learn, as in " + rows.name(1) in caplog.text
    with pytest.raises(UserError, match=r"nothing to learn in any of the 2 rows, such as .*line 1: all is masked"):
        Samples(hand_made([0, 0], [0]), rows.select([0, 1]), 3, fill=0, packed=False)
    with pytest.raises(UserError, match=r"longer than data.seq_len=3"):
        Samples(hand_made([0, 0, 0, 0, 1], [0]), rows.select([0, 1]), 3, fill=0, packed=False)


def test_packs_hold_every_sample_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tokens = hand_made(*([0] + [1] * int(n) for n in rng.integers(1, 9, 50)))
    rows = rows_of(tmp_path, *[{"text": "x"}] * 50)
    single, packed = (Samples(tokens, rows, 12, fill=0, packed=p) for p in (False, True))
    assert len(packed) < len(single) == 50

    def pairs(samples: Samples) -> list[tuple[int, int]]:
        examples = [samples.at(i) for i in range(len(samples))]
        return sorted(p for e in examples for p in zip(e["input_ids"].tolist(), e["labels"].tolist(), strict=True))

    assert pairs(single) == pairs(packed)
    batch = packed.batch(range(len(packed)), np.zeros(len(packed), np.uint64))
    assert batch["input_ids"].shape[1] == 16  # 12 positions, rounded up
    starts = (batch["position_ids"] == 0) & (batch["labels"] != IGNORE)
    assert int(starts.sum()) == 50
    assert packed.tokens_per_example == pytest.approx(float(batch["lengths"].double().mean()))


def test_tokenised_once(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(tmp_path, {"text": "the cat"}, {"text": "sat"})
    first = tokenise(rows, Documents(tokenizer))
    calls: list[int] = []
    encode = Documents.encode
    monkeypatch.setattr(Documents, "encode", lambda *a: calls.append(1) or encode(*a))
    again = tokenise(rows_of(tmp_path, {"text": "the cat"}, {"text": "sat"}, name="copy.jsonl"), Documents(tokenizer))
    assert not calls
    assert again.ids.tolist() == first.ids.tolist()
    tokenise(rows_of(tmp_path, {"text": "the dog"}, name="new.jsonl"), Documents(tokenizer))
    assert len(calls) == 1
    tokenizer.add_tokens(["cat"])
    tokenise(rows, Documents(tokenizer))
    assert len(calls) == 2


def test_a_broken_off_run_leaves_no_cache(tokenizer: Any, tmp_path: Path, cache: Path) -> None:
    rows = rows_of(tmp_path, {"text": "the cat"}, {"text": 3})
    with pytest.raises(UserError, match=r"line 2"):
        tokenise(rows, Documents(tokenizer))
    assert [p.name for p in (cache / "tokens").iterdir() if p.is_dir()] == []


def test_many_rows_in_steps(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "ROWS_AT_ONCE", 3)
    rows = rows_of(tmp_path, *({"prompt": "a" * i, "completion": "b"} for i in range(8)))
    tokens = tokenise(rows, Completions(tokenizer))
    end = tokenizer.eos_token_id
    for i in range(8):
        expected = tokenizer("a" * i)["input_ids"] + tokenizer("b")["input_ids"] + [end]
        assert tokens.ids[tokens.offsets[i] : tokens.offsets[i + 1]].tolist() == expected
        assert learned(tokenizer, tokens, i) == "b<|endoftext|>"


def test_pairs_have_types_and_are_cut(tmp_path: Path) -> None:
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "dog"]
    tokenizer = BertTokenizer(vocab={w: i for i, w in enumerate(words)})
    rows = rows_of(tmp_path, {"text": "the cat", "text_pair": "the dog sat"}, {"text": "sat", "text_pair": "sat"})
    tokens = tokenise(rows, Pairs(tokenizer, 16, paired=True))
    labels = np.array([1, 0])
    batch = LabelledTexts(tokens, labels, rows, 0, typed=True).batch([0, 1], np.zeros(2, np.uint64))
    assert batch["input_ids"].tolist() == [[2, 5, 6, 3, 5, 8, 7, 3], [2, 7, 3, 7, 3, 0, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0] * 4 + [1] * 4, [0, 0, 0, 1, 1, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 8, [1] * 5 + [0] * 3]
    assert batch["labels"].tolist() == [1, 0]
    cut = tokenise(rows, Pairs(tokenizer, 4, paired=False))
    assert cut.ids[: cut.offsets[1]].tolist() == [2, 5, 6, 3]
