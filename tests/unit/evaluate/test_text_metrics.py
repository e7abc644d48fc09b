"""Exact match, token F1 and ROUGE against figures worked out elsewhere."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from scaletrain.evaluate.text_metrics import _longest_common_subsequence, exact_match, rouge, token_f1


@pytest.mark.parametrize(
    ("found", "wanted", "one", "two", "longest"),
    [  # by rouge-score 0.1.2, without its stemmer
        ("the cat was found under the bed", "the cat was under the bed", 0.923077, 0.727273, 0.923077),
        ("police kill the gunman", "police killed the gunman", 0.75, 0.333333, 0.75),
        ("the gunman kill police", "police killed the gunman", 0.75, 0.333333, 0.5),
        ("A quick, brown fox! It jumps.", "the quick brown dog jumps over it", 0.615385, 0.181818, 0.461538),
        ("", "the cat", 0, 0, 0),
        ("cat", "cat", 1, 0, 1),
    ],
)
def test_rouge(found: str, wanted: str, one: float, two: float, longest: float) -> None:
    expected = {"rouge1": one, "rouge2": two, "rougeL": longest}
    assert rouge(found, wanted) == pytest.approx(expected, abs=1e-6)


def test_rouge_reads_other_scripts() -> None:
    assert rouge("Привет, мир", "мир и привет")["rouge1"] == pytest.approx(0.8)


def _by_table(a: Sequence[str], b: Sequence[str]) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_the_longest_common_subsequence_is_that_of_the_whole_table() -> None:
    draw = random.Random(0)
    for _ in range(300):
        a, b = (draw.choices("abcde", k=draw.randint(0, 80)) for _ in range(2))
        assert _longest_common_subsequence(a, b) == _by_table(a, b)


def test_exact_match_heeds_all_but_blanks() -> None:
    assert exact_match(" New  York\n", "New York") == {"exact_match": 1.0}
    assert exact_match("new york", "New York") == {"exact_match": 0.0}
    assert exact_match("B", "A") == {"exact_match": 0.0}


@pytest.mark.parametrize(
    ("found", "wanted", "f1"),
    [
        ("The Denver Broncos!", "Denver Broncos", 1.0),
        ("in the city of Paris", "Paris", 0.4),  # 1 of 4 words, 1 of 1
        ("to be or not to be", "to be", 0.5),  # 2 of 6, 2 of 2: a word counts as often as in both
        ("Rome", "Paris", 0.0),
        ("the", "a", 1.0),  # nothing is left of either
        ("the", "Paris", 0.0),
    ],
)
def test_f1_of_squad(found: str, wanted: str, f1: float) -> None:
    assert token_f1(found, wanted) == {"f1": pytest.approx(f1)}
