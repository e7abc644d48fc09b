"""From rows to tokens and a mark for each: which of them a language model learns, or which text they belong to.

text        one document a row: every token is learned, and the end of text after it
completion  `prompt`, `completion`: the completion and the end of text are learned
chats       conversations in one of the formats of `chats`: what the assistant says is learned (see `turns`)
pair        `text` and perhaps `text_pair`, for classification: of two, the mark says of which (0 or 1) a token is

Special tokens are added once: a beginning that the text or the chat template brings itself is not put before it again,
nor an end after it. Prompt and completion are tokenised apart, so that the prompt has the very tokens that it has when
the model is asked later. An answer that is empty is not learned.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, final

import numpy as np
import numpy.typing as npt

from scaletrain.data.chats import READERS, Conversation, text
from scaletrain.data.tokenizers import end_of_text, ensure_chat_template, leading, pieces
from scaletrain.data.turns import Learn, Template, day_of
from scaletrain.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from scaletrain.data.sources import Rows

log = logging.getLogger("scaletrain")

FormatName = Literal["text", "completion", "chat", "conversations", "alpaca", "chat_completion"]
ROLES: dict[FormatName, tuple[str, ...]] = {
    "text": ("text",),
    "completion": ("prompt", "completion"),
    "chat": ("messages",),
    "conversations": ("conversations",),
    "alpaca": ("instruction", "output"),
    "chat_completion": ("prompt", "completion"),
}
"""The columns that a format needs."""
OPTIONAL: dict[FormatName, tuple[str, ...]] = {
    "chat": ("tools",),
    "conversations": ("system", "tools"),
    "alpaca": ("input", "system", "history"),
    "chat_completion": ("tools",),
}
"""The columns that it reads where they are there."""
LEARN: dict[FormatName, tuple[Learn, ...]] = {
    "text": ("all",),
    "completion": ("completion", "all"),
    "chat": ("assistant", "last", "all"),
    "conversations": ("assistant", "last", "all"),
    "alpaca": ("assistant", "last", "all"),
    "chat_completion": ("completion", "assistant", "last", "all"),
}
"""What can be learned of a format, the default first."""


class Encoded(NamedTuple):
    """Tokens of some rows, and a mark of 0 or 1 for each token; `marks` None stands for all 1."""

    ids: Sequence[Sequence[int]]
    marks: Sequence[Sequence[int] | npt.NDArray[np.uint8]] | None


@dataclass(frozen=True)
class Format(ABC):
    """How the values of a row become tokens. Everything that changes the result is a field."""

    tokenizer: PreTrainedTokenizerFast

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """The columns that are read."""

    @abstractmethod
    def encode(self, values: Sequence[Sequence[Any]], names: Sequence[str]) -> Encoded:
        """Tokenise rows, whole. values: for each column, the rows' values; names: where each row stands, for messages.

        Raises UserError that names the row.
        """

    def official(self, values: Sequence[Sequence[Any]], names: Sequence[str]) -> list[list[int]] | None:
        """Return the tokens that another, accepted way makes of rows; None where there is none."""
        return None

    def unanswered(self, values: Sequence[Sequence[Any]], names: Sequence[str]) -> str:
        """Say why nothing is learned of a row."""
        return "it is empty"

    @property
    def options(self) -> tuple[object, ...]:
        """What distinguishes this format beside the tokenizer, for the name of its cache."""
        return (type(self).__name__, self.columns)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Tokenise without special tokens of the tokenizer's own."""
        done = self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in done]


def detect(rows: Rows, wanted: FormatName | None) -> FormatName:
    """Return the format that the columns of the rows tell. Raises UserError when they tell none, or two."""
    if wanted:
        for role in ROLES[wanted]:
            rows.require(role, f"needed by objective.format={wanted}")
        return wanted
    found = [name for name, roles in ROLES.items() if set(roles) <= set(rows.columns)]
    if "completion" in found:  # texts, or lists of messages
        prompt = rows.take(["prompt"], np.array([0]))["prompt"][0]
        found.remove("completion" if isinstance(prompt, (list, tuple)) else "chat_completion")
    if len(found) == 1:
        return found[0]
    listed = ", ".join(f"`{c}`" for c in rows.columns)
    if found:
        raise UserError(f"the columns {listed} fit {' and '.join(found)}: say which is meant by objective.format.")
    needed = dict.fromkeys(" and ".join(f"`{role}`" for role in roles) for roles in ROLES.values())
    raise UserError(
        f"the columns {listed} fit no format: {', or '.join(needed)} are needed. "
        "Name yours by `columns: {text: COLUMN}` of the source."
    )


