"""Names of sources, and rows as questions with answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scaletrain.data.answers import Answers
from scaletrain.data.dataset import TensorDataset
from scaletrain.data.joined import Joined, parts_of, short_names
from scaletrain.data.text import Tokens


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/dev.jsonl", "x/test.csv"], ["dev", "test"]),
        (["a/dev.jsonl", "b/dev.jsonl", "test.csv"], ["a/dev", "b/dev", "test"]),
        (["s3://bucket/a/dev.jsonl", "s3://other/a/dev.jsonl"], ["bucket/a/dev", "other/a/dev"]),
        (["dev.jsonl", "dev.jsonl"], ["dev-1", "dev-2"]),
        (["dev.jsonl", "a/dev.jsonl"], ["dev", "a/dev"]),
        (["sklearn:digits", "*.csv"], ["sklearn:digits", "*"]),
        (["folder/"], ["folder"]),
    ],
)
def test_short_names(paths: list[str], names: list[str]) -> None:
    assert short_names(paths) == names


def test_parts() -> None:
    sets = [TensorDataset({"x": torch.arange(n)}) for n in (3, 2)]
    whole = Joined(sets, ["a", "b"])
    assert whole.batch(range(5), np.zeros(5, np.uint64))["x"].tolist() == [0, 1, 2, 0, 1]
    assert dict(parts_of(whole)) == {"a": sets[0], "b": sets[1]}
    assert dict(parts_of(sets[0])) == {"": sets[0]}


def tokens(*rows: tuple[list[int], list[int]]) -> Tokens:
    ids, marks = ([v for row in rows for v in row[k]] for k in (0, 1))
    offsets = np.cumsum([0, *(len(row[0]) for row in rows)])
    return Tokens(np.array(ids, np.uint16), np.array(marks, np.uint8), offsets)


def test_an_answer_is_the_last_learned_run_and_the_prompt_all_before_it() -> None:
    found = Answers(
        tokens(
            ([1, 2, 3, 4, 5, 6, 7], [0, 1, 1, 0, 0, 1, 0]),  # two turns of an assistant, and a line end
            ([8, 9], [0, 0]),  # nothing is learned
            ([10, 11, 12], [0, 1, 1]),
            ([13, 14], [1, 1]),  # nothing to ask with
        ),
        4,
        fill=99,
    )
    batch = found.batch(range(len(found)), np.zeros(len(found), np.uint64))
    assert batch["prompt"].tolist() == [[10] + [99] * 7, [1, 2, 3, 4, 5, 99, 99, 99]]
    assert batch["prompt_lengths"].tolist() == [1, 5]
    assert batch["answer"][:, :3].tolist() == [[11, 12, 99], [6, 99, 99]]
    assert batch["answer_lengths"].tolist() == [2, 1]


def test_answers_are_chosen_evenly() -> None:
    found = Answers(tokens(*(([i, 50], [0, 1]) for i in range(21))), 3, fill=0)
    assert sorted(int(found.example(i, np.random.default_rng())["prompt"][0]) for i in range(3)) == [0, 10, 20]
