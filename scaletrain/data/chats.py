"""Conversations, as the rows of each chat format tell them, in the one form that chat templates take.

chat             `messages`, a list of {role, content} as OpenAI has them: content a text or a list of text parts,
                 `tool_calls`, role `tool`, `name`; perhaps `tools`
conversations    `conversations`, a list of {from, value} as ShareGPT has them, from human, gpt, system, tool (or
                 observation) or function_call; perhaps `system` and `tools`
alpaca           `instruction` and `output`; perhaps `input`, `system` and `history`, a list of [asked, answered]
chat_completion  `prompt` and `completion` that are lists of messages; perhaps `tools`

`tools` is a list of JSON schemas, or its JSON text. Arguments of a call become objects, which templates expect.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from scaletrain.errors import UserError, did_you_mean

Message = dict[str, Any]
Row = Mapping[str, Any]
"""Values by column; a column that the source lacks is not there."""

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation")
SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    "tool": "tool", "observation": "tool", "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
"""ShareGPT's names of the roles."""


class Conversation(NamedTuple):
    """Messages as templates take them: a role, a content that is a text, and what else the row has."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    given: int = 0
    """So many messages at the start are the prompt."""


def answers(message: Message) -> bool:
    """Say whether a message is the assistant's and says something: a text, a thought or a call."""
    said = (message["content"], message.get("reasoning_content"), message.get("thinking"))
    return message["role"] == "assistant" and bool(message.get("tool_calls") or any(s and s.strip() for s in said))


def from_messages(row: Row, name: str) -> Conversation:
    """Read OpenAI's `messages`. Raises UserError that names the row, as the other readers do."""
    return Conversation(_messages(row["messages"], "messages", name), _tools(row, name))


def from_completion(row: Row, name: str) -> Conversation:
    """Read a prompt and a completion that are lists of messages."""
    prompt, completion = (_messages(row[column], column, name) for column in ("prompt", "completion"))
    return Conversation(prompt + completion, _tools(row, name), len(prompt))


def from_alpaca(row: Row, name: str) -> Conversation:
    """Read Alpaca's columns: the input stands below the instruction, on a line of its own."""
    messages = _system(row, name)
    history = row.get("history") or ()
    if not isinstance(history, (list, tuple)) or not all(isinstance(h, (list, tuple)) and len(h) == 2 for h in history):
        raise UserError(f"{name}: `history` must be a list of pairs, of what was asked and what was answered.")
    for asked, answered in history:
        messages.append({"role": "user", "content": text(asked, "history", name)})
        messages.append({"role": "assistant", "content": text(answered, "history", name)})
    asked = [text(row["instruction"], "instruction", name), text(row.get("input") or "", "input", name)]
    messages.append({"role": "user", "content": "\n".join(filter(None, asked))})
    messages.append({"role": "assistant", "content": text(row["output"], "output", name)})
    return Conversation(messages)


def from_conversations(row: Row, name: str) -> Conversation:
    """Read ShareGPT's `conversations`."""
    turns = row["conversations"]
    if not isinstance(turns, (list, tuple)) or not turns:
        raise UserError(f"{name}: `conversations` must be a list of {{from, value}}, not {kind_of(turns)}.")
    messages = _system(row, name)
    for i, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("from", "value")):
            raise UserError(f"{name}: turn {i} of `conversations` must have a `from` and a `value` that are texts.")
        speaker, value = turn["from"], text(turn["value"], f"turn {i}", name)
        if speaker not in SPEAKERS:
            raise UserError(f"{name}: turn {i} is from `{speaker}`.{did_you_mean(speaker, SPEAKERS)}")
        message: Message = {"role": SPEAKERS[speaker], "content": value}
        if speaker == "function_call":
            calls = _json(value, f"turn {i}, a function_call,", name)
            message |= {"content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
            message["tool_calls"] = _calls(message, i, name)
        messages.append(message)
    return Conversation(messages, _tools(row, name))


READERS: dict[str, Callable[[Row, str], Conversation]] = {
    "chat": from_messages,
    "conversations": from_conversations,
    "alpaca": from_alpaca,
    "chat_completion": from_completion,
}
"""By the name of the format."""


def text(value: Any, column: str, name: str) -> str:
    """Return a value that must be a text. Raises UserError that names the row."""
    if not isinstance(value, str):
        raise UserError(f"{name}: `{column}` must be a text, not {kind_of(value)}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name}: `{column}` has half of a surrogate pair at character {error.start}.") from None
    return value


def kind_of(value: Any) -> str:
    """Say what a value is, for messages."""
    return "nothing" if value is None else "an empty list" if value == [] else type(value).__name__


def _messages(value: Any, column: str, name: str) -> list[Message]:
    if not isinstance(value, (list, tuple)) or not value:
        raise UserError(f"{name}: `{column}` must be a list of {{role, content}}, not {kind_of(value)}.")
    return [_message(message, i, name) for i, message in enumerate(value, 1)]


def _message(message: Any, i: int, name: str) -> Message:
    """Check a message, and join the parts of its content."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(f"{name}: message {i} must have a `role` and a `content` that are texts.")
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        raise UserError(f"{name}: message {i} has an unknown role, `{role}`.{did_you_mean(role, ROLES)}")
    found = {key: value for key, value in message.items() if value is not None}
    if found.get("tool_calls"):
        found["tool_calls"] = _calls(found, i, name)
    else:
        found.pop("tool_calls", None)
    if isinstance(content, list):
        if not all(isinstance(p, str) or (isinstance(p, dict) and isinstance(p.get("text"), str)) for p in content):
            raise UserError(f"{name}: message {i}: only texts can be learned, and its `content` has other parts.")
        content = "".join(p if isinstance(p, str) else p["text"] for p in content)
    elif content is None and "tool_calls" in found:
        content = ""
    if not isinstance(content, str):
        raise UserError(f"{name}: message {i} must have a `role` and a `content` that are texts.")
    return {**found, "content": text(content, f"content of message {i}", name)}


def _calls(message: Message, i: int, name: str) -> list[dict[str, Any]]:
    """Return tool calls as {type, function: {name, arguments}}, with arguments that are objects where they can be."""
    found = []
    for call in message["tool_calls"] if isinstance(message["tool_calls"], (list, tuple)) else [None]:
        call = call if isinstance(call, dict) else {}
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{name}: message {i}: a tool call must have a function with a `name`.")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = _json(arguments, f"message {i}: the arguments of `{function['name']}`", name)
        rest = {k: v for k, v in call.items() if k not in ("function", "name", "arguments") and v is not None}
        found.append({"type": "function", **rest, "function": {"name": function["name"], "arguments": arguments}})
    return found


def _tools(row: Row, name: str) -> list[dict[str, Any]] | None:
    tools = row.get("tools") or None
    if isinstance(tools, str):
        tools = _json(tools, "`tools`", name) or None
    if tools is not None and not (isinstance(tools, (list, tuple)) and all(isinstance(t, dict) for t in tools)):
        raise UserError(f"{name}: `tools` must be a list of JSON schemas, or the JSON text of one.")
    return list(tools) if tools else None


def _system(row: Row, name: str) -> list[Message]:
    system = text(row.get("system") or "", "system", name)
    return [{"role": "system", "content": system}] if system else []


def _json(value: str, what: str, name: str) -> Any:
    try:
        return json.loads(value)
    except ValueError as error:
        raise UserError(f"{name}: {what} is not JSON: {error}") from error
