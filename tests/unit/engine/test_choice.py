"""What accelerate was told and the recipe says otherwise."""

import pytest

from scaletrain.engine.choice import check_launch
from scaletrain.errors import UserError


def test_the_precision_of_the_recipe_and_none_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for told in ("no", "bf16"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
        check_launch(["bf16"])


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp16", "mixed_precision: fp16.*train.precision=bf16"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "train.compile=true"),
    ],
)
def test_what_would_be_ignored_is_refused(
    variable: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=words):
        check_launch(["bf16"])
