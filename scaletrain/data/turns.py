"""Chat templates: how a conversation is written out, and where in the text the assistant's turns stand.

What is learned of a turn is what the model itself has to write: all between the generation prompt and the end of the
turn, that end's token included and the blank text after it not. Where a template marks that by `{% generation %}`, the
marks tell. Where it does not, the turn is found in the whole text, since what a template writes of a beginning of the
conversation is not always the beginning of what it writes of the whole (the thoughts of earlier turns are left out, the
last message is treated in its own way): the conversation is written once more with the turn's words exchanged for a
mark that no text has, and what stays the same before and after them tells where they stand.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Literal, final

from scaletrain.data.chats import Conversation, Message, answers
from scaletrain.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("scaletrain")

Learn = Literal["completion", "assistant", "last", "all"]
"""Which turns of a conversation are learned. completion: those of the assistant after what is given."""
Span = tuple[int, int]
"""Where something begins and ends in a text."""

MARK = "\ue0f5\uf8a1\ue3c7"
"""Of the private use area."""
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")


TODAY = "strftime_now"
"""What templates call for the date, and the key of `template_options` that says which day it is."""
DAY = "2024-07-26"
"""That day, if none is given: the one that Llama's templates fall back to."""
_DAY: ContextVar[datetime | None] = ContextVar("_DAY", default=None)


class _Unclear(Exception):
    """The turn cannot be told from the rest of the text."""


def day_of(options: Mapping[str, Any]) -> datetime:
    """Return the day that templates take for today. Raises UserError when it is none."""
    try:
        return datetime.fromisoformat(str(options.get(TODAY, DAY)))
    except ValueError as error:
        raise UserError(f"objective.template_options.{TODAY}: {error}: give a date, as {DAY}.") from error


def _strftime_now(format: str) -> str:
    """Write the date: that of our rendering, and today's where others render."""
    day = _DAY.get()
    if day is None:
        return datetime.now().strftime(format)
    _say(day)
    return day.strftime(format)


@cache
def _say(day: datetime) -> None:
    log.info("the chat template writes the date: it is always %s (objective.template_options.%s)", day.date(), TODAY)


@cache
def _marks(template: str) -> bool:
    """Say whether a template marks what the assistant says."""
    return bool(re.search(r"\{%-?\s*generation\s*-?%\}", template))


