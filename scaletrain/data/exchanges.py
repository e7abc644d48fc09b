"""Texts and what becomes of them: a source that is read whole, and a target that is written token by token."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch

from scaletrain.data.chats import text
from scaletrain.data.dataset import Dataset, Example
from scaletrain.data.formats import Encoded, Format
from scaletrain.data.text import IGNORE, Ints, Tokens, pad
from scaletrain.data.tokenizers import end_of_text
from scaletrain.errors import UserError

if TYPE_CHECKING:
    from scaletrain.data.sources import Rows


@final
@dataclass(frozen=True)
class Exchanges(Format):
    """A source and its target, each with the tokenizer's special tokens, one after the other; the target is marked.

    They are cut to `source_len` and `target_len` tokens; a target always ends with the end of text.
    """

    roles: tuple[str, str]
    source_len: int
    target_len: int

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of the source and of the target."""
        return self.roles

    @property
    def options(self) -> tuple[object, ...]:
        """With the lengths, and the code here."""
        return (*super().options, self.source_len, self.target_len, inspect.getsource(sys.modules[__name__]))

    def encode(self, values: Sequence[Sequence[Any]], names: Sequence[str]) -> Encoded:
        """Tokenise. Raises UserError that names the row."""
        sources, targets = (
            [text(t, column, n) for t, n in zip(texts, names, strict=True)]
            for column, texts in zip(self.roles, values, strict=True)
        )
        end, ids, marks = end_of_text(self.tokenizer), [], []
        asked: list[list[int]] = self.tokenizer(sources, truncation=True, max_length=self.source_len)["input_ids"]
        told: list[list[int]] = self.tokenizer(
            text_target=targets, truncation=True, max_length=self.target_len
        )["input_ids"]  # fmt: skip
        self.tokenizer.backend_tokenizer.no_truncation()  # it stays on otherwise, and would be saved
        for source, target, name in zip(asked, told, names, strict=True):
            if not source:
                raise UserError(f"{name}: `{self.roles[0]}` is empty.")
            if not target or target[-1] != end:
                target = [*target[: self.target_len - 1], end]
            ids.append(source + target)
            marks.append([0] * len(source) + [1] * len(target))
        return Encoded(ids, marks)


@final
class ExchangedTexts(Dataset):
    """Sources with targets: {input_ids (s,), decoder_input_ids (t,), labels (t,)}, for teacher forcing.

    The decoder reads `start` and the target without its last token, and learns the target. In batches, with
    attention_mask (B, S); padding is at the right, where the decoder's causal mask makes another one needless.
    """

    def __init__(self, tokens: Tokens, rows: Rows, fill: int, start: int):
        assert tokens.marks is not None
        self.tokens, self.rows, self.fill, self.start = tokens, rows, fill, start
        self.tokens_per_example = float(tokens.lengths.mean())

    def __len__(self) -> int:
        return len(self.tokens.lengths)

    def lengths(self, indices: Ints) -> Ints:
        """Return the tokens of sources and targets together."""
        return self.tokens.offsets[indices + 1] - self.tokens.offsets[indices]

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Return row `index`."""
        assert self.tokens.marks is not None
        span = slice(self.tokens.offsets[index], self.tokens.offsets[index + 1])
        ids, split = self.tokens.ids[span].astype(np.int64), int((self.tokens.marks[span] == 0).sum())
        target = ids[split:]
        return {
            "input_ids": ids[:split],
            "decoder_input_ids": np.concatenate([[self.start], target[:-1]]),
            "labels": target,
        }

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Pad to the longest."""
        fills = {"input_ids": self.fill, "decoder_input_ids": self.fill, "labels": IGNORE}
        batch = {k: pad([e[k] for e in examples], fill) for k, fill in fills.items()}
        return batch | {"attention_mask": pad([np.ones(len(e["input_ids"]), np.int64) for e in examples], 0)}

    def name(self, index: int) -> str:
        """Say which row this is."""
        return self.rows.name(index)
