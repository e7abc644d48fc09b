"""Tagging against the library's own loss over words that the library split, and what is said of bad tags."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from scaletrain.errors import UserError
from scaletrain.objectives.base import Request
from tests.unit.objectives.prepared import prepared
from tests.unit.objectives.texts import BERT, from_recipe, network, rows_of, whole_batch

PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefg", *(f"##{c}" for c in "abcdefg"), ".")
ROWS = [
    {"tokens": ["abc", "d.", "e"], "tags": ["B-X", "I-X", "O"]},
    {"tokens": ["\u200b", "ab", "\u200b", "\u200b", "c"], "tags": ["O", "B-Y", "O", "I-Y", "B-X"]},
    {"tokens": ["g"], "tags": ["O"]},
    {"tokens": ["abcdefg"] * 6, "tags": ["O", "B-X", "I-X", "I-Y", "O", "B-Y"]},  # cut at 32 tokens
]
NAMES = ["B-X", "B-Y", "I-X", "I-Y", "O"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerFast:
    """Word pieces that have no token for a blank of no width, and drop it."""
    backend = Tokenizer(models.WordPiece({p: i for i, p in enumerate(PIECES)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Replace("\u200b", "")
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    found = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    found.save_pretrained(tmp_path / "tokenizer")
    return found


def tagger(folder: Path, **options: Any) -> Any:
    options = {"type": "token_classification", "tokenizer": {"path": str(folder / "tokenizer")}, **options}
    return from_recipe(options, {"model": {"config": BERT}})


def reference(tokenizer: PreTrainedTokenizerFast, module: Any) -> tuple[float, int, int]:
    """Return the loss, the words that are right, and the words, with the library's labels at first pieces."""
    loss, right, words = 0.0, 0, 0
    for row in ROWS:
        done = tokenizer(row["tokens"], is_split_into_words=True, truncation=True, max_length=32)
        of_word, labels = done.word_ids(), []
        for i, word in enumerate(of_word):
            first = word is not None and (i == 0 or of_word[i - 1] != word)
            labels.append(NAMES.index(row["tags"][word]) if first else -100)
        target = torch.tensor([labels])
        with torch.no_grad():
            out = module(input_ids=torch.tensor([done["input_ids"]]), labels=target)
        count = int((target >= 0).sum())
        loss, words = loss + float(out.loss) * count, words + count
        right += int((out.logits.argmax(-1) == target).sum())
    return loss, right, words


