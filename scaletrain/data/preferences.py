"""Rows that say which answer is preferred, or how one was judged, as token sequences: each a prompt and an answer.

Shapes: N rows, B examples of a batch, R lines of its tensors, T positions, S sequences, K learned tokens. What is
learned of a sequence is its answer: the whole completion, or the assistant's last turn.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt
import torch

from scaletrain.data.chats import kind_of
from scaletrain.data.dataset import Dataset, Example
from scaletrain.data.formats import Encoded, Format
from scaletrain.data.order import key_of
from scaletrain.data.packing import Packs, best_fit_decreasing, positions
from scaletrain.data.sources import Rows
from scaletrain.data.text import Ints, Tokens, pad
from scaletrain.errors import UserError

log = logging.getLogger("scaletrain")

MISMATCHED = "mismatched_"
"""What the names of a batch begin with that are of prompts with the answers of others."""


# --- from rows to tokens ----------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Answered(Format):
    """A prompt with the answer of one column, written as a completion or as a chat.

    written: the format of a prompt with a completion, or of a chat. Texts are for the one; for the other, prompt and
    answer are lists of messages, either of which may be a text that stands for one message. whole: the other column,
    where there is no prompt: both columns hold whole chats, and what they begin with alike is the prompt.
    """

    written: Format
    answer: str
    chat: bool
    whole: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The prompt or the other answer, and the answer."""
        return (self.whole or "prompt", self.answer)

    @property
    def options(self) -> tuple[object, ...]:
        """With those of the format that it is written in, and how."""
        own = inspect.getsource(sys.modules[__name__])
        return (*super().options, self.chat, self.whole, self.written.options, own)

    def encode(self, values: Sequence[Sequence[Any]], names: Sequence[str]) -> Encoded:
        """Tokenise, as the format does that it is written in. Raises UserError that names the row."""
        return self.written.encode(self._rewritten(values, names), names)

    def official(self, values: Sequence[Sequence[Any]], names: Sequence[str]) -> list[list[int]] | None:
        """Return what the format that it is written in has for another, accepted way."""
        return self.written.official(self._rewritten(values, names), names)

    def _rewritten(self, values: Sequence[Sequence[Any]], names: Sequence[str]) -> Sequence[Sequence[Any]]:
        """Return the columns that the format reads that it is written in."""
        rows = list(zip(*values, names, strict=True))
        for _, answer, name in rows:
            if not (self.chat or isinstance(answer, str)):
                raise UserError(f"{name}: `{self.answer}` must be a text, not {kind_of(answer)}.")
            if isinstance(answer, str) and not answer.strip():
                raise UserError(f"{name}: `{self.answer}` is empty.")
        if not self.chat:
            return values
        join = self._joined if self.whole is None else self._checked
        return [[join(*row) for row in rows]]

    def _joined(self, prompt: Any, answer: Any, name: str) -> list[Any]:
        """Return the chat of a prompt and an answer."""
        return [*_messages(prompt, "user", "prompt", name), *self._answers(answer, name)]

    def _checked(self, other: Any, answer: Any, name: str) -> list[Any]:
        """Return a whole chat that begins as the other does."""
        chat = self._answers(answer, name)
        others = _messages(other, None, str(self.whole), name)
        alike = next((i for i, (a, b) in enumerate(zip(chat, others, strict=False)) if a != b), None)
        if alike == 0:
            raise UserError(
                f"{name}: `{self.answer}` and `{self.whole}` begin with different messages. They must share the "
                "messages of the prompt; or give those in a column `prompt`."
            )
        return chat

    def _answers(self, value: Any, name: str) -> list[Any]:
        messages = _messages(value, "assistant" if self.whole is None else None, self.answer, name)
        last = messages[-1]
        if not isinstance(last, dict) or last.get("role") != "assistant":
            raise UserError(f"{name}: `{self.answer}` must end with a message of the assistant.")
        if isinstance(last.get("content"), str) and not last["content"].strip() and not last.get("tool_calls"):
            raise UserError(f"{name}: `{self.answer}` is empty.")
        return messages


