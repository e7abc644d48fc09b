"""Masked language modelling against the library's own loss, and what is hidden against the shares of the paper."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scaletrain.data.text import IGNORE
from scaletrain.errors import UserError
from scaletrain.objectives.base import Request
from tests.recipes.tiny import WORDS, make_networks
from tests.unit.objectives.prepared import prepared
from tests.unit.objectives.texts import BERT, from_recipe, network, objective, rows_of, whole_batch

TEXTS = [" ".join(WORDS[j % 15] for j in range(i, i * i % 23 + 2)) for i in range(60)]
ROWS = [{"text": text} for text in TEXTS]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A network whose tokenizer has a mask, a beginning and an end."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("networks")
    make_networks(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "bert")
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    tokenizer.save_pretrained(folder / "bert")
    return str(folder / "bert")


def pretrained(path: str, seq_len: int | None = 16, **options: Any) -> Any:
    return from_recipe({"type": "masked_lm", **options}, {"model": {"path": path}}, seq_len)


@pytest.mark.parametrize("blocks", [True, False])
def test_loss_is_the_librarys(blocks: bool, bert: str, tmp_path: Path) -> None:
    own = pretrained(bert, blocks=blocks)
    batch = whole_batch(prepared(own, rows_of(tmp_path, *ROWS), None).train)
    module = network(own)
    with torch.no_grad():
        out = module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
    hidden = int((batch["labels"] >= 0).sum())
    terms = own.loss(own.turns[0], {"model": module}, batch)
    assert float(terms["loss"].sum.detach()) == pytest.approx(float(out.loss) * hidden, rel=1e-5)
    assert int(terms["accuracy"].sum) == int((out.logits.argmax(-1) == batch["labels"]).sum())
    assert own.counts(own.turns[0], batch) == {"targets": hidden, "tokens": int(batch["attention_mask"].sum())}


def restored(example: Any) -> list[int]:
    """Return what an example says with nothing hidden."""
    return np.where(example["labels"] == IGNORE, example["input_ids"], example["labels"]).tolist()


@pytest.mark.parametrize("words", [False, True])
def test_blocks_hold_every_token_once(words: bool, bert: str, tmp_path: Path) -> None:
    own = pretrained(bert, whole_words=words)
    data = prepared(own, rows_of(tmp_path, *ROWS), None).train
    told = []
    for i in range(len(data)):
        ids = restored(data.example(i, np.random.default_rng(i)))
        assert (ids[0], ids[-1], len(ids) <= 16) == (2, 3, True)
        told += ids[1:-1]
    whole = [t for text in TEXTS if text for t in own.tokenizer(text)["input_ids"][1:]]  # with [SEP] at the end
    assert told == whole


def test_rows_are_cut_and_empty_ones_left_out(bert: str, tmp_path: Path) -> None:
    own = pretrained(bert, 12, blocks=False)
    data = prepared(own, rows_of(tmp_path, *ROWS), None).train
    kept = [text for text in TEXTS if text]
    assert len(data) == len(kept) < len(TEXTS)
    for i, text in enumerate(kept):
        ids = restored(data.example(i, np.random.default_rng(i)))
        bare = own.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == [2, *[*bare, 3][:10], 3]


def test_shares_are_those_of_the_paper(bert: str, tmp_path: Path) -> None:
    own = pretrained(bert, 32)
    data = prepared(own, rows_of(tmp_path, *ROWS), None).train
    ordinary = hidden = masked = kept = 0
    known = own.tokenizer.get_vocab()
    special = set(own.tokenizer.all_special_ids)
    seen: set[int] = set()
    for i in range(len(data)):
        for seed in range(60):
            example = data.example(i, np.random.default_rng(seed))
            where = example["labels"] != IGNORE
            assert not special & set(example["labels"][where].tolist())
            ordinary += sum(t not in special for t in restored(example))
            hidden += int(where.sum())
            masked += int((example["input_ids"][where] == known["[MASK]"]).sum())
            kept += int((example["input_ids"][where] == example["labels"][where]).sum())
            seen |= set(example["input_ids"][where].tolist())
    assert hidden / ordinary == pytest.approx(0.15, abs=0.005)
    assert masked / hidden == pytest.approx(0.8, abs=0.02)
    assert kept / hidden == pytest.approx(0.1 + 0.1 / 15, abs=0.02)  # one of 15 random tokens is the token itself
    assert seen == {known[word] for word in WORDS} | {known["[MASK]"]}
    one, two, three = (data.example(0, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one["input_ids"], two["input_ids"])
    assert not np.array_equal(one["labels"], three["labels"])


def test_whole_words_are_hidden_together(tmp_path: Path) -> None:
    own = objective("masked_lm", seq_len=32, whole_words=True, share=0.4)
    text = "abcdefgh hgfedcba aabb " * 40  # byte-level tokens: each word has several
    data = prepared(own, rows_of(tmp_path, {"text": text}), None).train
    partly, hidden, ordinary = 0, 0, 0
    for i in range(len(data)):
        for seed in range(20):
            example = data.example(i, np.random.default_rng(seed))
            pieces = own.tokenizer.convert_ids_to_tokens(restored(example))
            where = (example["labels"] != IGNORE).tolist()
            words, number = [], -1
            for j, piece in enumerate(pieces):
                number += j == 0 or piece.startswith(("Ġ", "<"))
                words.append(number)
            for word in range(number + 1):
                of = {h for h, w, p in zip(where, words, pieces, strict=True) if w == word and not p.startswith("<")}
                partly += len(of) > 1
            hidden, ordinary = hidden + sum(where), ordinary + len(pieces)
    assert partly == 0
    assert 0.25 < hidden / ordinary <= 0.4  # whole words that fit into the share


def test_a_new_tokenizer_gets_a_mask_that_is_kept(tmp_path: Path) -> None:
    own = objective("masked_lm")
    prepared(own, rows_of(tmp_path, *ROWS), None)
    assert own.tokenizer.mask_token_id == 262
    assert own.networks()["model"].config["vocab_size"] == 263
    module = network(own)
    module.save_pretrained(tmp_path / "model")
    own.save_assets("model", tmp_path / "model")
    again = objective("masked_lm")
    again.restore({"model": tmp_path / "model"})
    assert again.tokenizer.mask_token_id == 262
    text = f"the cat{again.tokenizer.mask_token} sat"
    found = again.sample({"model": module}, Request(1, torch.Generator(), (text,)))
    ids = again.tokenizer(text)["input_ids"]
    best = module(input_ids=torch.tensor([ids])).logits.argmax(-1)[0]
    filled = [int(best[i]) if token == 262 else token for i, token in enumerate(ids)]
    assert found is not None
    assert found.texts == [again.tokenizer.decode(filled, skip_special_tokens=True)]


def test_what_cannot_be_is_refused(bert: str, tmp_path: Path) -> None:
    rows = rows_of(tmp_path, *ROWS)
    with pytest.raises(UserError, match=r"data.seq_len is missing"):
        prepared(pretrained(bert, None), rows, None)
    with pytest.raises(UserError, match=r"the tokenizer has no mask token"):
        prepared(pretrained(str(Path(bert).parent / "finetuned")), rows, None)
    with pytest.raises(UserError, match=r"data.seq_len=2: nothing is left"):
        prepared(pretrained(bert, 2), rows, None)
    with pytest.raises(UserError, match=r"the text of all 2 rows is empty"):
        prepared(pretrained(bert), rows_of(tmp_path, {"text": ""}, {"text": ""}, name="empty.jsonl"), None)


def test_positions_that_begin_after_the_padding_are_counted(tmp_path: Path) -> None:
    roberta = {**BERT, "model_type": "roberta", "max_position_embeddings": 34}  # padding is 1: 32 are left
    own = objective("masked_lm", roberta, 33)
    with pytest.raises(UserError, match=r"data.seq_len=33: the network has 32 positions"):
        prepared(own, rows_of(tmp_path, *ROWS), None)
    own = objective("masked_lm", roberta, 32)
    batch = whole_batch(prepared(own, rows_of(tmp_path, *ROWS), None).train)
    assert batch["input_ids"].shape[1] == 32
    assert torch.isfinite(own.loss(own.turns[0], {"model": network(own)}, batch)["loss"].sum)
