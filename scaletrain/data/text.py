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
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np
import numpy.typing as npt
import torch

from scaletrain.data import formats, tokenizers
from scaletrain.data.cache import cached, content_key
from scaletrain.data.dataset import Dataset, Example
from scaletrain.data.packing import Packs, best_fit_decreasing, positions
from scaletrain.errors import UserError

if TYPE_CHECKING:
    from scaletrain.data.sources import Rows

log = logging.getLogger("scaletrain")

IGNORE = -100
"""The label of a place where nothing is learned."""
MULTIPLE = 8
"""Batches are padded to a multiple of so many positions: tensor cores want it."""
ROWS_AT_ONCE = 1000

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


def tokenise(rows: Rows, fmt: formats.Format) -> Tokens:
    """Tokenise every row, once for the same content, tokenizer, format and code; processes share the result.

    Raises UserError that names the row.
    """
    code = [inspect.getsource(module) for module in (formats, tokenizers)]
    key = content_key(rows.fingerprint, tokenizers.identity(fmt.tokenizer), fmt.options, code)
    folder = cached("tokens", key, partial(_write, rows, fmt))
    meta = json.loads((folder / "tokens.json").read_text())

    def mapped(name: str, dtype: str) -> npt.NDArray[Any]:
        path = folder / name
        return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)

    marks = mapped("marks.bin", "u1") if meta["marks"] else None
    return Tokens(mapped("ids.bin", meta["dtype"]), marks, np.load(folder / "offsets.npy"))


def encode(rows: Rows, fmt: formats.Format) -> Tokens:
    """Tokenise a few rows, in memory. Raises UserError that names the row."""
    every = range(len(rows))
    columns = rows.take([rows.require(name, "the text") for name in fmt.columns], np.arange(len(rows)))
    done = fmt.encode(list(columns.values()), [rows.name(i) for i in every])
    flat = np.fromiter(chain.from_iterable(done.ids), np.int64)
    marks = None if done.marks is None else np.fromiter(chain.from_iterable(done.marks), np.uint8)
    return Tokens(flat, marks, np.concatenate([[0], np.cumsum([len(i) for i in done.ids])]).astype(np.int64))


def _write(rows: Rows, fmt: formats.Format, folder: Path) -> None:
    dtype = "<u2" if len(fmt.tokenizer) <= 1 << 16 else "<i4"
    columns = [rows.column(rows.require(name, "the text")) for name in fmt.columns]
    lengths = np.empty(len(rows), np.int64)
    with ExitStack() as stack:
        ids = stack.enter_context((folder / "ids.bin").open("wb"))
        marks = None
        for start in range(0, len(rows), ROWS_AT_ONCE):
            some = range(start, min(start + ROWS_AT_ONCE, len(rows)))
            done = fmt.encode([c[some.start : some.stop] for c in columns], [rows.name(i) for i in some])
            lengths[some.start : some.stop] = [len(i) for i in done.ids]
            ids.write(np.concatenate([np.asarray(i, dtype) for i in done.ids]).tobytes())
            if done.marks is not None:
                marks = marks or stack.enter_context((folder / "marks.bin").open("wb"))
                marks.write(np.concatenate([np.asarray(m, "u1") for m in done.marks]).tobytes())
    np.save(folder / "offsets.npy", np.concatenate([[0], lengths.cumsum()]))
    (folder / "tokens.json").write_text(json.dumps({"dtype": dtype, "marks": marks is not None}))


def pad(arrays: Sequence[npt.NDArray[Any]], fill: int) -> torch.Tensor:
    """Stack arrays (t,) to (B, T) int64, T the longest, rounded up to a multiple of MULTIPLE; `fill` at the right."""
    width = math.ceil(max(map(len, arrays)) / MULTIPLE) * MULTIPLE
    out = np.full((len(arrays), width), fill, np.int64)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = array
    return torch.from_numpy(out)


class LanguageDataset(Dataset):
    """Examples of a language model: {input_ids (t,), labels (t,)} and, where samples are isolated, position_ids (t,).

    Batches: input_ids, labels and position_ids (B, T), lengths (B,), the real positions of each. Padding is at the
    right, where a causal model needs no mask; position_ids restart in every sample of a pack, and are 0 in padding.
    """

    def __init__(self, tokens: Tokens, fill: int):
        self.tokens, self.fill = tokens, fill

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
        return batch | {"lengths": torch.tensor([len(e["labels"]) for e in examples])}

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

    def __init__(self, tokens: Tokens, seq_len: int, fill: int, isolated: bool, empty: bool = False):
        super().__init__(tokens, fill)
        self.seq_len, self.isolated = seq_len, isolated
        self._places = max(0, len(tokens.ids) - 1)
        if not self._places and not empty:
            raise UserError(f"there is nothing to learn: the text has {len(tokens.ids)} tokens in all.")
        self._blocks = math.ceil(self._places / seq_len)
        self.tokens_per_example = self._places / max(1, self._blocks)

    def __len__(self) -> int:
        return self._blocks

    def at(self, index: int) -> Example:
        """Return block `index`."""
        start = index * self.seq_len
        stop = min(start + self.seq_len, self._places)
        labels = self._labels(start, stop)
        example: Example = {"input_ids": self.tokens.ids[start:stop], "labels": labels}
        if self.isolated:
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
        super().__init__(tokens, fill)
        self.rows, self.packed = rows, packed
        places = np.minimum(tokens.lengths - 1, seq_len)
        kept = np.flatnonzero(_learned(tokens, places) > 0)
        if not empty:
            _say_losses(rows, tokens.lengths, kept, seq_len)
        self._places = np.maximum(places, 0)
        packs = (
            best_fit_decreasing(places[kept], seq_len)
            if packed
            else Packs(np.arange(len(kept)), np.arange(len(kept) + 1))
        )
        self._order, self._starts = kept[packs.order], packs.starts
        self.tokens_per_example = float(places[kept].sum() / max(1, len(self)))

    def __len__(self) -> int:
        return len(self._starts) - 1

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


def _learned(tokens: Tokens, places: Ints) -> Ints:
    """Return how many labels each sequence has in its first so many places: (N,)."""
    if tokens.marks is None:
        return np.maximum(places, 0)
    learned = np.zeros(len(places), np.int64)
    some = np.flatnonzero(places > 0)
    if len(some):
        begins = tokens.offsets[some] + 1
        # reduceat sums from each bound to the next; every second of these sums is a sequence.
        bounds = np.stack([begins, begins + places[some]], axis=1).ravel()
        bounds = bounds[: -1 if bounds[-1] == len(tokens.marks) else None]
        learned[some] = np.add.reduceat(tokens.marks, bounds, dtype=np.int64)[::2]
    return learned


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
