"""Words with tags: which piece of a tokenised sequence is a word's first, and batches that say where those stand."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch

from scaletrain.data.chats import text
from scaletrain.data.classes import Listed
from scaletrain.data.dataset import Dataset, Example
from scaletrain.data.formats import Encoded, Format
from scaletrain.data.text import IGNORE, Tokens, pad
from scaletrain.errors import UserError

if TYPE_CHECKING:
    from scaletrain.data.sources import Rows


@final
@dataclass(frozen=True)
class Words(Format):
    """A list of words, put together by blanks, with the tokenizer's special tokens, cut to `max_length` tokens.

    The mark of a word's first piece is how many words it is further than the word before it that has pieces (words of
    characters that a tokenizer drops have none); that of other pieces is 0. So the words' numbers are the running sum,
    less 1.
    """

    max_length: int

    @property
    def columns(self) -> tuple[str, ...]:
        """`tokens`."""
        return ("tokens",)

    @property
    def options(self) -> tuple[object, ...]:
        """With the length, and the code here."""
        return (*super().options, self.max_length, inspect.getsource(sys.modules[__name__]))

    def encode(self, values: Sequence[Sequence[Any]], names: Sequence[str]) -> Encoded:
        """Tokenise. Raises UserError that names the row."""
        rows = [_words(value, name) for value, name in zip(values[0], names, strict=True)]
        done = self.tokenizer(
            [" ".join(words) for words in rows],
            truncation=True,
            max_length=self.max_length,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        self.tokenizer.backend_tokenizer.no_truncation()  # it stays on otherwise, and would be saved
        marks = [
            _marks(words, np.asarray(offsets, np.int64).reshape(-1, 2), name)
            for words, offsets, name in zip(rows, done["offset_mapping"], names, strict=True)
        ]
        return Encoded(done["input_ids"], marks)


def _words(value: Any, name: str) -> list[str]:
    if not isinstance(value, (list, tuple)) or not value:
        found = "an empty list" if value == [] else repr(value)
        raise UserError(f"{name}: `tokens` must be a list of words, not {found}.")
    return [text(word, "tokens", name) for word in value]


def _marks(words: Sequence[str], offsets: np.ndarray[Any, Any], name: str) -> list[int]:
    """Return the mark of each piece. offsets: (t, 2), the characters of each; none, where it is a special token."""
    ends = np.cumsum([len(word) + 1 for word in words]) - 1  # of words, in characters
    real = offsets[:, 1] > offsets[:, 0]
    # The word of a piece's last character: some tokenizers count the blank before a word as part of it.
    of_word = np.where(real, np.searchsorted(ends, offsets[:, 1] - 1, "right"), -1)
    furthest = np.maximum.accumulate(np.concatenate([[-1], of_word]))
    marks = np.diff(furthest)
    if marks.max(initial=0) > 255:
        raise UserError(f"{name}: more than 255 words in a row have no character that the tokenizer knows.")
    return marks.tolist()


@final
class TaggedTexts(Dataset):
    """Words with tags: {input_ids (t,), places (w,), labels (w,)}, w the words whose first piece is there.

    In batches: input_ids and attention_mask (B, T); places (B, W), where the words' first pieces stand (0 for padding),
    and labels (B, W), their tags or IGNORE. tags: one list for each row, as long as its words.
    """

    def __init__(self, tokens: Tokens, tags: Listed, rows: Rows, fill: int):
        assert tokens.marks is not None
        self.tokens, self.rows, self.fill = tokens, rows, fill
        self.tags, self.starts = np.asarray(tags.labels, np.int64), tags.offsets
        self.tokens_per_example = float(tokens.lengths.mean())

    def __len__(self) -> int:
        return len(self.starts) - 1

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Return text `index`."""
        assert self.tokens.marks is not None
        span = slice(self.tokens.offsets[index], self.tokens.offsets[index + 1])
        marks = self.tokens.marks[span]
        places = np.flatnonzero(marks)
        words = np.cumsum(marks[places], dtype=np.int64) - 1
        return {"input_ids": self.tokens.ids[span], "places": places, "labels": self.tags[self.starts[index] + words]}

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Pad to the longest."""
        fills = {"input_ids": self.fill, "places": 0, "labels": IGNORE}
        batch = {k: pad([e[k] for e in examples], fill) for k, fill in fills.items()}
        return batch | {"attention_mask": pad([np.ones(len(e["input_ids"]), np.int64) for e in examples], 0)}

    def name(self, index: int) -> str:
        """Say which row this is."""
        return self.rows.name(index)