def texts(rows: Rows, name: FormatName) -> Iterator[str]:
    """Return the text of every row, to train a tokenizer on. Raises UserError that names the row."""
    if name in READERS:
        read = columns(rows, name)
        for i, values in enumerate(zip(*(rows.column(c) for c in read), strict=True)):
            chat = READERS[name](dict(zip(read, values, strict=True)), rows.name(i))
            yield from (message["content"] for message in chat.messages)
        return
    for role in ROLES[name]:
        for i, value in enumerate(rows.column(rows.require(role, "the text"))):
            yield text(value, role, rows.name(i))


def language_format(
    name: FormatName,
    tokenizer: PreTrainedTokenizerFast,
    learn: Learn | None = None,
    template_options: Mapping[str, Any] | None = None,
    rows: Rows | None = None,
) -> Format:
    """Return the format of a causal language model's data.

    learn: the format's own by default. rows: those to read, which may have more columns than are needed. Raises
    UserError when the format has no such part to learn, or the chat template's options are none.
    """
    learn = learn or LEARN[name][0]
    if learn not in LEARN[name]:
        raise UserError(
            f"objective.learn={learn}: data of the format {name} have no such part; {' or '.join(LEARN[name])} can be "
            "learned of them."
        )
    if name == "text":
        return Documents(tokenizer)
    if name == "completion":
        return Completions(tokenizer, learn)
    ensure_chat_template(tokenizer)
    day_of(template_options or {})
    return Chats(tokenizer, learn, name, columns(rows, name) if rows else ROLES[name], template_options or {})


def columns(rows: Rows, name: FormatName) -> tuple[str, ...]:
    """Return the columns of a format that the rows have."""
    return (*ROLES[name], *(c for c in OPTIONAL.get(name, ()) if c in rows.columns))


@final
class Documents(Format):
    """Plain text, one document a row. An empty one has no tokens."""

    @property
    def columns(self) -> tuple[str, ...]:
        """`text`."""
        return ROLES["text"]

    def encode(self, values: Sequence[Sequence[Any]], names: Sequence[str]) -> Encoded:
        """Tokenise, with the end of text after each document."""
        texts = [list(pieces(text(t, "text", n))) for t, n in zip(values[0], names, strict=True)]
        parts = iter(self._ids(list(chain.from_iterable(texts))))
        before, end = leading(self.tokenizer), end_of_text(self.tokenizer)
        ids = [list(chain.from_iterable(next(parts) for _ in split)) for split in texts]
        return Encoded([_framed(i, before, end) if i else [] for i in ids], None)


@final
@dataclass(frozen=True)
class Completions(Format):
    """A prompt and its completion, of which `learn` is learned: the completion, or all."""

    learn: Learn = "completion"

    @property
    def columns(self) -> tuple[str, ...]:
        """`prompt` and `completion`."""
        return ROLES["completion"]

    @property
    def options(self) -> tuple[object, ...]:
        """With what is learned."""
        return (*super().options, self.learn)

    def encode(self, values: Sequence[Sequence[Any]], names: Sequence[str]) -> Encoded:
        """Tokenise; what is learned, and the end of text, are marked."""
        prompts, completions = (
            self._ids([text(t, column, n) for t, n in zip(texts, names, strict=True)])
            for column, texts in zip(self.columns, values, strict=True)
        )
        before, end = leading(self.tokenizer), end_of_text(self.tokenizer)
        ids, marks = [], []
        for prompt, completion in zip(prompts, completions, strict=True):
            whole = _framed(prompt + completion, before, end)
            ids.append(whole)
            told = len(prompt) + (len(before) if prompt[: len(before)] != before else 0)
            mark = np.zeros(len(whole), np.uint8)
            mark[0 if self.learn == "all" else told :] = completion not in ([], [end])
            marks.append(mark)
        return Encoded(ids, marks)

    def unanswered(self, values: Sequence[Sequence[Any]], names: Sequence[str]) -> str:
        """Say that the completion is missing."""
        return "the completion is empty"

    def prompt(self, text: str) -> list[int]:
        """Return the tokens of a prompt alone."""
        return _begun(self._ids([text])[0], leading(self.tokenizer))


