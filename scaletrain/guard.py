"""Telling updates that would do harm before they are made: not finite, or far above the ones before."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from scaletrain.config import GuardSpec

_FEWEST = 20
"""Updates that must have been seen before one is told to stand out."""


class Rollback(Exception):
    """Go back to the last checkpoint, and pass over these windows of the data."""

    def __init__(self, reason: str, step: int, windows: tuple[int, ...]):
        super().__init__(reason)
        self.reason, self.step, self.windows = reason, step, windows

    def record(self) -> dict[str, Any]:
        """Return what metrics.jsonl says of it."""
        return {
            "kind": "rollback",
            "from_step": self.step,
            "skipped_windows": list(self.windows),
            "reason": self.reason,
        }


class Spikes:
    """Says which updates stand out from the `window` before them, by the loss or by the logarithm of the gradient norm.

    One stands out when it is more than `deviations` standard deviations above their mean. The deviation is taken as at
    least 1% of the mean, or 0.05 for the logarithm. What stands out is not remembered, so that it widens nothing.

    history: by figure, the last values; kept in checkpoints, and changed in place.
    """

    def __init__(self, spec: GuardSpec, history: list[list[float]]):
        self._spec, self._history = spec, history
        if not history:
            history += [[], []]

    def find(self, loss: float, norm: float) -> str:
        """Take note of an update that is about to be made. Returns what is wrong with it, or nothing."""
        if not math.isfinite(loss):
            return ""  # though the gradients are: nothing to compare with, nor to be remembered
        values = (loss, math.log(max(norm, 1e-30)))
        floors = (0.01, 0.05)
        for name, value, before, floor in zip(("loss", "gradient norm"), values, self._history, floors, strict=True):
            if len(before) >= _FEWEST:
                middle, deviation = float(np.mean(before)), float(np.std(before))
                least = floor * abs(middle) if name == "loss" else floor
                if value > middle + self._spec.deviations * max(deviation, least):
                    shown = (loss, middle) if name == "loss" else (norm, math.exp(middle))
                    return f"the {name}, {shown[0]:.4g}, stands out: the mean of those before it is {shown[1]:.4g}"
        for value, before in zip(values, self._history, strict=True):
            before.append(value)
            del before[: -self._spec.window]
        return ""