def _messages(value: Any, role: str | None, column: str, name: str) -> list[Any]:
    """Return a list of messages; a text stands for one of this role, if any."""
    if isinstance(value, str) and role:
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise UserError(f"{name}: `{column}` must be a list of messages, not {kind_of(value)}.")
    return value


class Spans(NamedTuple):
    """N stretches of a flat array of tokens."""

    ids: npt.NDArray[Any]
    begins: Ints
    """(N,)"""
    ends: Ints
    """(N,)"""

    @property
    def lengths(self) -> Ints:
        """(N,) tokens of each."""
        return self.ends - self.begins

    def at(self, index: int) -> npt.NDArray[Any]:
        """Return the tokens of one."""
        return self.ids[self.begins[index] : self.ends[index]]

    def take(self, rows: Ints) -> Spans:
        """Return those of some rows."""
        return Spans(self.ids, self.begins[rows], self.ends[rows])


class Sequences(NamedTuple):
    """N sequences, each a prompt and an answer to it."""

    prompts: Spans
    answers: Spans

    @classmethod
    def of(cls, tokens: Tokens) -> Sequences:
        """Take token sequences apart: the last stretch of marked tokens is the answer, what comes before it the prompt.

        Of a sequence without a prompt, the first token of the answer is the prompt. An answer may have no tokens.
        """
        assert tokens.marks is not None
        starts, ends = np.empty((2, len(tokens.offsets) - 1), np.int64)
        for run in tokens.runs():
            offsets = tokens.offsets[run.start : run.stop + 1]
            first = offsets[0]
            own = _last_stretches(tokens.marks[first : offsets[-1]], offsets - first)
            starts[run], ends[run] = own[0] + first, own[1] + first
        return cls(Spans(tokens.ids, tokens.offsets[:-1], starts), Spans(tokens.ids, starts, ends))

    def take(self, rows: Ints) -> Sequences:
        """Return those of some rows."""
        return Sequences(self.prompts.take(rows), self.answers.take(rows))


def _last_stretches(marks: npt.NDArray[np.uint8], offsets: Ints) -> tuple[Ints, Ints]:
    """Return where the answers of N sequences begin and end: each (N,). offsets: (N + 1,) where sequences begin."""
    begins, stops = offsets[:-1], offsets[1:]
    # A boundary of sequences stands between two stretches, whatever the marks at its sides.
    changes = np.flatnonzero(np.diff(marks)) + 1
    bounds = np.unique(np.concatenate([offsets, changes]))
    marked = bounds[:-1][marks[bounds[:-1]] == 1] if len(bounds) > 1 else bounds[:0]
    last = np.searchsorted(marked, stops) - 1
    found = (last >= 0) & (marked[last] >= begins) if len(marked) else np.zeros(len(begins), bool)
    starts = np.where(found, marked[last] if len(marked) else 0, stops)
    ends = np.where(found, bounds[np.minimum(np.searchsorted(bounds, starts, "right"), len(bounds) - 1)], stops)
    return np.minimum(np.maximum(starts, begins + 1), ends), ends