@final
@dataclass(frozen=True)
class Chats(Format):
    """A conversation, written out by the tokenizer's chat template. source: the format of the rows."""

    learn: Learn = "assistant"
    source: FormatName = "chat"
    columns: tuple[str, ...] = ROLES["chat"]
    template_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> tuple[object, ...]:
        """With all that is given to the template beside the tokenizer's own."""
        return (
            *super().options,
            self.source,
            self.learn,
            json.dumps(self.template_options, sort_keys=True, ensure_ascii=False),
        )

    @cached_property
    def template(self) -> Template:
        """The tokenizer's chat template."""
        return Template(self.tokenizer, self.template_options)

    def chats(self, values: Sequence[Sequence[Any]], names: Sequence[str]) -> list[Conversation]:
        """Read rows. Raises UserError that names the row."""
        read = READERS[self.source]
        rows = zip(*values, strict=True)
        return [read(dict(zip(self.columns, row, strict=True)), n) for row, n in zip(rows, names, strict=True)]

    def encode(self, values: Sequence[Sequence[Any]], names: Sequence[str]) -> Encoded:
        """Tokenise; what is learned is marked."""
        chats = self.chats(values, names)
        told = [self.template.told(c, self.learn, n) for c, n in zip(chats, names, strict=True)]
        done = self.tokenizer.backend_tokenizer.encode_batch([t for t, _ in told], add_special_tokens=False)
        marks = []
        for encoding, (_, spans) in zip(done, told, strict=True):
            mark = np.zeros(len(encoding.ids), np.uint8)
            if spans:
                starts = np.array(encoding.offsets, np.int64).reshape(-1, 2)[:, 0]
                for first, last in np.searchsorted(starts, spans).tolist():
                    mark[first:last] = 1
            marks.append(mark)
        return Encoded([encoding.ids for encoding in done], marks)

    def official(self, values: Sequence[Sequence[Any]], names: Sequence[str]) -> list[list[int]]:
        """Return what the tokenizer itself makes of the rows' messages."""
        return [self.template.ids(chat) for chat in self.chats(values, names)]

    def unanswered(self, values: Sequence[Sequence[Any]], names: Sequence[str]) -> str:
        """Say whether there is no turn to learn, or nothing in it."""
        messages = self.chats(values, names)[0].messages
        silent = all(message["role"] != "assistant" for message in messages)
        return "there is no turn of the assistant" if silent else "what the assistant says is empty"

    def prompt(self, told: str | list[dict[str, Any]]) -> list[int]:
        """Return the tokens of a user's message, or of a conversation, up to where the assistant answers."""
        messages = [{"role": "user", "content": told}] if isinstance(told, str) else told
        return self._ids([self.template.write(messages, prompt=True)])[0]


@final
@dataclass(frozen=True)
class Pairs(Format):
    """One text, or two, for an encoder, with its special tokens, cut to `max_length` tokens (the longer text first)."""

    max_length: int
    paired: bool

    @property
    def columns(self) -> tuple[str, ...]:
        """`text`, and `text_pair` where there are two."""
        return ("text", "text_pair") if self.paired else ("text",)

    @property
    def options(self) -> tuple[object, ...]:
        """With the length."""
        return (*super().options, self.max_length)

    def encode(self, values: Sequence[Sequence[Any]], names: Sequence[str]) -> Encoded:
        """Tokenise; of two texts, the mark is the token's type."""
        texts = [
            [text(t, column, n) for t, n in zip(column_values, names, strict=True)]
            for column, column_values in zip(self.columns, values, strict=True)
        ]
        done = self.tokenizer(*texts, truncation=True, max_length=self.max_length, return_token_type_ids=self.paired)
        self.tokenizer.backend_tokenizer.no_truncation()  # it stays on otherwise, and would be saved
        return Encoded(done["input_ids"], done["token_type_ids"] if self.paired else None)


def _begun(ids: list[int], before: list[int]) -> list[int]:
    return ids if ids[: len(before)] == before else before + ids


def _framed(ids: list[int], before: list[int], end: int) -> list[int]:
    ids = _begun(ids, before)
    return ids if ids and ids[-1] == end else [*ids, end]