def test_loss_is_the_librarys(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    own = tagger(tmp_path)
    data = prepared(own, rows_of(tmp_path, *ROWS), None)
    module = network(own)
    assert [module.config.id2label[i] for i in range(5)] == NAMES
    loss, right, words = reference(tokenizer, module)
    batch = whole_batch(data.train)
    terms = own.loss(own.turns[0], {"model": module}, batch)
    assert words == 3 + 2 + 1 + 5  # words without pieces, and the one that is cut off, are not learned
    assert float(terms["loss"].sum.detach()) == pytest.approx(loss, rel=1e-5)
    assert int(terms["accuracy"].sum) == right
    assert own.counts(own.turns[0], batch)["words"] == words
    with torch.no_grad():
        sums = own.evaluate({"model": module}, batch)
    metrics = own.conclude({name: float(term.sum) / words for name, term in sums.items()})
    assert {"loss", "accuracy", "f1", "f1_macro"} <= set(metrics) <= {*metrics, "f1/X", "f1/Y"}
    assert not [name for name in metrics if ":" in name]


def test_perfect_tags_have_an_f1_of_1(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    own = tagger(tmp_path)
    batch = whole_batch(prepared(own, rows_of(tmp_path, *ROWS), None).train)
    logits = torch.zeros(*batch["input_ids"].shape, 5)
    for row, (places, labels) in enumerate(zip(batch["places"], batch["labels"], strict=True)):
        for place, label in zip(places.tolist(), labels.tolist(), strict=True):
            if label >= 0:
                logits[row, place, label] = 1

    def told(**inputs: torch.Tensor) -> Any:
        return type("Out", (), {"logits": logits})

    metrics = own.conclude({n: float(t.sum) for n, t in own.evaluate({"model": told}, batch).items()})
    assert (metrics["f1"], metrics["f1/X"], metrics["f1/Y"]) == (1, 1, 1)


def test_ids_may_have_names(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [{"tokens": ["a", "b"], "tags": [0, 2]}]
    own = tagger(tmp_path, names=["O", "B-X", "I-X"])
    prepared(own, rows_of(tmp_path, *rows), None)
    module = network(own)
    assert module.config.id2label == {0: "O", 1: "B-X", 2: "I-X"}
    own.save_assets("model", tmp_path)
    own.tokenizer.save_pretrained(tmp_path)
    again = tagger(tmp_path)
    again.restore({"model": tmp_path})
    assert again.classes == own.classes
    found = again.sample({"model": module}, Request(1, torch.Generator(), ("ab \u200b c",)))
    assert found is not None
    words = [word.split("/") for word in found.texts[0].split(" ")]
    assert [word for word, _ in words] == ["ab", "\u200b", "c"]
    assert words[1][1] == "?"
    assert {words[0][1], words[2][1]} <= {"O", "B-X", "I-X"}


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, {}, r"line 2: 2 words in `tokens`, but 1 in `tags`"),
        ({"tokens": [], "tags": []}, {}, r"line 2: `tokens` must be a list of words, not an empty list"),
        ({"tokens": "a b", "tags": ["O", "O", "O"]}, {}, r"line 2: `tokens` must be a list of words"),
        ({"tokens": ["a", 3], "tags": ["O", "O"]}, {}, r"line 2: `tokens` must be a text"),
        ({"tokens": ["a"], "tags": "O"}, {}, r"line 2: `tags` is 'O', not a list"),
        ({"tokens": ["a", "b"], "tags": ["O", 1]}, {}, r"line 2, label 2: `tags` is 1, not the name"),
        ({"tokens": ["a"], "tags": ["B-Z"]}, {"names": ["O", "B-X"]}, "objective.names lacks tags of the data: B-Z"),
    ],
)
def test_bad_rows_are_named(
    row: Any, options: Any, message: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = rows_of(tmp_path, {"tokens": ["a"], "tags": ["O"]}, row)
    with pytest.raises(UserError, match=message):
        prepared(tagger(tmp_path, **options), rows, None)


def test_virtual_tokens_take_positions(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    options = {"type": "token_classification", "tokenizer": {"path": str(tmp_path / "tokenizer")}}
    adapted = {"model": {"config": BERT, "adapter": {"type": "prompt", "virtual_tokens": 4}}}
    with pytest.raises(UserError, match=r"data.seq_len=25: the network has 24 positions, .* beside 4 virtual"):
        prepared(from_recipe(options, adapted, 25), rows_of(tmp_path, *ROWS), None)
    own = from_recipe(options, adapted, None)
    batch = whole_batch(prepared(own, rows_of(tmp_path, *ROWS), None).train)
    assert batch["input_ids"].shape[1] == 24
    own.evaluate({"model": network(own)}, batch)


def test_long_texts_of_a_request_are_cut_to_the_network(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    options = {"type": "token_classification", "tokenizer": {"path": str(tmp_path / "tokenizer")}}
    own = from_recipe(options, {"model": {"config": BERT}}, None)
    prepared(own, rows_of(tmp_path, *ROWS), None)
    found = own.sample({"model": network(own)}, Request(1, torch.Generator(), ("a " * 60,)))
    assert found is not None
    tags = [word.partition("/")[2] for word in (found.texts or [""])[0].split(" ")]
    assert ("?" in tags[:30], set(tags[30:])) == (False, {"?"})  # with [CLS] and [SEP] they fill 32 positions
    own.save_assets("model", tmp_path / "saved")
    assert len(PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")("a " * 60)["input_ids"]) == 62