# --- from tokens to batches -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """How sequences become batches.

    seq_len: positions that a sequence may take. fill: the token of places that hold none. packed: the sequences of
    several rows stand in one line, isolated. before: tokens that a prompt begins with and keeps when it is cut.
    """

    seq_len: int
    fill: int
    packed: bool
    before: tuple[int, ...] = ()


class Line(NamedTuple):
    """One sequence of an example."""

    ids: npt.NDArray[Any]
    answered: int
    """Tokens of the answer, at the end."""


class Origin(NamedTuple):
    """All N rows that were read."""

    sequences: tuple[Sequences, ...]
    """Of each row."""
    left: Mapping[str, npt.NDArray[np.bool_]]
    """(N,) which are left out, by the reason."""


@final
class Preferences(Dataset):
    """Rows of one or more sequences each, all or none of which are in a batch; packed, several rows are one example.

    groups: sequences of N rows by what their names in a batch begin with. numbers: (N,) which rows of the data they
    are. origin: those that the rows were chosen from. labels: (N,) how each was judged, if it was.

    Batches, for each group: input_ids (R, T) with padding at the right, position_ids (R, T) where packed; learned (K,)
    places in the flattened (R · T) after which an answer's token comes, targets (K,), those tokens, segments (K,), the
    sequence that each is of; answers (S,), tokens of the answer of each sequence; lengths (R,), real positions. The
    sequences of a row follow one another. labels (B',), of the rows in the batch.

    Prompts lose their beginning where a sequence is too long, by as many tokens in all sequences of a group's row.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[Sequences]],
        rows: Rows,
        numbers: Ints,
        shape: Shape,
        origin: Origin,
        labels: npt.NDArray[np.bool_] | None = None,
    ):
        self.origin = origin
        self._groups, self.rows, self.numbers, self.shape, self._labels = dict(groups), rows, numbers, shape, labels
        room = {name: _room(group, shape.seq_len) for name, group in self._groups.items()}
        self._kept = {n: [np.minimum(s.prompts.lengths, room[n]) for s in g] for n, g in self._groups.items()}
        places = {
            name: sum((k + s.answers.lengths - 1 for k, s in zip(self._kept[name], group, strict=True)), np.int64(0))
            for name, group in self._groups.items()
        }
        if shape.packed:
            # A pack has room for the longest row, so that the same rows are trained on whether packed or not.
            per_row = max(map(len, self._groups.values()))
            packs = best_fit_decreasing(np.max([*places.values()], axis=0), per_row * shape.seq_len)
        else:
            packs = Packs(np.arange(len(numbers)), np.arange(len(numbers) + 1))
        self._order, self._starts = packs.order, packs.starts
        self.tokens_per_example = float(sum(p.sum() for p in places.values()) / max(1, len(self)))

    def __len__(self) -> int:
        return len(self._starts) - 1

    @cached_property
    def cut(self) -> Ints:
        """Rows of the data whose prompt loses its beginning."""
        cut = [k < s.prompts.lengths for n, g in self._groups.items() for k, s in zip(self._kept[n], g, strict=True)]
        return self.numbers[np.any(cut, axis=0)]

    def sizes(self) -> Ints:
        """Return the places of each example's lines: (N, L)."""
        lines = np.stack([k + s.answers.lengths - 1 for k, s in zip(self._kept[""], self._groups[""], strict=True)], 1)
        if not self.shape.packed:
            return lines
        return np.add.reduceat(lines.sum(1)[self._order], self._starts[:-1])[:, None]

    def told(self, index: int) -> list[tuple[Ints, Ints]]:
        """Return the sequences of the kept row `index`: what is left of each prompt, and the answer."""
        return [
            (self._prompt(s.prompts.at(index), int(k[index])), s.answers.at(index))
            for s, k in zip(self._groups[""], self._kept[""], strict=True)
        ]

    def _members(self, index: int) -> list[int]:
        members: list[int] = self._order[self._starts[index] : self._starts[index + 1]].tolist()
        return members

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Return the sequences of pack, or row, `index`, by group; nothing in it is random."""
        members = self._members(index)
        found: Example = {
            name: [self._line(s, k, i) for i in members for s, k in zip(group, self._kept[name], strict=True)]
            for name, group in self._groups.items()
        }
        return found | ({} if self._labels is None else {"labels": self._labels[members]})

    def batch(self, indices: Sequence[int], seeds: npt.NDArray[np.uint64]) -> dict[str, torch.Tensor]:
        """Collate these examples, without making generators."""
        rng = np.random.Generator(np.random.Philox(key=0))
        return self.collate([self.example(i, rng) for i in indices])

    def prompts(self, count: int) -> list[list[int]]:
        """Return some prompts, evenly from the rows."""
        (first, *_), (kept, *_) = self._groups[""], self._kept[""]
        rows = range(0, len(self.numbers), max(1, len(self.numbers) // count))[:count]
        found: list[list[int]] = [self._prompt(first.prompts.at(i), int(kept[i])).tolist() for i in rows]
        return found

    def _prompt(self, prompt: npt.NDArray[Any], kept: int) -> npt.NDArray[Any]:
        """Return the end of a prompt; where it is cut, what prompts begin with stays before it."""
        before = self.shape.before
        if kept < len(prompt) and len(before) < kept and tuple(prompt[: len(before)].tolist()) == before:
            return np.concatenate([prompt[: len(before)], prompt[len(prompt) - kept + len(before) :]])
        return prompt[len(prompt) - kept :]

    def _line(self, sequences: Sequences, kept: Ints, index: int) -> Line:
        answer = sequences.answers.at(index)
        return Line(np.concatenate([self._prompt(sequences.prompts.at(index), int(kept[index])), answer]), len(answer))

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Pad to the longest line."""
        batch: dict[str, torch.Tensor] = {}
        for name in self._groups:
            batch |= {name + key: tensor for key, tensor in self._stacked([e[name] for e in examples]).items()}
        if self._labels is not None:
            batch["labels"] = torch.from_numpy(np.concatenate([e["labels"] for e in examples]))
        return batch

    def _stacked(self, examples: Sequence[Sequence[Line]]) -> dict[str, torch.Tensor]:
        lines = examples if self.shape.packed else [[line] for example in examples for line in example]
        sizes = [np.array([len(s.ids) - 1 for s in line]) for line in lines]
        inputs = pad([np.concatenate([s.ids[:-1] for s in line]) for line in lines], self.shape.fill)
        ends = np.concatenate([row * inputs.shape[1] + size.cumsum() for row, size in enumerate(sizes)])
        sequences = [s for line in lines for s in line]
        answered = np.array([s.answered for s in sequences])
        learned = np.repeat(ends - answered.cumsum(), answered) + np.arange(answered.sum())
        found = {
            "input_ids": inputs,
            "learned": torch.from_numpy(learned),
            "targets": torch.from_numpy(np.concatenate([s.ids[-s.answered :] for s in sequences]).astype(np.int64)),
            "segments": torch.from_numpy(np.repeat(np.arange(len(sequences)), answered)),
            "answers": torch.from_numpy(answered),
            "lengths": torch.tensor([int(size.sum()) for size in sizes]),
        }
        return found | ({"position_ids": pad([positions(s) for s in sizes], 0)} if self.shape.packed else {})

    def name(self, index: int) -> str:
        """Say which rows these are."""
        return ", ".join(self.rows.name(int(self.numbers[i])) for i in self._members(index))


