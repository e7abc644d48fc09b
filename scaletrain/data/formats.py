"""From rows to tokens and a mark for each: which of them a language model learns, or which text they belong to.

text        one document a row: every token is learned, and the end of text after it
completion  `prompt`, `completion`: the completion and the end of text are learned
chat        `messages`, a list of {role, content}: what the assistant says is learned, up to the end of its turn
pair        `text` and perhaps `text_pair`, for classification: of two, the mark says of which (0 or 1) a token is

Special tokens are added once: a beginning that the text or the chat template brings itself is not put before it again,
nor an end after it. Prompt and completion are tokenised apart, so that the prompt has the very tokens that it has when
the model is asked later.
"""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, final

from scaletrain.data.tokenizers import end_of_text, ensure_chat_template, leading, pieces
from scaletrain.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from scaletrain.data.sources import Rows

log = logging.getLogger("scaletrain")

FormatName = Literal["text", "completion", "chat"]
ROLES: dict[FormatName, tuple[str, ...]] = {
    "text": ("text",),
    "completion": ("prompt", "completion"),
    "chat": ("messages",),
}


class Encoded(NamedTuple):
    """Tokens of some rows, and a mark of 0 or 1 for each token; `marks` None stands for all 1."""

    ids: list[list[int]]
    marks: list[list[int]] | None


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

    @property
    def options(self) -> tuple[object, ...]:
        """What distinguishes this format beside the tokenizer, for the name of its cache."""
        return (type(self).__name__, self.columns)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Tokenise without special tokens of the tokenizer's own."""
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]
        return ids


def detect(rows: Rows, wanted: FormatName | None) -> FormatName:
    """Return the format that the columns of the rows tell, and say it. Raises UserError when they tell none, or two."""
    if wanted:
        for role in ROLES[wanted]:
            rows.require(role, f"needed by objective.format={wanted}")
        return wanted
    found = [name for name, roles in ROLES.items() if set(roles) <= set(rows.columns)]
    if len(found) == 1:
        log.info("data format: %s (%s)", found[0], ", ".join(ROLES[found[0]]))
        return found[0]
    listed = ", ".join(f"`{c}`" for c in rows.columns)
    if found:
        raise UserError(f"the columns {listed} fit {' and '.join(found)}: say which is meant by objective.format.")
    raise UserError(
        f"the columns {listed} fit no format: `text`, or `prompt` and `completion`, or `messages` are needed. "
        "Name yours by `columns: {text: COLUMN}` of the source."
    )


def texts(rows: Rows, name: FormatName) -> Iterator[str]:
    """Return the text of every row, to train a tokenizer on. Raises UserError that names the row."""
    for role in ROLES[name]:
        for i, value in enumerate(rows.column(rows.require(role, "the text"))):
            if name == "chat":
                yield from (message["content"] for message in _messages(value, rows.name(i)))
            else:
                yield _text(value, role, rows.name(i))


def language_format(name: FormatName, tokenizer: PreTrainedTokenizerFast) -> Format:
    """Return the format of a causal language model's data."""
    if name == "text":
        return Documents(tokenizer)
    if name == "completion":
        return Completions(tokenizer)
    ensure_chat_template(tokenizer)
    return Chats(tokenizer)


@final
class Documents(Format):
    """Plain text, one document a row. An empty one has no tokens."""

    @property
    def columns(self) -> tuple[str, ...]:
        """`text`."""
        return ROLES["text"]

    def encode(self, values: Sequence[Sequence[Any]], names: Sequence[str]) -> Encoded:
        """Tokenise, with the end of text after each document."""
        texts = [list(pieces(_text(t, "text", n))) for t, n in zip(values[0], names, strict=True)]
        parts = iter(self._ids(list(chain.from_iterable(texts))))
        before, end = leading(self.tokenizer), end_of_text(self.tokenizer)
        ids = [list(chain.from_iterable(next(parts) for _ in split)) for split in texts]
        return Encoded([_framed(i, before, end) if i else [] for i in ids], None)


