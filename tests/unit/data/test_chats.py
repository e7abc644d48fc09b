"""Every form of conversation becomes the same messages; what is no conversation is refused by its row."""

import json
from pathlib import Path
from typing import Any

import pytest

from scaletrain.config import SourceSpec
from scaletrain.data.chats import READERS, Conversation, from_messages
from scaletrain.data.formats import LEARN, ROLES, columns, detect, language_format, texts
from scaletrain.data.sources import Rows, open_rows
from scaletrain.errors import UserError
from tests.unit.data.test_turns import CALL, CALLED, TOOLS, TWO, said, tokenizer_like, user


def rows_of(folder: Path, *rows: dict[str, Any], name: str = "rows.jsonl") -> Rows:
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    return open_rows([SourceSpec(path=str(folder / name))])


SYSTEM = {"role": "system", "content": "Be brief."}
ROWS: dict[str, dict[str, Any]] = {
    "text": {"text": "a"},
    "completion": {"prompt": "a", "completion": "b"},
    "chat": {"messages": [SYSTEM, *TWO], "tools": json.dumps(TOOLS)},
    "conversations": {
        "conversations": [
            {"from": "human" if m["role"] == "user" else "gpt", "value": m["content"]} for m in TWO
        ],
        "system": "Be brief.",
        "tools": TOOLS,
    },
    "alpaca": {
        "instruction": "Two?",
        "input": "",
        "output": TWO[3]["content"],
        "system": "Be brief.",
        "history": [["One?", "First."]],
    },
    "chat_completion": {"prompt": [SYSTEM, *TWO[:3]], "completion": TWO[3:]},
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_the_columns_tell_the_format(name: Any, tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {**ROWS[name], "task": "x"})
    assert detect(rows, None) == name
    assert set(columns(rows, name)) == set(ROWS[name])
    if name in READERS:
        chat = READERS[name](rows.row(0), "row")
        assert chat.messages == [SYSTEM, *TWO]
        assert chat.tools == (TOOLS if "tools" in ROWS[name] else None)
        assert chat.given == (4 if name == "chat_completion" else 0)
        assert list(texts(rows, name)) == [m["content"] for m in chat.messages]


def test_columns_of_two_formats_or_of_none(tmp_path: Path) -> None:
    both = rows_of(tmp_path, {"text": "a", "messages": TWO})
    assert detect(both, "chat") == "chat"
    with pytest.raises(UserError, match=r"fit text and chat: say which is meant by objective.format"):
        detect(both, None)
    with pytest.raises(UserError, match=r"`sentence` fit no format: `text`, or `prompt` and `completion`, or"):
        detect(rows_of(tmp_path, {"sentence": "a"}, name="none.jsonl"), None)


def test_what_alpaca_says_of_the_input() -> None:
    row = {"instruction": "Sum.", "input": "1 2", "output": "3"}
    assert READERS["alpaca"](row, "row").messages == [user("Sum.\n1 2"), said("3")]


def test_calls_of_both_forms() -> None:
    called = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "zwei – 2"}}}
    of_openai = from_messages({"messages": CALLED}, "row").messages
    assert of_openai[1] == said("", tool_calls=[{"id": CALL["id"], **called}])
    turns = [
        {"from": "human", "value": "Sum?"},
        {
            "from": "function_call",
            "value": json.dumps({**called["function"], "arguments": '{"a": 1, "b": "zwei – 2"}'}),
        },
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "It is 3."},
    ]
    of_sharegpt = READERS["conversations"]({"conversations": turns}, "row").messages
    assert of_sharegpt == [user("Sum?"), said("", tool_calls=[called]), {"role": "tool", "content": "3"}, CALLED[3]]


def test_content_in_parts() -> None:
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "?"}]
    assert from_messages({"messages": [{"role": "user", "content": parts, "name": None}]}, "row") == Conversation(
        [user("One?")]
    )


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("chat", {"messages": "hello"}, "`messages` must be a list of {role, content}, not str"),
        ("chat", {"messages": []}, "`messages` must be a list of {role, content}, not an empty list"),
        ("chat", {"messages": [{"role": "user"}]}, "message 1 must have a `role` and a `content`"),
        ("chat", {"messages": [user("a"), {"role": "asistant", "content": "b"}]}, "message 2 has an unknown role, "
         "`asistant`. Did you mean `assistant`"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "only texts can be learned"),
        ("chat", {"messages": [said("", tool_calls=[{"id": "1"}])]}, "a tool call must have a function with a `name`"),
        ("chat", {"messages": [user("\ud800")]}, "half of a surrogate pair"),
        ("chat", {"messages": TWO, "tools": "[{"}, "`tools` is not JSON"),
        ("chat", {"messages": TWO, "tools": [1]}, "`tools` must be a list of JSON schemas"),
        ("conversations", {"conversations": [{"from": "humane", "value": "a"}]}, "turn 1 is from `humane`. Did you "
         "mean `human`"),
        ("conversations", {"conversations": [{"value": "a"}]}, "turn 1 of `conversations` must have a `from`"),
        ("conversations", {"conversations": [{"from": "function_call", "value": "add"}]}, "a function_call, is not"),
        ("alpaca", {"instruction": "a", "output": None}, "`output` must be a text, not nothing"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["c"]]}, "`history` must be a list of pairs"),
    ],
)  # fmt: skip
def test_what_is_no_conversation(name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        READERS[name](row, "rows.jsonl line 3")
    assert str(error.value).startswith("rows.jsonl line 3: ")
    assert message in str(error.value)


def test_what_a_format_does_not_have_is_not_learned() -> None:
    tokenizer = tokenizer_like("qwen25")
    for name in ROLES:
        assert language_format(name, tokenizer).options[-1] is not None
        for learn in {"completion", "assistant", "last", "all"} - set(LEARN[name]):
            with pytest.raises(UserError, match=f"objective.learn={learn}: data of the format {name}"):
                language_format(name, tokenizer, learn)