def pairs(chosen: Sequences, rejected: Sequences, rows: Rows, shape: Shape, quiet: bool = False) -> Preferences:
    """Return pairs of answers to the same prompt: sequences 2i and 2i + 1 of a batch are chosen and rejected.

    Rows with an answer that does not fit, and those whose answers are the same, are left out, and that is said.
    quiet: nothing is said, and it may come to no pair. Raises UserError.
    """
    fitting = _fitting([chosen, rejected], shape.seq_len)
    same = np.zeros(len(rows), bool)
    for i in np.flatnonzero(fitting & (chosen.answers.lengths == rejected.answers.lengths)).tolist():
        same[i] = np.array_equal(chosen.answers.at(i), rejected.answers.at(i))
    kept = np.flatnonzero(fitting & ~same)
    origin = Origin((chosen, rejected), {_unfit(shape): ~fitting, "chosen and rejected are the same": same})
    found = Preferences({"": [chosen.take(kept), rejected.take(kept)]}, rows, kept, shape, origin)
    if not quiet:
        _say(found)
    return found


def ratings(
    answered: Sequences,
    labels: npt.NDArray[np.bool_],
    rows: Rows,
    shape: Shape,
    seed: int,
    training: bool = True,
    quiet: bool = False,
) -> Preferences:
    """Return answers that were judged, each beside its prompt with the answer of another row.

    seed: by which those are chosen, among the rows with another prompt. training: answers of both kinds are needed.
    quiet: as for `pairs`. Raises UserError.
    """
    fitting = _fitting([answered], shape.seq_len)
    kept = np.flatnonzero(fitting)
    own, judged = answered.take(kept), labels[kept]
    others = _others(own.prompts, seed, rows) if len(kept) > 1 else np.arange(len(kept))
    mismatched = Sequences(own.prompts, own.answers.take(others))
    origin = Origin((answered,), {_unfit(shape): ~fitting})
    found = Preferences({"": [own], MISMATCHED: [mismatched]}, rows, kept, shape, origin, judged)
    if not quiet:
        _say(found)
        good = int(judged.sum())
        if training and good in (0, len(kept)):
            raise UserError(f"every `label` is {bool(good)}: rows of both kinds are needed.")
        log.info("%s desirable and %s undesirable rows", f"{good:,}", f"{len(kept) - good:,}")
    return found


