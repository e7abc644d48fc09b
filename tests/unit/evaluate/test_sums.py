"""Metrics from sums against scikit-learn, scipy and a plain count of spans, with the set cut into batches."""

import math
from collections.abc import Iterable, Mapping

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import f1_score

from scaletrain.evaluate.sums import Spans, correlation_terms, f1, f1_terms, hits, pearson
from scaletrain.player import Term


def divided(batches: Iterable[Mapping[str, Term]], count: int) -> dict[str, float]:
    """Sum over batches and divide once, as an evaluation does."""
    sums: dict[str, float] = {}
    for terms in batches:
        for name, term in terms.items():
            assert term.weight == 0
            sums[name] = sums.get(name, 0.0) + float(term.sum)
    return {name: value / count for name, value in sums.items()}


@pytest.mark.parametrize("classes", [2, 5])
def test_f1_of_one_class_each(classes: int) -> None:
    rng = np.random.default_rng(classes)
    gold, found = rng.integers(0, classes - (classes > 2), (2, 103))  # of 5, one never occurs
    names = [f"c{i}" for i in range(classes)]
    one_hot = torch.nn.functional.one_hot
    batches = [
        f1_terms(names, *hits(one_hot(f, classes).bool(), one_hot(g, classes).bool()), "samples")
        for f, g in zip(torch.tensor(found).split(10), torch.tensor(gold).split(10), strict=True)
    ]
    scores = f1(divided(batches, 103) | {"loss": 2.0})
    assert scores.pop("loss") == 2.0
    assert scores.pop("f1") == pytest.approx(f1_score(gold, found, average="macro"))
    each = f1_score(gold, found, average=None)
    expected = {f"f1/c{i}": each[i] if i < len(each) else math.nan for i in range(classes)}
    assert scores == pytest.approx(expected, nan_ok=True)


def test_f1_of_several_classes_each() -> None:
    rng = np.random.default_rng(0)
    gold, found = rng.random((2, 50, 4)) < 0.3
    terms = f1_terms("abcd", *hits(torch.tensor(found), torch.tensor(gold)), "samples")
    scores = f1(divided([terms], 50), micro=True)
    assert scores["f1"] == pytest.approx(f1_score(gold, found, average="macro"))
    assert scores["f1_micro"] == pytest.approx(f1_score(gold, found, average="micro"))


def test_f1_of_nothing_is_zero() -> None:
    none = torch.zeros(2, dtype=torch.long)
    found = f1(divided([f1_terms("ab", none, none, "samples")], 1), micro=True)
    assert found == pytest.approx({"f1": 0, "f1_micro": 0, "f1/a": math.nan, "f1/b": math.nan}, nan_ok=True)


def test_pearson() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(1000, 1, 90).astype(np.float32)  # far from 0, where single precision would be too little
    y = (0.5 * x + rng.normal(0, 1, 90)).astype(np.float32)
    parts = zip(torch.tensor(x).split(7), torch.tensor(y).split(7), strict=True)
    found = pearson(divided((correlation_terms(a, b, "samples") for a, b in parts), 90))
    assert found == {"pearson": pytest.approx(stats.pearsonr(x, y).statistic, rel=1e-6)}
    same = torch.full((4,), 0.1)
    assert math.isnan(pearson(divided([correlation_terms(same, torch.tensor(y[:4]), "samples")], 4))["pearson"])


TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def spans_of(tags: list[str]) -> set[tuple[int, int, str]]:
    """Read spans one tag after the other."""
    found, start, kind = set(), 0, ""
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, this = tag.partition("-")
        if kind and (prefix in ("O", "B") or this != kind):
            found.add((start, i, kind))
            kind = ""
        if prefix != "O" and not kind:
            start, kind = i, this
    return found


def test_spans() -> None:
    rng = np.random.default_rng(0)
    lengths = [0, 1, 12, 12, 7, 3] * 8
    gold = np.full((len(lengths), 16), -100)
    found = rng.integers(0, 5, (len(lengths), 16))
    for row, length in enumerate(lengths):
        gold[row, :length] = rng.integers(0, 5, length)
        kept = rng.random(length) < 0.7  # so that some spans agree
        found[row, :length][kept] = gold[row, :length][kept]
    right, named = {"PER": 0, "LOC": 0}, {"PER": 0, "LOC": 0}
    for row, length in enumerate(lengths):
        true, said = (spans_of([TAGS[t] for t in tags[row, :length]]) for tags in (gold, found))
        for kind in right:
            right[kind] += sum(s[2] == kind for s in true & said)
            named[kind] += sum(s[2] == kind for s in (*true, *said))
    spans = Spans(TAGS)
    counted = spans.count(torch.tensor(found), torch.tensor(gold))
    assert spans.kinds == ("PER", "LOC")
    assert [c.tolist() for c in counted] == [[right["PER"], right["LOC"]], [named["PER"], named["LOC"]]]
    assert right["PER"] > 5


def test_other_tags_are_no_spans() -> None:
    for names in (["0", "1"], ["O", "B-"], ["O", "PER"]):
        with pytest.raises(ValueError, match="no BIO tag"):
            Spans(names)
