"""The data contract: what a run is about to learn from, in figures, and why it should not begin.

All is counted over the token arrays, some rows at a time, so that a million rows take seconds and no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scaletrain.data.formats import Documents, Format
from scaletrain.data.order import key_of
from scaletrain.data.text import MULTIPLE, Ints, LanguageDataset, Tokens, learned

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from scaletrain.data.sources import Rows

OFFICIAL_ROWS = 64
"""Rows whose tokens are compared with the official template's."""
FIRST = 2
"""Rows that a message names."""


@dataclass(frozen=True)
class Inspection:
    """What is said of examples before they are trained on.

    lines: for the log. more: for those who ask, such as a histogram. wrong: why they are refused. rows: some of them
    by name, each as pieces of text and whether they are learned; given how many.
    """

    lines: tuple[str, ...]
    more: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    rows: Callable[[int], list[tuple[str, list[tuple[str, bool]]]]] | None = None


@dataclass(frozen=True)
class Figures:
    """Of N rows."""

    again: Ints
    """Which have been there before: (K,)."""
    largest: npt.NDArray[np.int32]
    """(N,) the largest token id; -1 of a row without tokens."""
    ended: npt.NDArray[np.bool_]
    """(N,) the last token that is learned ends a text or a turn."""


def figures(tokens: Tokens, ends: Sequence[int]) -> Figures:
    """Count over all rows; those with the same hash of 64 bits are taken for the same.

    ends: the tokens that end a text or a turn.
    """
    count = len(tokens.lengths)
    hashes, largest, ended = np.zeros(count, np.uint64), np.full(count, -1, np.int32), np.zeros(count, bool)
    draw = np.random.Generator(np.random.Philox(key=key_of("rows that occur again")))
    vocabulary = int(tokens.ids.max(initial=0)) + 1
    of_token = draw.integers(0, 1 << 64, vocabulary, np.uint64)
    of_place = draw.integers(0, 1 << 64, int(tokens.lengths.max(initial=0)), np.uint64) | np.uint64(1)
    for run in tokens.runs():
        offsets = tokens.offsets[run.start : run.stop + 1]
        lengths = np.diff(offsets)
        some = np.flatnonzero(lengths)
        if not len(some):
            continue
        first, last = int(offsets[0]), int(offsets[-1])
        rows, begins, lengths = run.start + some, offsets[some] - first, lengths[some]
        ids = tokens.ids[first:last]
        place = np.arange(len(ids)) - np.repeat(begins, lengths)
        hashes[rows] = np.add.reduceat(of_token[ids] * of_place[place], begins)
        largest[rows] = np.maximum.reduceat(ids, begins)
        places = np.arange(len(ids)) if tokens.marks is None else np.flatnonzero(tokens.marks[first:last])
        stop = np.searchsorted(places, begins + lengths)
        told = stop > np.searchsorted(places, begins)
        ended[rows[told]] = np.isin(ids[places[stop[told] - 1]], np.asarray(ends))
    return Figures(again(hashes), largest, ended)


def again(hashes: npt.NDArray[Any]) -> Ints:
    """Return which of these have been there before."""
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    return np.sort(order[1:][hashes[1:] == hashes[:-1]])


def inspect(
    dataset: LanguageDataset,
    readers: Callable[[Rows], Sequence[Format]],
    tokenizer: PreTrainedTokenizerFast,
    embeddings: int | None,
    micro_batch: int,
    max_lost: float,
) -> Inspection:
    """Inspect the examples of a language model.

    readers: the formats of rows that are alike. embeddings: of the network, where known. max_lost: share of the rows
    that may be left without an answer.
    """
    tokens, rows, seq_len = dataset.tokens, dataset.rows, dataset.seq_len
    fmts = readers(rows)
    lengths, count = tokens.lengths, len(rows)
    seen = figures(tokens, ends_of(tokenizer))
    wrong: list[str] = []
    some = partial(some_of, rows)

    whole = learned(tokens)
    told = int(whole.sum())
    lines = [
        f"{count:,} rows, {len(tokens.ids):,} tokens, of which {told:,} ({told / max(1, len(tokens.ids)):.0%}) are "
        f"learned; {some(seen.again)} occur again",
        lengths_in_words(lengths),
    ]
    answers = not any(isinstance(fmt, Documents) for fmt in fmts)
    if answers:
        kept = learned(tokens, seq_len)
        cut, lost, none = (
            np.flatnonzero(which) for which in (lengths - 1 > seq_len, (kept == 0) & (whole > 0), whole == 0)
        )
        open_ended = np.flatnonzero((whole > 0) & ~seen.ended)
        lines.append(f"{some(cut)} are cut at data.seq_len={seq_len}, {some(lost)} lose their whole answer there")
        if len(none):
            lines.append(f"{some(none)} have no answer")
        lines.append(
            f"{some(open_ended)} do not learn an end of the answer"
            if len(open_ended)
            else "every answer learns its end"
        )
        if (share := (len(lost) + len(none)) / max(1, count)) > max_lost:
            reasons = []
            if len(lost):
                reasons.append(f"{some(lost)} are cut by data.seq_len={seq_len} before it begins")
            if len(none):
                reasons.append(f"{some(none)} have none: {_why(rows, int(none[0]), readers)}")
            wrong.append(
                f"{share:.1%} of the rows are left without an answer, more than objective.max_lost={max_lost:g} "
                f"allows: {'; '.join(reasons)}. Raise data.seq_len or leave these rows out, or allow more."
            )
    filled = fill(dataset.sizes(), micro_batch)
    hint = "" if dataset.packed or filled > 0.7 else " (data.packing=true fills more)"
    lines.append(
        f"{len(dataset):,} {'packs' if dataset.packed and answers else 'examples'}; batches are {filled:.0%} full{hint}"
    )
    limit = len(tokenizer) if embeddings is None else embeddings
    if len(outside := np.flatnonzero(seen.largest >= limit)):
        wrong.append(
            f"{some(outside)} have tokens that the network has no embedding for: the largest is "
            f"{int(seen.largest.max()):,}, it embeds {limit:,}."
        )
    for number, found, official in _compared(tokens, rows, fmts):
        if found != official:
            wrong.append(f"{rows.name(number)}: the tokens are not those of the tokenizer's own chat template.")
            break
    return Inspection(
        tuple(lines), tuple(histogram(lengths)), tuple(wrong), lambda n: list(_coloured(tokens, rows, tokenizer, n))
    )


