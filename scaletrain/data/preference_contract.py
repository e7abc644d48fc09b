"""The data contract of preferences: what is compared, in figures, and why it should not begin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from scaletrain.data.contract import (
    OFFICIAL_ROWS,
    Inspection,
    again,
    ends_of,
    fill,
    histogram,
    lengths_in_words,
    some_of,
    spread,
)
from scaletrain.data.formats import Format
from scaletrain.data.preferences import Preferences, Sequences
from scaletrain.data.text import Ints

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def inspect(
    dataset: Preferences,
    fmts: Sequence[Format],
    tokenizer: PreTrainedTokenizerFast,
    embeddings: int | None,
    micro_batch: int,
    max_lost: float,
) -> Inspection:
    """Inspect pairs, or judged answers.

    fmts: of each answer of a row. embeddings: of the network, where known. max_lost: share of the rows that may be
    left out.
    """
    (sequences, reasons), rows, seq_len = dataset.origin, dataset.rows, dataset.shape.seq_len
    some, count = partial(some_of, rows), len(dataset.rows)
    lengths = np.concatenate([s.prompts.lengths + s.answers.lengths for s in sequences])
    told = sum(int(s.answers.lengths.sum()) for s in sequences)
    left = {reason: np.flatnonzero(which) for reason, which in reasons.items() if which.any()}
    lost = sum(map(len, left.values()))
    lines = [
        f"{count:,} rows, {int(lengths.sum()):,} tokens, of which {told:,} ({told / max(1, int(lengths.sum())):.0%}) "
        f"are of answers; {some(_again(sequences))} occur again",
        lengths_in_words(lengths, "a prompt with an answer"),
        *(f"{some(which)} are left out: {reason}" for reason, which in left.items()),
        f"{some(dataset.cut)} are cut at data.seq_len={seq_len}: their prompts lose their beginning",
    ]
    ends = ends_of(tokenizer)
    open_ended = np.flatnonzero(np.any([_open_ended(s, ends) for s in sequences], axis=0))
    lines.append(
        f"{some(open_ended)} do not learn an end of the answer" if len(open_ended) else "every answer learns its end"
    )
    filled = _fill(dataset.sizes(), micro_batch)
    hint = "" if dataset.shape.packed or filled > 0.7 else " (data.packing=true fills more)"
    kind = "packs" if dataset.shape.packed else "examples"
    lines.append(f"{len(dataset):,} {kind}; batches are {filled:.0%} full{hint}")
    wrong = []
    if (share := lost / max(1, count)) > max_lost:
        why = "; ".join(f"of {some(which)} {reason}" for reason, which in left.items())
        wrong.append(
            f"{share:.1%} of the rows are left out, more than objective.max_lost={max_lost:g} allows: {why}. Raise "
            "data.seq_len where answers are long, leave these rows out, or allow more."
        )
    limit = len(tokenizer) if embeddings is None else embeddings
    if len(outside := _outside(sequences, limit)):
        wrong.append(f"{some(outside)} have tokens that the network has no embedding for: it embeds {limit:,}.")
    if (differs := next(_differing(dataset, fmts), None)) is not None:
        wrong.append(f"{rows.name(differs)}: the tokens are not those of the tokenizer's own chat template.")
    return Inspection(
        tuple(lines), tuple(histogram(lengths)), tuple(wrong), lambda n: list(_coloured(dataset, fmts, tokenizer, n))
    )


def _again(sequences: Sequence[Sequences]) -> Ints:
    """Return the rows whose prompt and answers have been there before."""
    parts = [spans for s in sequences for spans in s]
    count = len(parts[0].lengths)
    return again(np.fromiter((hash(tuple(p.at(i).tobytes() for p in parts)) for i in range(count)), np.int64, count))


def _outside(sequences: Sequence[Sequences], limit: int) -> Ints:
    """Return the rows with a token of this number or above."""
    if all(int(s.answers.ids.max(initial=0)) < limit for s in sequences):
        return np.empty(0, np.int64)
    parts = [spans for s in sequences for spans in s]
    rows = range(len(parts[0].lengths))
    return np.flatnonzero([any(p.at(i).max(initial=0) >= limit for p in parts) for i in rows])


def _open_ended(sequences: Sequences, ends: Sequence[int]) -> np.ndarray:
    """Say which answers there are that end with no end: (N,) bool."""
    spans, found = sequences.answers, np.zeros(len(sequences.answers.lengths), bool)
    some = np.flatnonzero(spans.lengths)
    found[some] = ~np.isin(spans.ids[spans.ends[some] - 1], ends)
    return found


def _fill(sizes: Ints, batch: int) -> float:
    """Return what share of the places of batches is no padding. sizes: (N, L) of each example's lines."""
    longest = sizes.max(1, initial=0)
    return fill(longest, batch) * float(sizes.mean() / longest.mean()) if len(sizes) else 0.0


def _differing(dataset: Preferences, fmts: Sequence[Format]) -> Iterator[int]:
    """Yield the rows, of some, whose tokens are not those of another accepted way."""
    numbers = spread(len(dataset.rows), OFFICIAL_ROWS)
    names = [dataset.rows.name(i) for i in numbers]
    for fmt in fmts:
        taken = dataset.rows.take(fmt.columns, np.array(numbers))
        values = [taken[c] for c in fmt.columns]
        official = fmt.official(values, names)
        if official is not None:
            pairs = zip(numbers, fmt.encode(values, names).ids, official, strict=True)
            yield from (number for number, own, theirs in pairs if own != theirs)


def _coloured(
    dataset: Preferences, fmts: Sequence[Format], tokenizer: PreTrainedTokenizerFast, count: int
) -> Iterator[tuple[str, list[tuple[str, bool]]]]:
    """Yield the sequences of rows evenly spread: name, and the prompt and the answer, which is learned."""
    for index in spread(len(dataset.numbers), count):
        name = dataset.rows.name(int(dataset.numbers[index]))
        for fmt, parts in zip(fmts, dataset.told(index), strict=True):
            prompt, answer = (str(tokenizer.decode(part.tolist())) for part in parts)
            yield f"{name}, {fmt.columns[-1]}", [(prompt, False), (answer, True)]
