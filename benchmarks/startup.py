"""How long `scaletrain --help` takes, as a share of `python -c "import torch"`.

python benchmarks/startup.py [--runs 7]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time


def seconds(command: list[str]) -> float:
    """Run a command once. Returns its wall time."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Measure in turn, after one warm-up each, and print the median of the pairs' ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    help_, torch = [sys.executable, "-m", "scaletrain", "--help"], [sys.executable, "-c", "import torch"]
    pairs = [(seconds(help_), seconds(torch)) for _ in range(runs + 1)][1:]
    ratio = statistics.median(a / b for a, b in pairs)
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"scaletrain --help {ours:.2f} s, import torch {theirs:.2f} s: ratio {ratio:.2f} (median of {runs} pairs)")


if __name__ == "__main__":
    main()