def ends_of(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the tokens that may end a text or a turn: special ones."""
    return sorted({i for i, t in tokenizer.added_tokens_decoder.items() if t.special} | set(tokenizer.all_special_ids))


def some_of(rows: Rows, which: Ints) -> str:
    """Say how many rows, and name the first."""
    return f"{len(which):,} rows" + (
        f" (such as {', '.join(map(rows.name, which[:FIRST].tolist()))})" if len(which) else ""
    )


def fill(sizes: Ints, batch: int) -> float:
    """Return what share of the places of batches is no padding. sizes: (N,) places of each example."""
    if not len(sizes):
        return 0.0
    order = np.random.Generator(np.random.Philox(key=key_of("batches"))).permutation(len(sizes))
    starts = np.arange(0, len(sizes), batch)
    longest = np.maximum.reduceat(sizes[order], starts)
    width = -(-longest // MULTIPLE) * MULTIPLE
    return float(sizes.sum() / (width * np.diff(starts, append=len(sizes))).sum())


def lengths_in_words(lengths: Ints, of: str = "a row") -> str:
    """Return the percentiles of lengths as a line of text."""
    half, most, all_but = np.percentile(lengths, [50, 95, 99]).astype(int).tolist() if len(lengths) else (0, 0, 0)
    return (
        f"tokens of {of}: half ≤ {half:,}, 95% ≤ {most:,}, 99% ≤ {all_but:,}, longest {int(lengths.max(initial=0)):,}"
    )


def histogram(lengths: Ints) -> Iterator[str]:
    """Yield a line for each doubling of the length."""
    doublings = max(1, int(lengths.max(initial=1) - 1).bit_length() - 2)
    bounds = [0, *(8 << np.arange(doublings)).tolist()]
    counts = np.histogram(lengths, [b + 0.5 if b else -0.5 for b in bounds])[0].tolist()
    for bound, count in zip(bounds[1:], counts, strict=True):
        yield f"≤ {bound:7,} {count:10,} {'█' * round(40 * count / max(1, *counts))}".rstrip()


def spread(count: int, wanted: int) -> list[int]:
    """Return so many numbers, evenly spread over those below `count`."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).astype(int)).tolist()


def _compared(tokens: Tokens, rows: Rows, fmts: Sequence[Format]) -> Iterator[tuple[int, list[int], list[int]]]:
    """Yield some rows: number, tokens, and what another accepted way makes of them."""
    start = 0
    for run, fmt in zip(rows.alike() if len(fmts) > 1 else [rows], fmts, strict=True):
        numbers = spread(len(run), OFFICIAL_ROWS)
        values = run.take(fmt.columns, np.array(numbers))
        official = fmt.official([values[c] for c in fmt.columns], [run.name(i) for i in numbers])
        for i, ids in zip(numbers, official or (), strict=False):
            a, b = tokens.offsets[start + i : start + i + 2].tolist()
            yield start + i, tokens.ids[a:b].tolist(), ids
        start += len(run)


def _why(rows: Rows, number: int, readers: Callable[[Rows], Sequence[Format]]) -> str:
    """Say why a row has no answer."""
    row = rows.select([number])
    fmt = readers(row.alike()[0])[0]
    values = row.alike()[0].take(fmt.columns, np.array([0]))
    return fmt.unanswered([values[c] for c in fmt.columns], [rows.name(number)])


def _coloured(
    tokens: Tokens, rows: Rows, tokenizer: PreTrainedTokenizerFast, count: int
) -> Iterator[tuple[str, list[tuple[str, bool]]]]:
    """Yield rows evenly spread: name, and pieces of text with whether they are learned."""
    for number in spread(len(rows), count):
        a, b = tokens.offsets[number : number + 2].tolist()
        marks = np.ones(b - a, np.uint8) if tokens.marks is None else np.asarray(tokens.marks[a:b])
        cuts = np.flatnonzero(np.diff(marks)) + 1
        pieces: list[Any] = np.split(np.asarray(tokens.ids[a:b]), cuts)
        kinds = marks[np.concatenate([[0], cuts]).astype(int)].astype(bool).tolist() if b > a else []
        yield rows.name(number), [(str(tokenizer.decode(p.tolist())), k) for p, k in zip(pieces, kinds, strict=False)]