@final
@dataclass(frozen=True)
class Template:
    """The chat template of a tokenizer.

    options: values that it is given beside the conversation; `strftime_now` is the day that it takes for today.
    """

    tokenizer: PreTrainedTokenizerFast
    options: Mapping[str, Any] = field(default_factory=dict)

    def write(self, messages: Sequence[Message], tools: Any = None, prompt: bool = False) -> str:
        """Write messages out; prompt: and what asks for the assistant's turn. Raises what the template raises."""
        with self._dated(tools):
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt, **self._values
                )
            )

    def ids(self, chat: Conversation) -> list[int]:
        """Return the tokens that the tokenizer itself makes of a conversation that can be told."""

        def of(chat: Conversation) -> list[int]:
            with self._dated(chat.tools):
                done: Any = self.tokenizer.apply_chat_template(
                    chat.messages, tools=list(chat.tools or ()) or None, tokenize=True, return_dict=True, **self._values
                )
            return list(done["input_ids"])

        try:
            return of(chat)
        except Exception:  # as in `told`
            return of(_with_json_arguments(chat))

    def told(self, chat: Conversation, learn: Learn, name: str) -> tuple[str, list[Span]]:
        """Return the text of a conversation, and what is learned of it, from left to right.

        learn: of a turn that says nothing, nothing. name: where the row stands. Raises UserError that names it, with
        the template's own reason where it refuses.
        """
        marked = learn != "all" and _marks(self._source(chat.tools))
        try:
            text, spans = self._written(chat, marked)
        except Exception as error:  # templates raise what they like
            chat = _with_json_arguments(chat)
            try:
                text, spans = self._written(chat, marked)
            except Exception:
                raise UserError(f"{name}: the chat template refuses these messages: {error}") from error
        if learn == "all":
            return text, [(0, len(text))]
        turns = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
        wanted = turns[-1:] if learn == "last" else [i for i in turns if learn == "assistant" or i >= chat.given]
        if marked:
            if len(spans) != len(turns) and len(wanted) != len(turns):
                raise UserError(
                    f"{name}: the chat template marks {len(spans)} parts as generated, of {len(turns)} turns of the "
                    f"assistant, so that objective.learn={learn} cannot tell them apart."
                )
            chosen = spans if len(wanted) == len(turns) else [spans[turns.index(i)] for i in wanted]
            # A part that says nothing but how it ends is an empty answer.
            return text, [s for s in chosen if self._ends.sub("", text[slice(*s)]).strip()]
        found = []
        for i in wanted:
            if answers(chat.messages[i]):
                try:
                    found.append(self._turn(chat, text, i))
                except _Unclear:
                    raise UserError(
                        f"{name}: what the assistant says in message {i + 1} cannot be told apart in what the chat "
                        "template writes. Put {% generation %} marks into the template (objective.chat_template)."
                    ) from None
        return text, found

    def _source(self, tools: Any) -> str:
        """Return the text of the template: a tokenizer may have one of its own for conversations with tools."""
        found: str = self.tokenizer.get_chat_template(tools=tools)
        return found

    @cached_property
    def _values(self) -> dict[str, Any]:
        """What the template is given by name."""
        return {name: value for name, value in self.options.items() if name != TODAY}

    @contextmanager
    def _dated(self, tools: Any) -> Iterator[None]:
        """Let the template take the same day for today, whenever it is asked: tokens are a function of the row."""
        from transformers.utils.chat_template_utils import _compile_jinja_template

        # What is passed by name can be no function, so it stands among what this template finds by itself.
        _compile_jinja_template(self._source(tools)).globals[TODAY] = _strftime_now
        token = _DAY.set(day_of(self.options))
        try:
            yield
        finally:
            _DAY.reset(token)

    @cached_property
    def _ends(self) -> re.Pattern[str]:
        """What matches a special token."""
        special = {t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        special.update(map(str, self.tokenizer.all_special_tokens))
        return re.compile("|".join(map(re.escape, sorted(special, key=lambda t: (-len(t), t)))) or "(?!)")

    @cached_property
    def end(self) -> str | None:
        """The special token that ends a turn of plain text, as the template writes it."""
        try:
            text = self._rewrite([{"role": "user", "content": MARK}, {"role": "assistant", "content": MARK}])
        except _Unclear:
            return None
        found = self._ends.search(text, text.rfind(MARK) + len(MARK))
        return found.group() if found else None

    def _written(self, chat: Conversation, marked: bool) -> tuple[str, list[Span]]:
        """Return the text, and the parts that the template marks as generated, up to the end of the turn."""
        if not marked:
            return self.write(chat.messages, chat.tools), []
        from transformers.utils.chat_template_utils import render_jinja_template

        with self._dated(chat.tools):
            written: Any = render_jinja_template(
                conversations=[chat.messages],
                tools=list(chat.tools or ()) or None,
                chat_template=self._source(chat.tools),
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **self._values},
            )
        (text,), (marks,) = written
        return text, [self._to_the_end(text, a, b) for a, b in marks]

    def _to_the_end(self, text: str, a: int, b: int) -> Span:
        """Take the end of the turn in where it follows directly, and leave out what is blank after it."""
        inside = [m.end() for m in self._ends.finditer(text, a, b)]
        if inside and not text[inside[-1] : b].strip():
            return a, inside[-1]
        follows = self._ends.match(text, b)
        return a, follows.end() if follows else b

    def _turn(self, chat: Conversation, text: str, i: int) -> Span:
        """Return where turn i of the assistant stands. Raises _Unclear."""
        first, last = self._words(chat, text, i)
        return self._begin(chat, text, i, first), self._end(chat, text, i, last)

    def _rewrite(self, messages: Sequence[Message], tools: Any = None, prompt: bool = False) -> str:
        """Write what is not the conversation itself. Raises _Unclear when the template refuses it."""
        try:
            return self.write(messages, tools, prompt)
        except Exception as error:
            raise _Unclear from error

    def _words(self, chat: Conversation, text: str, i: int) -> Span:
        """Return where the words of message i stand: they begin there or further left. Raises _Unclear."""
        exchanged, marks = _exchanged(chat.messages[i])
        other = self._rewrite([*chat.messages[:i], exchanged, *chat.messages[i + 1 :]], chat.tools)
        before, after = other[: other.find(MARK)], _after_mark(other)
        if not 0 < other.count(MARK) <= marks or MARK in text or not text.endswith(after):
            raise _Unclear
        last = len(text) - len(after)
        return min(_common(text, before), last), last

    def _begin(self, chat: Conversation, text: str, i: int, first: int) -> int:
        """Return where turn i begins: after what asks for it. first: where its words begin at the latest."""
        asked = self._asked(chat, i)
        if asked and text.startswith(asked):
            return min(len(asked), first)
        before = (
            [*chat.messages[: i - 1], _exchanged(chat.messages[i - 1])[0]] if i else [{"role": "user", "content": MARK}]
        )
        closing, tail = (_after_mark(self._rewrite(before, chat.tools, prompt)) for prompt in (False, True))
        closed = self._whole(tail, _common(closing, tail))
        if i == 0:  # nothing is before it but what the template writes at the start
            place = text.rfind(tail[closed:], 0, first)
            if closed == len(tail) or place < 0:
                raise _Unclear
            return place + len(tail) - closed
        start = self._words(chat, text, i - 1)[1]
        same = self._whole(tail, _common(text[start:], tail))
        if same < closed:
            raise _Unclear
        return min(start + same, first)

    def _whole(self, tail: str, same: int) -> int:
        """Return how far two texts are the same without breaking off in a line or a special token."""
        if same == len(tail):
            return same
        return max((m.end() for m in re.finditer(f"{self._ends.pattern}|\n", tail[:same])), default=0)

    def _asked(self, chat: Conversation, i: int) -> str:
        """Return what the template writes before turn i when that is to be answered; nothing where it refuses."""
        try:
            return self._rewrite(chat.messages[:i], chat.tools, prompt=True) if i else ""
        except _Unclear:
            return ""

    def _end(self, chat: Conversation, text: str, i: int, last: int) -> int:
        """Return where turn i ends: after the special token that ends it. last: where its words end."""
        blank = last + len(text[last:]) - len(text[last:].lstrip())
        if "tool_calls" not in chat.messages[i] and (end := self._ends.match(text, blank)):
            return end.end()
        closed = self._rewrite([*chat.messages[:i], _exchanged(chat.messages[i])[0]], chat.tools)
        limit = last + _common(text[last:], _after_mark(closed))
        if self.end and (place := text.find(self.end, last, limit)) >= 0:
            return place + len(self.end)
        end = self._ends.search(text, last, limit) or self._ends.match(text, limit)
        return end.end() if end else limit


