"""Turns and commands of a conversation."""

from __future__ import annotations

import pytest

from scaletrain.chat import Message, converse
from scaletrain.errors import UserError


def talk(*lines: str, **options: object) -> tuple[list[Message], list[int], str]:
    """Return what was said in the end, how long the conversation was at each question, and what was written."""
    asked, written = [], []

    def answer(messages: list[Message]) -> str:
        asked.append(len(messages))
        if "fail" in messages[-1]["content"]:
            raise UserError("it cannot")
        written.append(f"to {messages[-1]['content']}")
        return f"to {messages[-1]['content']}"

    said = converse(lines, answer, written.append, **options)  # type: ignore[arg-type]
    return said, asked, "".join(written)


def contents(messages: list[Message]) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in messages]


def test_a_line_is_a_turn_and_all_turns_are_remembered() -> None:
    said, asked, written = talk("one", "", "two", system="be short")
    roles = ["system", "user", "assistant", "user", "assistant"]
    assert contents(said) == list(zip(roles, ["be short", "one", "to one", "two", "to two"], strict=True))
    assert asked == [2, 4]
    assert written == "to one\nto two\n"


def test_commands() -> None:
    said, asked, _ = talk("one", "two", "/undo", "three", system="s")
    assert asked == [2, 4, 4]
    assert [m["content"] for m in said] == ["s", "one", "to one", "three", "to three"]
    assert contents(talk("one", "/reset", system="s")[0]) == [("system", "s")]
    assert contents(talk("one", "/system new one", "/undo")[0]) == [("system", "new one")]
    assert talk("one", "/system", system="s")[0] == []
    assert "/undo takes back" in talk("/what")[2]


def test_a_turn_that_fails_is_taken_back_or_ends_it() -> None:
    said, asked, written = talk("one", "fail", "two", forgiving=True)
    assert asked == [1, 3, 3]
    assert [m["content"] for m in said] == ["one", "to one", "two", "to two"]
    assert "(it cannot)" in written
    with pytest.raises(UserError, match="it cannot"):
        talk("fail")
