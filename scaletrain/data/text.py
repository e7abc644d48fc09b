"""Tokenised text: made once and kept by content, and the examples of a language model or a classifier over it.

Shapes: N sequences (one for each row), B examples of a batch, T positions. In an example of a language model,
`labels[t]` is the token to predict after `input_ids[t]`, or IGNORE: the shift is made here, so that a sequence of
n tokens takes n - 1 positions.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np
import numpy.typing as npt
import torch

from scaletrain.data import chats, formats, tokenizers, turns
from scaletrain.data.cache import cached, content_key, mapped
from scaletrain.data.dataset import Dataset, Example
from scaletrain.data.packing import best_fit_decreasing, positions
from scaletrain.errors import UserError

if TYPE_CHECKING:
    from scaletrain.data.sources import Rows

log = logging.getLogger("scaletrain")

IGNORE = -100
"""The label of a place where nothing is learned."""
MULTIPLE = 8
"""Batches are padded to a multiple of so many positions: tensor cores want it."""
ROWS_AT_ONCE = 1000
TOKENS_AT_ONCE = 1 << 17
"""Of what is computed for all tokens: few enough that its arrays stay in a processor's cache."""

Ints = npt.NDArray[np.int64]


class Tokens(NamedTuple):
    """N token sequences in one flat array, mapped from the cache."""

    ids: npt.NDArray[Any]
    """(total,) uint16 or int32."""
    marks: npt.NDArray[np.uint8] | None
    """(total,) what the format says of each token; None: all 1."""
    offsets: Ints
    """(N + 1,) where each sequence begins."""

    @property
    def lengths(self) -> Ints:
        """(N,) tokens of each sequence."""
        return np.diff(self.offsets)

    def runs(self) -> Iterator[slice]:
        """Yield all sequences as slices of their numbers, each of about TOKENS_AT_ONCE tokens or of one sequence."""
        steps = np.arange(0, int(self.offsets[-1]), TOKENS_AT_ONCE)
        cuts = np.unique([0, *np.searchsorted(self.offsets, steps).tolist(), len(self.offsets) - 1])
        yield from map(slice, cuts[:-1].tolist(), cuts[1:].tolist())


def tokenise(rows: Rows, *fmts: formats.Format) -> Tokens:
    """Tokenise every row, once for the same content, tokenizer, formats and code; processes share the result.

    fmts: one, or one for each of `rows.alike()`. Raises UserError that names the row.
    """
    code = [inspect.getsource(module) for module in (chats, formats, tokenizers, turns)]
    made_by = tokenizers.identity(fmts[0].tokenizer), [fmt.options for fmt in fmts], code
    key = content_key("ids, marks, offsets", rows.fingerprint, *made_by)
    folder = cached("tokens", key, partial(_write, rows, fmts))
    meta = json.loads((folder / "tokens.json").read_text())
    marks = mapped(folder / "marks.bin", np.uint8) if meta["marks"] else None
    return Tokens(mapped(folder / "ids.bin", meta["dtype"]), marks, mapped(folder / "offsets.bin", np.int64))


