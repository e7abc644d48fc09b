"""Time and memory of the cross-entropy of a language model's head: whole logits against a part of them at a time.

Forward and backward pass from the last hidden states, with gradients of these and of the matrix. plain: F.cross_entropy
of the head's logits; ours: scaletrain.networks.heads. Memory is the highest resident size of a process of its own
(Linux counts it), less that before the pass; times are the median over pairs of passes that alternate.

    python benchmarks/cross_entropy.py [--pairs 5] [--places 2048] [--hidden 512 1024] [--vocabulary 32000 128000]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from scaletrain.networks.heads import CrossEntropy, Head

MB = 1 << 20


def passes(places: int, width: int, vocabulary: int, dtype: torch.dtype) -> dict[str, Callable[[], float]]:
    """Return, for each way, what makes a forward and a backward pass and returns the loss."""
    torch.manual_seed(0)
    head = Head(width, vocabulary, bias=False)
    hidden = torch.randn(places, width, requires_grad=True)
    targets = torch.randint(vocabulary, (places,))

    def finish(loss: torch.Tensor) -> float:
        (loss / places).backward()
        hidden.grad = head.weight.grad = None
        return float(loss.detach()) / places

    def plain() -> float:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(head(hidden).float(), targets, reduction="sum")
        return finish(loss)

    def ours() -> float:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = head(hidden, CrossEntropy(), (targets,))[0]
        return finish(loss)

    return {"plain": plain, "ours": ours}


def memory(way: str, *sizes: int, dtype: torch.dtype) -> None:
    """Print the bytes that a pass takes above what was there before, and its loss."""
    run = passes(*sizes, dtype)[way]
    passes(64, 64, 64, dtype)[way]()  # loads what is loaded once
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the highest size begins anew
    before = resident("VmRSS")
    loss = run()
    print(resident("VmHWM") - before, loss)


def resident(name: str) -> int:
    """Return a size of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) << 10


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--places", type=int, default=2048)
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32_000, 128_000])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    dtype: torch.dtype = getattr(torch, options.dtype)
    if options.memory:
        memory(options.memory, options.places, options.hidden[0], options.vocabulary[0], dtype=dtype)
        return
    print("| vocabulary | hidden | places | plain s | ours s | time | plain MB | ours MB | memory |")
    print("|---" * 9 + "|")
    for vocabulary in options.vocabulary:
        for width in options.hidden:
            sizes = ["--places", options.places, "--hidden", width, "--vocabulary", vocabulary]
            taken = {}
            for way in ("plain", "ours"):
                words = [sys.executable, __file__, "--memory", way, "--dtype", options.dtype, *map(str, sizes)]
                taken[way], _ = map(float, subprocess.check_output(words, text=True).split())
            both = passes(options.places, width, vocabulary, dtype)
            times: dict[str, list[float]] = {way: [] for way in both}
            for _ in range(options.pairs):
                for way, run in both.items():
                    begun = time.perf_counter()
                    run()
                    times[way].append(time.perf_counter() - begun)
            ratio = statistics.median(b / a for a, b in zip(times["plain"], times["ours"], strict=True))
            a, b = (statistics.median(t) for t in times.values())
            print(
                f"| {vocabulary:,} | {width} | {options.places:,} | {a:.2f} | {b:.2f} | {ratio:.2f} x "
                f"| {taken['plain'] / MB:,.0f} | {taken['ours'] / MB:,.0f} | {taken['ours'] / taken['plain']:.2f} x |",
                flush=True,
            )


if __name__ == "__main__":
    main()
