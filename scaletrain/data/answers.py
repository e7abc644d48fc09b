"""Rows as questions with one answer each, for a language model to answer: what stands before the last learned run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np
import torch

from scaletrain.data.dataset import Dataset, Example
from scaletrain.data.text import Tokens, pad


@final
class Answers(Dataset):
    """Up to `count` rows, evenly chosen, in the order of their prompts' lengths, so that batches have little padding.

    Examples: {prompt (t,), answer (a,)}. Batches: prompt (B, T) and answer (B, A) with `fill` at the right, and
    prompt_lengths and answer_lengths (B,). Of a chat, the answer is the assistant's last turn. Rows without a prompt
    are left out.
    """

    def __init__(self, tokens: Tokens, count: int, fill: int):
        self.tokens, self.fill = tokens, fill
        spans: list[tuple[int, int, int]] = []
        rows = len(tokens.lengths)
        for row in np.unique(np.linspace(0, rows - 1, min(count, rows)).round().astype(int)).tolist():
            begin, stop = tokens.offsets[row : row + 2].tolist()
            learned = np.flatnonzero(tokens.marks[begin:stop]) if tokens.marks is not None else np.empty(0, int)
            if len(learned):
                end = int(learned[-1]) + 1
                start = end - int((np.diff(learned, prepend=-2)[::-1] != 1).argmax()) - 1
                if start:
                    spans.append((begin, begin + start, begin + end))
        self._spans = sorted(spans, key=lambda span: span[1] - span[0])

    def __len__(self) -> int:
        return len(self._spans)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Return the prompt and the answer of a row."""
        begin, start, end = self._spans[index]
        return {"prompt": self.tokens.ids[begin:start], "answer": self.tokens.ids[start:end]}

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Pad to the longest."""
        batch = {}
        for name in ("prompt", "answer"):
            batch[name] = pad([e[name] for e in examples], self.fill)
            batch[f"{name}_lengths"] = torch.tensor([len(e[name]) for e in examples])
        return batch
