"""The text classifier's objective against plain sums, and what it says of bad labels."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from scaletrain.config import Recipe, SourceSpec
from scaletrain.data.sources import open_rows
from scaletrain.errors import UserError
from scaletrain.networks import text_classifier
from scaletrain.objectives.base import Request
from scaletrain.objectives.text_classification import Config, Objective
from tests.unit.objectives.prepared import prepared

BERT = {
    "model_type": "bert", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 32,
}  # fmt: skip
LLAMA = {**BERT, "model_type": "llama"}
ROWS = [{"text": "the cat sat " * (i % 4 + 1), "label": ["good", "bad", "fair"][i * i % 7 % 3]} for i in range(12)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALETRAIN_CACHE", str(tmp_path / "cache"))


def objective(network: dict[str, Any] | None = None, seq_len: int | None = 32, **options: Any) -> Objective:
    recipe = Recipe.model_validate(
        {
            "objective": {"type": "text_classification"},
            "networks": {"model": {"config": network or BERT}},
            "data": {"train": "unused", "seq_len": seq_len},
        }
    )
    return Objective(Config.model_validate({"tokenizer": {"vocab_size": 262}, **options}), recipe)


def rows_of(folder: Path, *rows: dict[str, Any], name: str = "rows.jsonl") -> Any:
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    return open_rows([SourceSpec(path=str(folder / name))])


def whole_batch(dataset: Any) -> dict[str, torch.Tensor]:
    return dataset.batch(range(len(dataset)), np.zeros(len(dataset), np.uint64))


@pytest.mark.parametrize("config", [BERT, LLAMA], ids=["bert", "llama"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_loss_and_accuracy_are_sums_over_texts(config: dict[str, Any], smoothing: float, tmp_path: Path) -> None:
    own = objective(config, label_smoothing=smoothing)
    data = prepared(own, rows_of(tmp_path, *ROWS), rows_of(tmp_path, *ROWS[:5], name="eval.jsonl"))
    assert data.eval is not None
    assert (len(data.train), len(data.eval)) == (12, 5)
    spec = own.networks()["model"]
    torch.manual_seed(0)
    module: Any = text_classifier.build(text_classifier.Config(**spec.config)).eval()
    with torch.no_grad():  # new weights give every class the same share, smoothed or not
        for p in module.parameters():
            p.normal_(0, 0.5)
    assert module.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    batch = whole_batch(data.train)
    assert own.tokenizer is not None
    loss, plain, right, tokens = 0.0, 0.0, 0, 0
    for row in ROWS:
        ids = own.tokenizer(row["text"])["input_ids"]
        label = ["bad", "fair", "good"].index(row["label"])
        with torch.no_grad():
            log_p = module(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        loss += float(-(1 - smoothing) * log_p[label] - smoothing * log_p.mean())
        plain, right, tokens = plain + float(-log_p[label]), right + int(log_p.argmax() == label), tokens + len(ids)
    terms = own.loss(own.turns[0], {"model": module}, batch)
    assert float(terms["loss"].sum) == pytest.approx(loss, rel=1e-5)
    assert int(terms["accuracy"].sum) == right
    assert terms["accuracy"].weight == 0
    assert not terms["accuracy"].sum.requires_grad
    assert float(own.evaluate({"model": module}, batch)["loss"].sum) == pytest.approx(plain, rel=1e-5)
    assert own.counts(own.turns[0], batch) == {"samples": 12, "tokens": tokens}


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_several_classes_of_a_text(smoothing: float, tmp_path: Path) -> None:
    rows = [{"text": r["text"], "labels": [[], ["b"], ["c", "a"], ["a"]][i % 4]} for i, r in enumerate(ROWS)]
    own = objective(multi_label=True, label_smoothing=smoothing)
    data = prepared(own, rows_of(tmp_path, *rows), None)
    torch.manual_seed(0)
    module: Any = text_classifier.build(text_classifier.Config(**own.networks()["model"].config)).eval()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, 0.5)
    assert module.config.problem_type == "multi_label_classification"
    assert own.tokenizer is not None
    loss, right, gold, found = 0.0, 0, [], []
    for row in rows:
        with torch.no_grad():
            p = module(input_ids=torch.tensor([own.tokenizer(row["text"])["input_ids"]])).logits[0].sigmoid().tolist()
        is_of = [name in row["labels"] for name in "abc"]
        for share, true in zip(p, is_of, strict=True):
            aim = (1 - smoothing) * true + smoothing / 2
            loss -= (aim * math.log(share) + (1 - aim) * math.log(1 - share)) / 3
        gold.append(is_of)
        found.append([share > 0.5 for share in p])
        right += gold[-1] == found[-1]
    batch = whole_batch(data.train)
    terms = own.loss(own.turns[0], {"model": module}, batch)
    assert float(terms["loss"].sum.detach()) == pytest.approx(loss, rel=1e-4)
    assert int(terms["accuracy"].sum) == right
    with torch.no_grad():
        sums = own.evaluate({"model": module}, batch)
    metrics = own.conclude({name: float(term.sum) / 12 for name, term in sums.items()})
    assert metrics["f1_micro"] == pytest.approx(f1_score(gold, found, average="micro", zero_division=0))
    said = own.sample({"model": module}, Request(1, torch.Generator(), (rows[0]["text"],)))
    assert said is not None
    assert said.texts is not None
    assert [name for name in "abc" if f"{name} (" in said.texts[0]] == [
        n for n, f in zip("abc", found[0], strict=True) if f
    ]


def test_it_learns_and_is_restored(tmp_path: Path) -> None:
    own = objective()
    rows = [{"text": f"{w} day", "label": i} for i, w in enumerate(["good", "bad"])] * 4
    data = prepared(own, rows_of(tmp_path, *rows), None)
    torch.manual_seed(0)
    module: Any = text_classifier.build(text_classifier.Config(**own.networks()["model"].config))
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for _ in range(20):
        term = own.loss(own.turns[0], {"model": module}, whole_batch(data.train))["loss"]
        optimizer.zero_grad()
        term.sum.backward()
        optimizer.step()
    module.eval()
    module.save_pretrained(tmp_path / "model")
    own.save_assets("model", tmp_path / "model")
    again = objective()
    again.restore({"model": tmp_path / "model"})
    config = text_classifier.Config(**json.loads(json.dumps(again.networks()["model"].config)))
    loaded = text_classifier.load(str(tmp_path / "model"), config, torch.float32).eval()
    request = Request(2, torch.Generator(), ("good day", "bad day"))
    found = again.sample({"model": loaded}, request)
    assert found is not None
    assert [t.split()[0] for t in found.texts or []] == ["0", "1"]
    assert again.sample({"model": loaded}, Request(2, torch.Generator())) is None


def test_long_texts_of_a_request_are_cut_to_the_network(tmp_path: Path) -> None:
    own = objective(seq_len=24)
    prepared(own, rows_of(tmp_path, *ROWS), None)
    module = text_classifier.build(text_classifier.Config(**own.networks()["model"].config)).eval()
    cut = own.batch_of(["the cat sat " * 40], module, torch.device("cpu"))["input_ids"]
    assert cut.shape == (1, 24)
    assert own.sample({"model": module}, Request(1, torch.Generator(), ("the cat sat " * 40,))) is not None


@pytest.mark.parametrize(
    ("options", "train", "held", "message"),
    [
        (
            {"num_classes": 2},
            [{"text": "a", "label": 5}],
            None,
            "line 1: `label` is 5, out of range: there are 2 classes",
        ),
        ({}, [{"text": "a", "label": "x"}, {"text": "a", "label": 3}], None, "line 2: `label` is 3"),
        (
            {},
            [{"text": "a", "label": "x"}, {"text": "a", "label": "y"}],
            [{"text": "a", "label": "z"}],
            "no class of the",
        ),
        ({}, [{"text": None, "label": 0}, {"text": "a", "label": 1}], None, "line 1: `text` must be a text"),
        ({}, [{"text": "a"}], None, "no column `label`"),
        ({"multi_label": True}, [{"text": "a", "labels": "x"}], None, "line 1: `labels` is 'x', not a list"),
        (
            {"multi_label": True},
            [{"text": "a", "labels": ["x"]}, {"text": "a", "labels": ["x", 3]}],
            None,
            "line 2, label 2: `labels` is 3",
        ),
        (
            {"seq_len": 33},
            [{"text": "a", "label": 0}, {"text": "a", "label": 1}],
            None,
            "data.seq_len=33: .* 32 positions",
        ),
        (
            {"network": {**BERT, "num_labels": 3}},
            [{"text": "a", "label": 0}, {"text": "a", "label": 1}],
            None,
            "networks.model.config.num_labels is 3",
        ),
    ],
)
def test_bad_data_is_named(options: Any, train: Any, held: Any, message: str, tmp_path: Path) -> None:
    tokenizer = objective()
    prepared(tokenizer, rows_of(tmp_path, *ROWS, name="good.jsonl"), None)
    own = objective(**options)
    own.tokenizer = tokenizer.tokenizer
    eval_rows = rows_of(tmp_path, *held, name="eval.jsonl") if held else None
    with pytest.raises(UserError, match=message):
        prepared(own, rows_of(tmp_path, *train), eval_rows)


def test_what_is_said_of_the_data(tmp_path: Path) -> None:
    own = objective()
    rows = [*({"text": "the cat sat " * (i + 1), "label": "good"} for i in range(3)), {"text": "a", "label": "bad"}]
    data = prepared(own, rows_of(tmp_path, *rows, rows[0]), None).train
    first, second = own.inspect(data).lines
    assert first == "5 texts in 2 classes: good 80.0%, bad 20.0%"
    assert second.endswith("1 texts occur again, such as " + data.name(4))
