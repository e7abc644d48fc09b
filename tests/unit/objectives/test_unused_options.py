"""Options that would do nothing are refused by their keys."""

from __future__ import annotations

from typing import Any

import pytest

from scaletrain.config import Recipe
from scaletrain.errors import UserError
from scaletrain.explain import decode
from scaletrain.recipe import objective_of


def decoded(objective: dict[str, Any], teacher: bool = True) -> Any:
    networks: dict[str, Any] = {"student": {}, **({"teacher": {"type": "mixture"}} if teacher else {})}
    return objective_of(decode(Recipe, {"objective": objective, "networks": networks, "data": {"train": "noise:64"}}))


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("weighting", {"type": "scm", "weighting": "snr"}),
        ("weighting", {"type": "adversarial", "weighting": "snr_plus_one"}),
        ("weighting", {"type": "reflow", "one_step": True, "weighting": "snr"}),
        ("times", {"type": "reflow", "one_step": True, "times": "logit_normal"}),
        ("contest", {"type": "dmd2", "contest": "non_saturating"}),
        ("r1", {"type": "dmd2", "r1": 0.1}),
        ("solver", {"type": "consistency", "solver": "dpmpp_2m"}),
        ("solver", {"type": "progressive", "steps": 1, "teacher_steps": 2, "solver": "heun"}),
    ],
)
def test_a_key_that_changes_nothing(key: str, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"objective\.{key}"):
        decoded(options)


@pytest.mark.parametrize(
    "options",
    [
        {"type": "consistency", "learns_from": "data"},
        {"type": "scm", "learns_from": "data"},
        {"type": "meanflow", "learn": "data"},
        {"type": "shortcut", "learn": "data"},
    ],
)
def test_a_solver_of_nobody(options: dict[str, Any]) -> None:
    decoded(options, teacher=False)
    decoded({**options, "solver": "heun"})  # of the teacher in the table
    with pytest.raises(UserError, match=r"objective\.solver is for a teacher"):
        decoded({**options, "solver": "heun"}, teacher=False)


@pytest.mark.parametrize(
    "options",
    [
        {"type": "reflow", "weighting": "snr", "times": "logit_normal"},
        {"type": "dmd2", "adversarial": 0.1, "contest": "non_saturating", "r1": 0.1, "weighting": "snr"},
        {"type": "adversarial", "solver": "heun"},
        {"type": "consistency", "solver": "heun", "weighting": "snr"},
    ],
)
def test_the_same_keys_where_they_do_something(options: dict[str, Any]) -> None:
    config = decoded(options).config
    kept = {key: value for key, value in options.items() if key not in ("type", "times")}
    assert {key: getattr(config, key) for key in kept} == kept
    assert "times" not in options or config.times.type == options["times"]
