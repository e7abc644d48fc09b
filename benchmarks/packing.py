"""Real tokens per second of packed against padded batches, through the loop, on prompts with completions.

Both train the same tiny Llama on the same rows; runs alternate, and the figure is the median over the pairs.

    python benchmarks/packing.py FILE.jsonl [--pairs 3] [--steps 30] [--length 512] [--batch 16]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaletrain.callbacks.base import Observer


class Rates(Observer):
    """Collects throughputs."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def step(self, step: int, record: Mapping[str, Any] | None) -> None:
        """Note the throughput of a logged step."""
        if record:
            self.rates.append(record["throughput"])


def rate(data: Path, folder: Path, packed: bool, options: argparse.Namespace, number: int) -> float:
    """Train for some steps. Returns real tokens/s, the median over intervals without the first."""
    from scaletrain.recipe import load
    from scaletrain.runs import train

    network = {"model_type": "llama", "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4}
    recipe = {
        "objective": {"type": "causal_lm", "tokenizer": {"vocab_size": 4096}},
        "networks": {
            "model": {"config": {**network, "num_attention_heads": 4, "max_position_embeddings": options.length}}
        },
        "data": {"train": str(data), "seq_len": options.length, "packing": packed},
        "train": {"duration": f"{options.steps} steps", "global_batch": options.batch // (4 if packed else 1)},
        "checkpoint": {"every": "1_000_000 steps"},
        "evaluate": {"samples": 0},
        "log": {"every": 5},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    rates = Rates()
    train(load(str(path)), f"{'packed' if packed else 'padded'}-{number}", folder, observers=[rates])
    return statistics.median(rates.rates[1:])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    for name, default in {"pairs": 3, "steps": 30, "length": 512, "batch": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.pairs):
            padded, packed = (rate(options.data, Path(folder), p, options, number) for p in (False, True))
            pairs.append((packed, padded))
            print(
                f"pair {number + 1}: packed {packed:,.0f}, padded {padded:,.0f} real tokens/s, {packed / padded:.2f} x"
            )
    print(f"packed / padded: {statistics.median(a / b for a, b in pairs):.2f} x (median of {len(pairs)})")


if __name__ == "__main__":
    main()
