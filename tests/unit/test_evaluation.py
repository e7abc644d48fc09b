"""Evaluation by source and of generated answers, on a tiny run, against plain sums over its rows."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scaletrain import finished
from scaletrain.callbacks.base import Plan
from scaletrain.callbacks.progress import Progress, table
from scaletrain.chat import chat
from scaletrain.config import Recipe
from scaletrain.data.dataset import Dataset, Example
from scaletrain.data.joined import Joined
from scaletrain.engine.world import World
from scaletrain.errors import UserError
from scaletrain.evaluate.text_metrics import exact_match, rouge, token_f1
from scaletrain.evaluation import evaluate, sources_of
from scaletrain.player import Term
from scaletrain.recipe import load
from scaletrain.runs import train
from tests.recipes.tiny import make_data

JUDGE = "objective.judge={rows: 100, max_new_tokens: 6}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts, and completions of different lengths in the two files for evaluation."""
    folder = tmp_path_factory.mktemp("evaluation")
    make_data(folder)
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    rows.sort(key=lambda row: len(row["completion"]))
    (folder / "eval").mkdir()
    for name, some in {"a": rows[:7], "b": rows[-5:]}.items():
        (folder / "eval" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    """A network that has learned its rows almost by heart, so that some answers are right."""
    recipe = load(
        "lm/lora",
        [
            f"networks.model={{type: causal_lm, path: {data}/llama}}",
            f"data.train=[{data}/eval/a.jsonl, {data}/eval/b.jsonl]",
            f"data.eval=[{data}/eval/a.jsonl, {data}/eval/b.jsonl]",
            *("data.holdout=0", "data.seq_len=48", "train.duration=60 steps", "train.global_batch=2"),
            *("players.model.optimizer.lr=1e-2", "evaluate.batch=2", JUDGE),
        ],
    )
    return train(recipe, "r", data, observers=None)


def plain(run: Path, files: list[Path]) -> dict[str, float]:
    """The same figures, a row at a time, by the libraries alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run / "latest" / "networks" / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    loss, right, tokens, rows = 0.0, 0, 0, 0
    sums: dict[str, float] = {}
    for file in files:
        for line in file.read_text().splitlines():
            row = json.loads(line)
            prompt = tokenizer(row["prompt"]).input_ids
            completion = [*tokenizer(row["completion"]).input_ids, tokenizer.eos_token_id]
            ids = list(prompt)
            with torch.no_grad():
                logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
                loss += float(F.cross_entropy(logits, torch.tensor(completion), reduction="sum"))
                right += int((logits.argmax(-1) == torch.tensor(completion)).sum())
                for _ in range(6):
                    ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
                    if ids[-1] == tokenizer.eos_token_id:
                        break
            found = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
            wanted = tokenizer.decode(completion, skip_special_tokens=True)
            for name, value in {
                **exact_match(found, wanted),
                **token_f1(found, wanted),
                **rouge(found, wanted),
            }.items():
                sums[name] = sums.get(name, 0.0) + value
            tokens, rows = tokens + len(completion), rows + 1
    means = {name: total / rows for name, total in sums.items()}
    return {"loss": loss / tokens, "accuracy": right / tokens, "perplexity": math.exp(loss / tokens), **means}


def expected(run: Path, data: Path) -> dict[str, float]:
    files = {"a": data / "eval" / "a.jsonl", "b": data / "eval" / "b.jsonl"}
    found = plain(run, [*files.values()])
    for name, file in files.items():
        found |= {f"{metric}@{name}": value for metric, value in plain(run, [file]).items()}
    return found


def test_metrics_are_those_of_each_source_and_of_all(run: Path, data: Path) -> None:
    wanted = expected(run, data)
    assert 0 < wanted["f1"] < 1
    assert wanted["loss"] != pytest.approx((wanted["loss@a"] + wanted["loss@b"]) / 2)
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    found = {k: v for k, v in record.items() if k not in ("kind", "step", "stage")}
    assert found == pytest.approx(wanted, rel=1e-5)
    assert json.loads((run / "summary.json").read_text())["metrics"] == pytest.approx(wanted, rel=1e-5)


def test_afterwards_without_the_training_data(run: Path, data: Path, tmp_path: Path) -> None:
    wanted, text = expected(run, data), (run / "recipe.yaml").read_text()
    try:
        (run / "recipe.yaml").write_text(text.replace(f"{data}/eval/", "/nowhere/"))
        other = [str(data / "eval" / f"{name}.jsonl") for name in "ab"]
        found, *_ = finished.evaluate(run, other)
        assert found == pytest.approx(wanted, rel=1e-5)
        renamed = tmp_path / "renamed.jsonl"
        renamed.write_text((data / "eval" / "a.jsonl").read_text().replace('"prompt"', '"q"'))
        found, *_ = finished.evaluate(run, [f"{{path: {renamed}, columns: {{prompt: q}}}}"])
        assert found["loss"] == pytest.approx(wanted["loss@a"], rel=1e-5)
        with pytest.raises(UserError, match="nowhere"):
            finished.evaluate(run)
    finally:
        (run / "recipe.yaml").write_text(text)


def test_answers_when_asked(run: Path, data: Path) -> None:
    one = [str(data / "eval" / "a.jsonl")]
    found, *_ = finished.evaluate(run, one, generate=7)
    assert found["f1"] == pytest.approx(expected(run, data)["f1@a"])


def test_samples_and_conversation(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = json.loads((run.parent / "eval" / "b.jsonl").read_text().splitlines()[0])
    options = {"temperature": 0, "max_new_tokens": 6}
    (text,) = finished.sample(run, 1, (row["prompt"],), None, **options).texts or []
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{row['prompt']}\n"))
    chat(run, options=options)
    answer = capsys.readouterr().out.strip()
    assert len(answer.split()) > 1
    assert text == f"{row['prompt']} {answer}"
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    with pytest.raises(UserError, match="no system turn"):
        chat(run, system="Be short.")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = ["networks.model.config.architecture=resnet18", "networks.model.config.features=8", "data.train.rows=100"]
    tiny += ["objective.size=null"]  # then it is that of the pictures
    recipe = load("vision/cnn", [*tiny, "train.duration=1 steps", "train.global_batch=10"])
    return train(recipe, "p", tmp_path_factory.mktemp("pictures"), observers=None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: finished.sample(run, 1, ("a cat",)), "--prompt: `image_classification` takes no prompts"),
        (lambda run: finished.evaluate(run, generate=3), "--generate: `image_classification` generates no answers"),
        (chat, "`image_classification` does not talk"),
    ],
)
def test_families_that_do_not_speak(call: Any, message: str, pictures: Path) -> None:
    with pytest.raises(UserError, match=message):
        call(pictures)


def test_data_that_do_not_fit_the_network(pictures: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.zeros((12, 12), np.uint8)).save(file, "PNG")
    pq.write_table(pa.table({"image": [file.getvalue()], "label": [0]}), pictures.parent / "other.parquet")
    with pytest.raises(UserError, match="do not fit the run"):
        finished.evaluate(pictures, [str(pictures.parent / "other.parquet")])


def test_plain_text_has_no_answers(data: Path) -> None:
    given = [f"data.train={data}/text.txt", f"networks.model.path={data}/llama", "data.holdout=0", "data.seq_len=48"]
    recipe = load("lm/lora", [*given, JUDGE])
    with pytest.raises(UserError, match=r"objective.judge: plain text has no answers"):
        train(recipe, "t", data, observers=None)


def test_the_harness_is_named_where_it_is_missing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match="pip install lm-eval"):
        finished.evaluate_tasks(run, ["hellaswag"])


def test_the_table_has_a_line_for_each_metric_and_a_column_for_each_source() -> None:
    whole = {"loss": 1.5, "f1": 0.25, "f1/dev": 0.75, "reward/chosen": 2}
    text = table({**whole, "loss@dev": 1, "f1@dev": 0.5, "f1/dev@dev": 0.125, "loss@b/all": 2.25}, ["dev", "b/all"])
    assert [line.split() for line in text.splitlines()] == [
        ["all", "dev", "b/all"],
        ["loss", "1.5", "1", "2.25"],
        ["f1", "0.25", "0.5"],
        ["f1/dev", "0.75", "0.125"],
        ["reward/chosen", "2"],
    ]
    assert table(whole, ()) == ""


class Told(Dataset):
    """Samples that are numbers."""

    def __init__(self, *numbers: float):
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        return {"number": self.numbers[index]}

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        return {"number": torch.tensor([e["number"] for e in examples])}

    def name(self, index: int) -> str:
        return str(index)


class Scored:
    """Stands for an objective that scores a class by the name of `dev`."""

    turns = (None,)

    def evaluate(self, networks: Any, batch: Any) -> dict[str, Term]:
        return {name: Term(factor * batch["number"].sum(), "rows") for name, factor in (("f1", 1), ("f1/dev", 10))}

    def counts(self, turn: Any, batch: Any) -> dict[str, int]:
        return {"rows": len(batch["number"])}

    def answers(self, dataset: Dataset) -> None:
        return None

    def conclude(self, metrics: dict[str, float]) -> dict[str, float]:
        return {name: value for name, value in metrics.items() if name != "loss"}


def test_a_class_may_be_called_as_a_source() -> None:
    recipe = Recipe.model_validate({"objective": {"type": "causal_lm"}, "data": {"train": "unused"}})
    sets, own, world = {"dev": Told(1.0, 3.0), "test": Told(6.0, 6.0)}, Scored(), World(torch.device("cpu"))
    whole: Any = Joined([*sets.values()], tuple(sets))
    metrics = evaluate(own, {}, whole, recipe, world)  # type: ignore[arg-type]
    expected = {"f1": 4.0, "f1@dev": 2.0, "f1@test": 6.0, "f1/dev": 40.0, "f1/dev@dev": 20.0, "f1/dev@test": 60.0}
    assert metrics == expected
    assert sources_of(whole) == ("dev", "test")
    assert sources_of(sets["dev"]) == ()
    numbers = dict.fromkeys(("first_step", "steps", "at", "parameters", "trainable", "micro_batch", "accumulate"), 1)
    numbers |= dict.fromkeys(("processes", "train_examples", "eval_examples"), 1)
    words = dict.fromkeys(("stage", "precision", "device", "unit"), "x")
    options: Any = {**numbers, **words, "stages": ("x",), "streamed": False, "bytes": {}}
    for sources, figures in ((sources_of(whole), table(metrics, ("dev", "test"))), ((), "f1/dev 40")):
        progress = Progress(io.StringIO())
        progress.begin(Plan(**options, eval_sources=sources))
        progress.evaluated(1, {"kind": "evaluate", "step": 1, **(metrics if sources else {"f1": 4.0, "f1/dev": 40.0})})
        assert figures in progress.stream.getvalue()  # type: ignore[attr-defined]