def encode(rows: Rows, *fmts: formats.Format) -> Tokens:
    """Tokenise a few rows, in memory. Raises UserError that names the row."""
    done = list(_encoded(rows, fmts))
    marked = any(d.marks is not None for d in done)
    ids = np.fromiter(chain.from_iterable(chain.from_iterable(d.ids for d in done)), np.int64)
    marks = np.concatenate([_marks(d) for d in done]) if marked else None
    lengths = [len(i) for d in done for i in d.ids]
    return Tokens(ids, marks, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def _encoded(rows: Rows, fmts: Sequence[formats.Format]) -> Iterator[formats.Encoded]:
    """Tokenise some rows at a time, one format for each run of rows that are alike."""
    runs = rows.alike() if len(fmts) > 1 else [rows]
    for run, fmt in zip(runs, fmts, strict=True):
        columns = [run.require(name, "the text") for name in fmt.columns]
        for start in range(0, len(run), ROWS_AT_ONCE):
            some = np.arange(start, min(start + ROWS_AT_ONCE, len(run)))
            values = run.take(columns, some)
            yield fmt.encode([values[c] for c in columns], [run.name(i) for i in some.tolist()])


def _marks(done: formats.Encoded) -> npt.NDArray[np.uint8]:
    """Return the marks of some rows as one array."""
    if done.marks is None:
        return np.ones(sum(map(len, done.ids)), np.uint8)
    return np.concatenate([np.asarray(m, np.uint8) for m in done.marks])


def _write(rows: Rows, fmts: Sequence[formats.Format], folder: Path) -> None:
    dtype = "<u2" if len(fmts[0].tokenizer) <= 1 << 16 else "<i4"
    total, marked = 0, False
    with (
        (folder / "ids.bin").open("wb") as ids,
        (folder / "marks.bin").open("wb") as marks,
        (folder / "offsets.bin").open("wb") as offsets,
    ):
        offsets.write(np.zeros(1, np.int64).tobytes())
        for done in _encoded(rows, fmts):
            ends = total + np.cumsum(np.fromiter(map(len, done.ids), np.int64))
            offsets.write(ends.tobytes())
            count, total = int(ends[-1]) - total, int(ends[-1])
            ids.write(np.fromiter(chain.from_iterable(done.ids), dtype, count).tobytes())
            if done.marks is not None or len(fmts) > 1:
                marked = True
                marks.write(_marks(done).tobytes())
    (folder / "tokens.json").write_text(json.dumps({"dtype": dtype, "marks": marked}))


def pad(arrays: Sequence[npt.NDArray[Any]], fill: int) -> torch.Tensor:
    """Stack arrays (t,) to (B, T) int64, T the longest, rounded up to a multiple of MULTIPLE; `fill` at the right."""
    width = math.ceil(max(map(len, arrays)) / MULTIPLE) * MULTIPLE
    out = np.full((len(arrays), width), fill, np.int64)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = array
    return torch.from_numpy(out)


class LanguageDataset(Dataset):
    """Examples of a language model: {input_ids (t,), labels (t,)} and, where samples are isolated, position_ids (t,).

    Batches: input_ids, labels and position_ids (B, T); lengths (B,), the real positions of each; learned (K,), the
    places in (B · T) that have a label, so that no device is asked for them. Padding is at the right, where a causal
    model needs no mask; position_ids restart in every sample of a pack, and are 0 in padding.
    """

    def __init__(self, tokens: Tokens, rows: Rows, seq_len: int, fill: int, packed: bool):
        self.tokens, self.rows, self.seq_len, self.fill, self.packed = tokens, rows, seq_len, fill, packed

    @abstractmethod
    def sizes(self) -> Ints:
        """Return how many positions each example takes: (len(self),)."""

    @abstractmethod
    def layout(self) -> tuple[Ints, ...]:
        """Return what says, with the tokens and `seq_len`, which places each example is made of."""

    @abstractmethod
    def at(self, index: int) -> Example:
        """Return example `index`; nothing in it is random."""

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Return example `index`."""
        return self.at(index)

    def batch(self, indices: Sequence[int], seeds: npt.NDArray[np.uint64]) -> dict[str, torch.Tensor]:
        """Collate these examples, without making generators."""
        return self.collate([self.at(i) for i in indices])

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Pad to the longest."""
        fills = {"input_ids": self.fill, "labels": IGNORE, "position_ids": 0}
        batch = {k: pad([e[k] for e in examples], fill) for k, fill in fills.items() if k in examples[0]}
        batch["lengths"] = torch.tensor([len(e["labels"]) for e in examples])
        return batch | {"learned": (batch["labels"].flatten() != IGNORE).nonzero().squeeze(1)}

    def _labels(self, start: int, stop: int) -> Ints:
        """Return what follows each of the places from start to stop of the flat array, or IGNORE: (stop - start,)."""
        labels = self.tokens.ids[start + 1 : stop + 1].astype(np.int64)
        if self.tokens.marks is not None:
            labels[self.tokens.marks[start + 1 : stop + 1] == 0] = IGNORE
        return labels


@final
class Blocks(LanguageDataset):
    """Documents one after the other, cut into blocks of `seq_len` positions; every token but the first is learned once.

    isolated: a document does not see the one before it, nor is its first token learned from that. empty: there may be
    nothing to learn, which is a UserError otherwise.
    """

    def __init__(self, tokens: Tokens, rows: Rows, seq_len: int, fill: int, isolated: bool, empty: bool = False):
        super().__init__(tokens, rows, seq_len, fill, isolated)
        self._places = max(0, len(tokens.ids) - 1)
        if not self._places and not empty:
            raise UserError(f"there is nothing to learn: the text has {len(tokens.ids)} tokens in all.")
        self._blocks = math.ceil(self._places / seq_len)
        self.tokens_per_example = self._places / max(1, self._blocks)

    def __len__(self) -> int:
        return self._blocks

    def sizes(self) -> Ints:
        """Return `seq_len` but for the last."""
        return np.diff(np.minimum(np.arange(self._blocks + 1) * self.seq_len, self._places))

    def layout(self) -> tuple[Ints, ...]:
        """Return nothing: blocks follow one another."""
        return ()

    def at(self, index: int) -> Example:
        """Return block `index`."""
        start = index * self.seq_len
        stop = min(start + self.seq_len, self._places)
        labels = self._labels(start, stop)
        example: Example = {"input_ids": self.tokens.ids[start:stop], "labels": labels}
        if self.packed:
            first, last = np.searchsorted(self.tokens.offsets, [start + 1, stop + 1])
            begins = np.unique(self.tokens.offsets[first:last]) - start  # of documents, in 1 … stop - start
            labels[begins - 1] = IGNORE
            bounds = np.unique(np.concatenate([[0], begins, [stop - start]]))
            example["position_ids"] = positions(np.diff(bounds))
        return example

    def name(self, index: int) -> str:
        """Say which tokens these are."""
        return f"tokens {index * self.seq_len:,} to {min((index + 1) * self.seq_len, self._places):,}"


@final
class Samples(LanguageDataset):
    """One row an example, or, packed, several whole ones, isolated; cut to `seq_len` positions.

    Rows of which nothing is left to learn are left out, and that is said; that no row is left is a UserError. With
    `empty`, neither.
    """

    def __init__(self, tokens: Tokens, rows: Rows, seq_len: int, fill: int, packed: bool, empty: bool = False):
        super().__init__(tokens, rows, seq_len, fill, packed)
        kept = np.flatnonzero(learned(tokens, seq_len))
        if not empty:
            _say_losses(rows, tokens.lengths, kept, seq_len)
        self._places = places(tokens.lengths, seq_len)
        self._order, self._starts = kept, np.arange(len(kept) + 1)
        if packed:
            packs = best_fit_decreasing(self._places[kept], seq_len)
            self._order, self._starts = kept[packs.order], packs.starts
        self.tokens_per_example = float(self._places[kept].sum() / max(1, len(self)))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def lengths(self, indices: Ints) -> Ints | None:
        """Return the positions of rows; packs are all about as long."""
        return None if self.packed else self._places[self._order[indices]]

    def sizes(self) -> Ints:
        """Return the positions of each pack, or row."""
        return np.add.reduceat(self._places[self._order], self._starts[:-1])

    def layout(self) -> tuple[Ints, ...]:
        """Return the rows of all examples, and where each example begins among them."""
        return self._order, self._starts

    def _members(self, index: int) -> Ints:
        """Return the rows of example `index`."""
        return self._order[self._starts[index] : self._starts[index + 1]]

    def at(self, index: int) -> Example:
        """Return pack, or row, `index`."""
        members = self._members(index)
        begins, places = self.tokens.offsets[members], self._places[members]
        spans = [(b, b + n) for b, n in zip(begins.tolist(), places.tolist(), strict=True)]
        example: Example = {
            "input_ids": np.concatenate([self.tokens.ids[a:b] for a, b in spans]),
            "labels": np.concatenate([self._labels(a, b) for a, b in spans]),
        }
        if self.packed:
            example["position_ids"] = positions(places)
        return example

    def name(self, index: int) -> str:
        """Say which rows these are."""
        return ", ".join(self.rows.name(i) for i in self._members(index).tolist())


def places(lengths: Ints, limit: int | None = None) -> Ints:
    """Return how many places sequences take, `limit` at most: one less than their tokens, but never less than 0."""
    return np.clip(lengths - 1, 0, limit)


def learned(tokens: Tokens, limit: int | None = None) -> Ints:
    """Return how many labels each sequence has in its first `limit` places: (N,)."""
    if tokens.marks is None:
        return places(tokens.lengths, limit)
    found = np.zeros(len(tokens.offsets) - 1, np.int64)
    for run in tokens.runs():  # reduceat makes a copy of all that it sums, in the type of the sums
        sizes = places(np.diff(tokens.offsets[run.start : run.stop + 1]), limit)
        some = np.flatnonzero(sizes)
        if len(some):
            begins = tokens.offsets[run.start + some] + 1
            # It sums from each bound to the next, the last one to the end: every second of these is a sequence.
            bounds = np.stack([begins, begins + sizes[some]], axis=1).ravel()
            marks = tokens.marks[bounds[0] : bounds[-1]]
            found[run.start + some] = np.add.reduceat(marks, bounds[:-1] - bounds[0], dtype=np.int64)[::2]
    return found


def _say_losses(rows: Rows, lengths: Ints, kept: Ints, seq_len: int) -> None:
    longer = int((lengths - 1 > seq_len).sum())
    if not len(kept):
        reason = (
            f"all {longer:,} that are longer than data.seq_len={seq_len} lose it there" if longer else "all is masked"
        )
        raise UserError(
            f"there is nothing to learn in any of the {len(rows):,} rows, such as {rows.name(0)}: {reason}. "
            "Check that completions, or turns of the assistant, are there and not empty, and data.seq_len."
        )
    if longer:
        log.warning(
            "%s of %s rows are longer than data.seq_len=%d and are cut", f"{longer:,}", f"{len(rows):,}", seq_len
        )
    if dropped := len(rows) - len(kept):
        first = int(np.setdiff1d(np.arange(len(rows)), kept)[0])
        log.warning("%s rows are left out: nothing is left to learn, as in %s", f"{dropped:,}", rows.name(first))


@final
class LabelledTexts(Dataset):
    """Texts with a label: {input_ids (t,), [token_type_ids (t,)], labels (...)}; attention_mask (B, T) in batches.

    labels: (N, ...), one class id or number for each text, or several.
    """

    def __init__(self, tokens: Tokens, labels: npt.NDArray[Any], rows: Rows, fill: int, typed: bool):
        self.tokens, self.labels, self.rows, self.fill, self.typed = tokens, labels, rows, fill, typed
        self.tokens_per_example = float(tokens.lengths.mean())

    def __len__(self) -> int:
        return len(self.labels)

    def lengths(self, indices: Ints) -> Ints:
        """Return the tokens of texts."""
        return self.tokens.offsets[indices + 1] - self.tokens.offsets[indices]

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Return text `index`."""
        span = slice(self.tokens.offsets[index], self.tokens.offsets[index + 1])
        example: Example = {"input_ids": self.tokens.ids[span], "labels": self.labels[index]}
        if self.typed and self.tokens.marks is not None:
            example["token_type_ids"] = self.tokens.marks[span]
        return example

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Pad to the longest."""
        fills = {"input_ids": self.fill, "token_type_ids": 0}
        batch = {k: pad([e[k] for e in examples], fill) for k, fill in fills.items() if k in examples[0]}
        batch["attention_mask"] = pad([np.ones(len(e["input_ids"]), np.int64) for e in examples], 0)
        return batch | {"labels": torch.tensor(np.stack([e["labels"] for e in examples]))}

    def name(self, index: int) -> str:
        """Say which row this is."""
        return self.rows.name(index)