def _others(prompts: Spans, seed: int, rows: Rows) -> Ints:
    """Return for each prompt a row that has another one, in an order of chance. Raises UserError when all are alike."""
    number = len(prompts.lengths)
    kinds = np.fromiter((hash(prompts.at(i).tobytes()) for i in range(number)), np.int64, number)
    if (kinds == kinds[0]).all():
        raise UserError(f"all prompts are the same, as in {rows.name(0)}: there is no row with another prompt.")
    order = np.random.Generator(np.random.Philox(key=key_of(seed, "mismatched"))).permutation(number)
    kinds = kinds[order]
    ahead = np.arange(1, number + 1) % number
    while (clash := kinds[ahead] == kinds).any():
        ahead[clash] = (ahead[clash] + 1) % number
    others = np.empty(number, np.int64)
    others[order] = order[ahead]
    return others


def judgements(values: Sequence[Any], rows: Rows) -> npt.NDArray[np.bool_]:
    """Return a column of labels. Raises UserError that names the first row whose label is neither true nor false."""
    for i, value in enumerate(values):
        if not isinstance(value, (bool, np.bool_)):
            raise UserError(f"{rows.name(i)}: `label` must be true (desirable) or false, not {value!r}.")
    return np.fromiter(values, bool, len(values))


def _room(group: Sequence[Sequences], seq_len: int) -> Ints:
    """Return how many tokens of a prompt fit before the longest answer to it: (N,). The last token takes no place."""
    return seq_len + 1 - np.max([s.answers.lengths for s in group], axis=0, initial=0)


def _fitting(group: Sequence[Sequences], seq_len: int) -> npt.NDArray[np.bool_]:
    """Say which rows have answers, each of which fits behind at least a token of the prompt: (N,)."""
    return np.all([(s.answers.lengths > 0) & (s.answers.lengths <= seq_len) for s in group], axis=0)


def _unfit(shape: Shape) -> str:
    return f"their answer has no tokens, or more than data.seq_len={shape.seq_len}"


def _say(found: Preferences) -> None:
    """Say which rows are cut or left out. Raises UserError when none is left."""
    rows, total = found.rows, f"{len(found.rows):,}"
    for reason, left in found.origin.left.items():
        if left.any():
            first = rows.name(int(np.flatnonzero(left)[0]))
            if not len(found):
                raise UserError(f"no row of {total} is left to learn from: {reason}, as in {first}.")
            log.warning("%s of %s rows are left out: %s, as in %s", f"{int(left.sum()):,}", total, reason, first)
    if len(found.cut):
        log.warning(
            "%s of %s rows are longer than data.seq_len=%d: their prompts lose their beginning",
            f"{len(found.cut):,}", total, found.shape.seq_len,
        )  # fmt: skip
