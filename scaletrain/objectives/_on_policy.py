"""A student's own continuations of the prompts in a batch, as examples to learn from.

Shapes: B sequences or packs, N prompts in them, T positions, S tokens of a continuation, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch

from scaletrain.data.text import IGNORE, pad
from scaletrain.player import Batch


def prompts_of(batch: Batch) -> list[list[int]]:
    """Return what stands before the first learned token of each sample; samples without one are left out.

    The batch is on the CPU. Samples of a pack are told by their positions, which begin with 0.
    """
    found = []
    for row, length in enumerate(batch["lengths"].tolist()):
        ids, labels = batch["input_ids"][row, :length], batch["labels"][row, :length]
        starts = [0]
        if "position_ids" in batch:
            starts = (batch["position_ids"][row, :length] == 0).nonzero()[:, 0].tolist()
        for start, stop in zip(starts, [*starts[1:], length], strict=True):
            learned = (labels[start:stop] != IGNORE).nonzero()[:, 0]
            if len(learned):
                found.append(ids[start : start + int(learned[0]) + 1].tolist())
    return found


def continued(
    model: Any,
    prompts: Sequence[list[int]],
    new: int,
    temperature: float,
    vocabulary: int,
    ends: Collection[int],
    fill: int,
    device: torch.device,
) -> torch.Tensor:
    """Draw so many tokens after each prompt, from torch's global generator: (N, S), `fill` after one of the ends.

    The network is called `new` times whatever is drawn: ranks that hold it in parts stay together, and nothing waits
    for the device.
    """
    width = max(map(len, prompts))
    ids = torch.tensor([[fill] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    stops = torch.tensor(sorted(ends), device=device, dtype=torch.long)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    past, drawn = None, []
    for _ in range(new):
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        past = output.past_key_values
        logits = output.logits[:, -1, :vocabulary].float() / temperature
        token = torch.multinomial(logits.softmax(-1), 1)[:, 0].masked_fill(ended, fill)
        drawn.append(token)
        ended |= torch.isin(token, stops)
        ids, positions = token[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], 1)
    return torch.stack(drawn, 1)


def batch_of(
    prompts: Sequence[list[int]], drawn: torch.Tensor, ends: Collection[int], fill: int
) -> dict[str, torch.Tensor]:
    """Return a batch, on the CPU, in which the tokens that were drawn are learned, up to and with the first end."""
    ids, labels = [], []
    for prompt, row in zip(prompts, drawn.tolist(), strict=True):
        stop = next((place for place, token in enumerate(row) if token in ends), len(row) - 1) + 1
        whole = np.array(prompt + row[:stop])
        ids.append(whole[:-1])
        labels.append(np.concatenate([np.full(len(prompt) - 1, IGNORE), whole[len(prompt) :]]))
    batch = {"input_ids": pad(ids, fill), "labels": pad(labels, IGNORE)}
    learned = (batch["labels"].flatten() != IGNORE).nonzero()[:, 0]
    return {**batch, "lengths": torch.tensor(list(map(len, ids))), "learned": learned}
