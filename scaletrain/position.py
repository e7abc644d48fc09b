"""From steps to positions in the data, and from durations to steps."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from scaletrain.config import Duration
from scaletrain.data.stream import Stream
from scaletrain.errors import UserError
from scaletrain.objectives.base import Data
from scaletrain.player import Turn


def windows_before(turns: Sequence[Turn], step: int) -> int:
    """Return how many accumulation windows the steps before `step` took: the position in the data."""
    return sum(turn.repeats * -(-step // turn.every) for turn in turns)


def next_window(taken: int, skipped: Collection[int]) -> int:
    """Return the window that follows the first `taken` that were trained on; `skipped` ones were passed over."""
    last = taken - 1
    for window in sorted(skipped):
        last += window <= last
    return last + 1


def steps_of(
    duration: Duration, turns: Sequence[Turn], data: Data, global_batch: int, key: str = "train.duration"
) -> int:
    """Turn a duration into steps of this stage. Raises UserError, which names the key, where the unit is not known."""
    if duration.unit == "steps":
        return math.ceil(duration.value)
    samples = duration.value
    if duration.unit == "epochs":
        if isinstance(data.train, Stream):
            raise UserError(
                f"{key} is in epochs: how many examples the rows of a stream come to is not known before they are "
                f"read. Give steps{', samples or tokens' if key == 'train.duration' else ''}."
            )
        samples *= len(data.train)
    elif duration.unit == "tokens":
        if data.train.tokens_per_example is None:
            raise UserError("train.duration: this data has no tokens; give steps, epochs or samples.")
        samples /= data.train.tokens_per_example
    per_step = sum(turn.repeats / turn.every for turn in turns)
    return max(1, math.ceil(samples / (global_batch * per_step) - 1e-9))