@final
class Completions(Format):
    """A prompt and its completion."""

    @property
    def columns(self) -> tuple[str, ...]:
        """`prompt` and `completion`."""
        return ROLES["completion"]

    def encode(self, values: Sequence[Sequence[Any]], names: Sequence[str]) -> Encoded:
        """Tokenise; the completion and the end of text are marked."""
        prompts, completions = (
            self._ids([_text(t, column, n) for t, n in zip(texts, names, strict=True)])
            for column, texts in zip(self.columns, values, strict=True)
        )
        before, end = leading(self.tokenizer), end_of_text(self.tokenizer)
        ids, marks = [], []
        for prompt, completion in zip(prompts, completions, strict=True):
            whole = _framed(prompt + completion, before, end)
            told = len(prompt) + (len(before) if prompt[: len(before)] != before else 0)
            ids.append(whole)
            marks.append([0] * told + [1] * (len(whole) - told))
        return Encoded(ids, marks)

    def prompt(self, text: str) -> list[int]:
        """Return the tokens of a prompt alone."""
        return _begun(self._ids([text])[0], leading(self.tokenizer))


@final
class Chats(Format):
    """A conversation, written out by the tokenizer's chat template."""

    @property
    def columns(self) -> tuple[str, ...]:
        """`messages`."""
        return ROLES["chat"]

    def encode(self, values: Sequence[Sequence[Any]], names: Sequence[str]) -> Encoded:
        """Tokenise; what the assistant says is marked, by the template's own marks where it has them."""
        chats = [_messages(m, n) for m, n in zip(values[0], names, strict=True)]
        template: str = self.tokenizer.get_chat_template()
        if re.search(r"\{%-?\s*generation\s*-?%\}", template):
            done: Any = self.tokenizer.apply_chat_template(chats, return_dict=True, return_assistant_tokens_mask=True)
            return Encoded(done["input_ids"], done["assistant_masks"])
        texts = [self._told(c, n) for c, n in zip(chats, names, strict=True)]
        done = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        marks = []
        for chat, text, offsets, name in zip(chats, texts, done["offset_mapping"], names, strict=True):
            spans = self._assistant_spans(chat, text, name)
            marks.append([int(any(a <= start < b for a, b in spans)) for start, _ in offsets])
        return Encoded(done["input_ids"], marks)

    def _told(self, messages: list[dict[str, Any]], name: str) -> str:
        try:
            return self._written(messages)
        except Exception as error:  # templates raise what they like
            raise UserError(f"{name}: the chat template refuses these messages: {error}") from error

    def _written(self, messages: list[dict[str, Any]], prompt: bool = False) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))

    def _assistant_spans(self, chat: list[dict[str, Any]], text: str, name: str) -> list[tuple[int, int]]:
        """Return where the assistant speaks: between the text that asks for its turn and the text that ends with it."""
        spans = []
        for i, message in enumerate(chat):
            if message["role"] != "assistant":
                continue
            asked, answered = self._written(chat[:i], prompt=True), self._written(chat[: i + 1])
            if not (text.startswith(answered) and answered.startswith(asked)):
                raise UserError(
                    f"{name}: the chat template writes the turns before message {i + 1} otherwise when more follow, so "
                    "that what the assistant says cannot be told apart. Put {% generation %} marks into the template."
                )
            spans.append((len(asked), len(answered)))
        return spans

    def prompt(self, told: str | list[dict[str, Any]]) -> list[int]:
        """Return the tokens of a user's message, or of a conversation, up to where the assistant answers."""
        messages = [{"role": "user", "content": told}] if isinstance(told, str) else told
        return self._ids([self._written(messages, prompt=True)])[0]


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
            [_text(t, column, n) for t, n in zip(column_values, names, strict=True)]
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


def _text(value: Any, column: str, name: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{name}: `{column}` must be a text, not {_kind(value)}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name}: `{column}` has half of a surrogate pair at character {error.start}.") from None
    return value


def _messages(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, (list, tuple)) or not value:
        raise UserError(f"{name}: `messages` must be a list of {{role, content}}, not {_kind(value)}.")
    for i, message in enumerate(value, 1):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise UserError(f"{name}: message {i} must have a `role` and a `content` that are texts.")
    return list(value)


def _kind(value: Any) -> str:
    return "nothing" if value is None else "an empty list" if value == [] else type(value).__name__
