"""The text regression's objective against plain sums, and what it says of bad numbers."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from scaletrain.errors import UserError
from scaletrain.objectives.base import Request
from tests.unit.objectives.prepared import prepared
from tests.unit.objectives.texts import network, objective, rows_of, whole_batch

ROWS = [{"text": "the cat " * (i % 4 + 1), "text_pair": "sat on " * (i % 3), "label": i * i % 7 / 2} for i in range(12)]


def test_loss_and_metrics_are_sums_over_pairs(tmp_path: Path) -> None:
    own = objective("text_regression")
    data = prepared(own, rows_of(tmp_path, *ROWS), rows_of(tmp_path, *ROWS[:5], name="eval.jsonl"))
    module = network(own)
    assert module.config.problem_type == "regression"
    found, labels, tokens = [], [row["label"] for row in ROWS], 0
    for row in ROWS:
        ids = own.tokenizer(row["text"], row["text_pair"])["input_ids"]
        tokens += len(ids)
        with torch.no_grad():
            found.append(float(module(input_ids=torch.tensor([ids])).logits[0, 0]))
    batch = whole_batch(data.train)
    loss = sum((x - y) ** 2 for x, y in zip(found, labels, strict=True))
    assert float(own.loss(own.turns[0], {"model": module}, batch)["loss"].sum.detach()) == pytest.approx(loss, rel=1e-5)
    assert own.counts(own.turns[0], batch) == {"samples": 12, "tokens": tokens}
    with torch.no_grad():
        terms = own.evaluate({"model": module}, batch)
    metrics = own.conclude({name: float(term.sum) / 12 for name, term in terms.items()})
    assert metrics == {
        "loss": pytest.approx(loss / 12, rel=1e-5),
        "rmse": pytest.approx(math.sqrt(loss / 12), rel=1e-5),
        "pearson": pytest.approx(stats.pearsonr(found, labels).statistic, rel=1e-4),
    }


def test_a_sample_is_a_number_before_its_text(tmp_path: Path) -> None:
    own = objective("text_regression")
    prepared(own, rows_of(tmp_path, *ROWS), None)
    module = network(own)
    found = own.sample({"model": module}, Request(1, torch.Generator(), ("the cat",)))
    with torch.no_grad():
        plain = module(input_ids=torch.tensor([own.tokenizer("the cat")["input_ids"]])).logits[0, 0]
    assert found.texts == [f"{float(plain):.3f}: the cat"]


@pytest.mark.parametrize("label", ["good", None, True, float("inf")])
def test_bad_numbers_are_named(label: Any, tmp_path: Path) -> None:
    rows = rows_of(tmp_path, *ROWS[:3], {**ROWS[0], "label": label})
    with pytest.raises(UserError, match=r"line 4: `label` is .*, not a number"):
        prepared(objective("text_regression"), rows, None)
