"""Texts with some tokens hidden, for encoders that learn to tell them: drawn anew each time a text is read."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np
import numpy.typing as npt
import torch

from scaletrain.data.chats import text
from scaletrain.data.dataset import Dataset, Example
from scaletrain.data.formats import Encoded, Format
from scaletrain.data.text import IGNORE, Ints, Tokens, pad
from scaletrain.data.tokenizers import filler, leading, pieces
from scaletrain.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from scaletrain.data.sources import Rows

MASKED, RANDOM = 0.8, 0.1
"""Of the hidden tokens: how many a mask stands for, and how many a random one; the others are seen as they are."""


@final
@dataclass(frozen=True)
class Passages(Format):
    """Plain text without the tokenizer's special tokens, but for a separator at its end.

    words: the mark says of a piece whether it is a word's first.
    """

    words: bool

    @property
    def columns(self) -> tuple[str, ...]:
        """`text`."""
        return ("text",)

    @property
    def options(self) -> tuple[object, ...]:
        """With what the marks say, and the code here."""
        return (*super().options, self.words, inspect.getsource(sys.modules[__name__]))

    def encode(self, values: Sequence[Sequence[Any]], names: Sequence[str]) -> Encoded:
        """Tokenise; an empty text has no tokens. Raises UserError that names the row."""
        texts = [list(pieces(text(t, "text", n))) for t, n in zip(values[0], names, strict=True)]
        parts = list(chain.from_iterable(texts))
        done: Any = self.tokenizer(parts, add_special_tokens=False, verbose=False)
        between = self.tokenizer.sep_token_id
        between = self.tokenizer.eos_token_id if between is None else between
        numbers, ids, marks = iter(range(len(parts))), [], []
        for some in texts:
            own = [next(numbers) for _ in some]
            row = list(chain.from_iterable(done["input_ids"][i] for i in own))
            end = [between] if row and between is not None else []
            ids.append(row + end)
            if self.words:
                marks.append([*chain.from_iterable(_firsts(done.word_ids(i)) for i in own), *(1 for _ in end)])
        return Encoded(ids, marks if self.words else None)


def _firsts(words: Sequence[int | None]) -> list[int]:
    """Return 1 for the first piece of each word, 0 for the others."""
    return [int(i == 0 or word != words[i - 1]) for i, word in enumerate(words)]


class Alphabet(NamedTuple):
    """What hiding needs to know of a tokenizer: (V,) which tokens are special, and the ids of some of these."""

    special: npt.NDArray[np.bool_]
    mask: int
    fill: int
    before: Ints
    after: Ints

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> Alphabet:
        """Read a tokenizer that has a mask."""
        special = np.zeros(len(tokenizer), bool)
        special[tokenizer.all_special_ids] = True
        before = leading(tokenizer)
        bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
        after = tokenizer("a")["input_ids"][len(before) + len(bare) :]
        mask = int(tokenizer.mask_token_id)
        return cls(special, mask, filler(tokenizer), np.asarray(before, np.int64), np.asarray(after, np.int64))


@final
class MaskedTexts(Dataset):
    """Texts, or blocks of them, with a share of their tokens hidden (Devlin et al., 2019, section 3.1).

    Examples: {input_ids (t,), labels (t,)}, labels IGNORE but where a token is hidden; in batches, with attention_mask,
    (B, T). Of n tokens, share · n are hidden, rounded up or down by chance, but one at least; special ones never are.
    blocks: texts one after the other, cut into blocks of `seq_len` positions, as RoBERTa takes them (Liu et al., 2019,
    FULL-SENTENCES); else each text by itself, cut to them. words: hide whole words. empty: there may be no text, which
    is a UserError otherwise.
    """

    def __init__(
        self,
        tokens: Tokens,
        rows: Rows,
        alphabet: Alphabet,
        seq_len: int,
        share: float,
        blocks: bool,
        words: bool,
        empty: bool = False,
    ):
        self.tokens, self.rows, self.alphabet, self.share, self.words = tokens, rows, alphabet, share, words
        self.room = seq_len - len(alphabet.before) - len(alphabet.after)
        if self.room < 1:
            raise UserError(f"data.seq_len={seq_len}: nothing is left beside the special tokens. Raise it.")
        if blocks:
            starts = np.arange(0, len(tokens.ids), self.room)
            self._spans = np.stack([starts, np.minimum(starts + self.room, len(tokens.ids))], 1)
        else:
            kept = np.flatnonzero(tokens.lengths)
            starts = tokens.offsets[kept]
            self._spans = np.stack([starts, starts + np.minimum(tokens.lengths[kept], self.room)], 1)
        if not len(self._spans) and not empty:
            raise UserError(f"there is nothing to learn: the text of all {len(rows):,} rows is empty.")
        around = len(alphabet.before) + len(alphabet.after)
        self.tokens_per_example = float(np.diff(self._spans).mean()) + around if len(self._spans) else 0.0
        self._ordinary = np.flatnonzero(~alphabet.special)

    def __len__(self) -> int:
        return len(self._spans)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Return text `index`; what is hidden, and what is seen in its place, are drawn from `rng`."""
        known, (start, stop) = self.alphabet, self._spans[index]
        ids = self.tokens.ids[start:stop].astype(np.int64)
        hidden = self._hidden(ids, start, rng)
        kind = rng.random(len(hidden))
        seen, labels = ids.copy(), np.full(len(ids), IGNORE)
        labels[hidden] = ids[hidden]
        random = rng.choice(self._ordinary, len(hidden))
        shown = np.where(kind < MASKED, known.mask, np.where(kind < MASKED + RANDOM, random, ids[hidden]))
        seen[hidden] = shown
        outside = (np.full(len(known.before), IGNORE), np.full(len(known.after), IGNORE))
        return {
            "input_ids": np.concatenate([known.before, seen, known.after]),
            "labels": np.concatenate([outside[0], labels, outside[1]]),
        }

    def _hidden(self, ids: Ints, start: int, rng: np.random.Generator) -> Ints:
        """Draw which tokens to hide: their places."""
        ordinary = np.flatnonzero(~self.alphabet.special[ids])
        if not len(ordinary):
            return ordinary
        count = max(1, int(self.share * len(ordinary) + rng.random()))
        if not self.words:
            return rng.choice(ordinary, count, replace=False)
        assert self.tokens.marks is not None
        words = np.cumsum(self.tokens.marks[start + ordinary], dtype=np.int64)  # a block may begin inside a word
        _, words, lengths = np.unique(words, return_inverse=True, return_counts=True)
        order = rng.permutation(len(lengths))
        some = order[: max(1, int(np.searchsorted(lengths[order].cumsum(), count, "right")))]
        return ordinary[np.isin(words, some)]

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Pad to the longest."""
        fills = {"input_ids": self.alphabet.fill, "labels": IGNORE}
        batch = {k: pad([e[k] for e in examples], fill) for k, fill in fills.items()}
        return batch | {"attention_mask": pad([np.ones(len(e["labels"]), np.int64) for e in examples], 0)}

    def name(self, index: int) -> str:
        """Say where this text stands."""
        row = int(np.searchsorted(self.tokens.offsets, self._spans[index][0], "right")) - 1
        return self.rows.name(row)
