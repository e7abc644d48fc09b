"""What the comparisons with other trainers share: each side in a process of its own, in turns, and the table."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Figures = dict[str, float]


class Clock:
    """Times the steps of a training, without the first: it warms up."""

    def __init__(self) -> None:
        self.first = self.last = 0.0
        self.steps = 0

    def tick(self) -> None:
        """Note that a step has ended."""
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.steps += 1

    def figures(self, tokens: float) -> Figures:
        """Return real tokens/s, seconds a step, and the peak of the process's memory, in MiB."""
        seconds = (self.last - self.first) / (self.steps - 1)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return {"tokens/s": tokens / self.steps / seconds, "s/step": seconds, "MiB": memory}


def call(python: str, script: str, side: str, options: Mapping[str, Any]) -> Figures:
    """Run a side of a script with some options, and return the JSON of its last line."""
    words = [python, script, "--side", side, "--options", json.dumps(options, default=str)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    found: Figures = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def tuned(sides: Sequence[str], micros: Sequence[int], trial: Callable[[str, int], Figures]) -> dict[str, int]:
    """Return the micro-batch that each side is fastest with."""
    best = {}
    for side in sides:
        rates = {micro: trial(side, micro)["tokens/s"] for micro in micros}
        best[side] = max(rates, key=rates.__getitem__)
        told = ", ".join(f"{micro}: {rate:,.0f}" for micro, rate in rates.items())
        print(f"{side:16} tokens/s by micro-batch: {told}; takes {best[side]}", flush=True)
    return best


def compare(sides: Sequence[str], repeats: int, measure: Callable[[str, int], Figures]) -> None:
    """Measure the sides in turns, and print the medians of both and of the ratios, ours (the first) to the other's."""
    found: dict[str, list[Figures]] = {side: [] for side in sides}
    for repeat in range(repeats):
        for side in sides if repeat % 2 == 0 else reversed(sides):
            figures = measure(side, repeat)
            found[side].append(figures)
            print(f"{side:16} " + "  ".join(f"{k} {v:,.4g}" for k, v in figures.items()), flush=True)
    ours, theirs = sides
    print(f"\n{'median of ' + str(repeats):16}" + "".join(f"{name:>16}" for name in (*sides, "ratio")))
    for key in found[ours][0]:
        medians = [statistics.median(f[key] for f in found[side]) for side in sides]
        ratio = statistics.median(a[key] / b[key] for a, b in zip(found[ours], found[theirs], strict=True))
        print(f"{key:16}{medians[0]:>16,.4g}{medians[1]:>16,.4g}{ratio:>16.3f}")