def _exchanged(message: Message) -> tuple[Message, int]:
    """Return a message of the same kind whose words are marks, and how many they are."""
    found = dict(message)
    thoughts = [key for key in _THOUGHTS if message.get(key)]
    calls = message.get("tool_calls", [])
    content = bool(message["content"] or not calls)
    found |= dict.fromkeys(thoughts, MARK) | ({"content": MARK} if content else {})
    if calls:
        found["tool_calls"] = [{**c, "function": {**c["function"], "name": MARK}} for c in calls]
    return found, len(thoughts) + len(calls) + content


def _after_mark(text: str) -> str:
    """Return what follows the last mark."""
    return text[text.rfind(MARK) + len(MARK) :]


def _with_json_arguments(chat: Conversation) -> Conversation:
    """Return the conversation with the arguments of calls as JSON text, which a few templates expect."""

    def rewritten(message: Message) -> Message:
        if "tool_calls" not in message:
            return message
        calls = [
            {
                **c,
                "function": {**c["function"], "arguments": json.dumps(c["function"]["arguments"], ensure_ascii=False)},
            }
            for c in message["tool_calls"]
        ]
        return {**message, "tool_calls": calls}

    return chat._replace(messages=[rewritten(m) for m in chat.messages])


def _common(a: str, b: str) -> int:
    """Return how many characters two texts have in common at their beginning."""
    if a.startswith(b):
        return len(b)
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low
