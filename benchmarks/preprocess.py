"""Preprocessing of prompt/completion rows: rows in a second, memory, and what a second start takes.

    python benchmarks/preprocess.py ROWS.jsonl --rows 1000000 [--tokenizer FOLDER] [--seq-len 512] [--packing]

Makes so many rows of those that are given, each with a number of its own, and prepares them for training twice, each
time in a new process: first tokenised, then from the cache. Without `--tokenizer`, a byte-level BPE of 8,192 tokens is
trained on 3,000 rows before. `anonymous` is what the process holds beside mapped files: when all is imported, and at
its peak.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from itertools import cycle, islice
from pathlib import Path


def make(rows: Path, count: int, out: Path) -> None:
    with rows.open() as given, out.open("w") as file:
        for i, row in enumerate(islice(cycle(map(json.loads, given)), count)):
            changed = {"prompt": f"{row['prompt']}\n\n({i})", "completion": row["completion"]}
            file.write(json.dumps(changed, ensure_ascii=False) + "\n")


def memory() -> dict[str, float]:
    """Return what this process holds, in MiB."""
    fields = (line.partition(":")[::2] for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(value.split()[0]) / 1024 for name, value in fields if name in ("RssAnon", "VmHWM")}


def follow(peak: dict[str, float]) -> None:
    while True:
        for name, value in memory().items():
            peak[name] = max(peak.get(name, 0.0), value)
        time.sleep(0.01)


def prepare(rows: Path, tokenizer: Path, seq_len: int, packing: bool) -> None:
    from scaletrain.assemble import prepare
    from scaletrain.config import Recipe
    from scaletrain.inspection import inspected
    from scaletrain.recipe import objective_of

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    recipe = Recipe.model_validate(
        {
            "objective": {"type": "causal_lm", "tokenizer": {"path": str(tokenizer)}, "max_lost": 1.0},
            "networks": {"model": {"config": {"model_type": "llama", "max_position_embeddings": seq_len, **sizes}}},
            "data": {"train": str(rows), "seq_len": seq_len, "packing": packing},
        }
    )
    objective = objective_of(recipe)
    import transformers.models.llama  # noqa: F401  # imports are no part of what is measured

    before, peak = memory()["RssAnon"], dict[str, float]()
    threading.Thread(target=follow, args=(peak,), daemon=True).start()
    began = time.perf_counter()
    data = prepare(objective, recipe)
    seconds = time.perf_counter() - began
    for _, found in inspected(objective, data):
        print("\n".join(f"  {line}" for line in found.lines), file=sys.stderr)
    contract = time.perf_counter() - began - seconds
    time.sleep(0.1)
    print(json.dumps({"seconds": seconds, "contract": contract, "before": before, **peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--made", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.made:
        prepare(given.file, given.tokenizer, given.seq_len, given.packing)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["SCALETRAIN_CACHE"] = str(folder / "cache")
        if given.tokenizer is None:
            from scaletrain.data.tokenizers import train_tokenizer

            given.tokenizer = folder / "tokenizer"
            lines = islice(given.file.open(), 3000)
            texts = ("\n".join(json.loads(line)[key] for key in ("prompt", "completion")) for line in lines)
            train_tokenizer(texts, 8192, str(given.file)).save_pretrained(given.tokenizer)
        made = folder / "rows.jsonl"
        make(given.file, given.rows, made)
        print(f"{given.rows:,} rows, {made.stat().st_size / 2**20:,.0f} MiB, {os.cpu_count()} cores")
        command = [sys.executable, __file__, str(made), "--made", "--tokenizer", str(given.tokenizer)]
        command += ["--seq-len", str(given.seq_len), *(["--packing"] if given.packing else [])]
        for start in ("first", "second"):
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            found = json.loads(done.stdout)
            print(
                f"{start:6} start: {found['seconds']:7.1f} s ({given.rows / found['seconds']:,.0f} rows/s), contract "
                f"{found['contract']:.1f} s, peak {found['VmHWM']:,.0f} MiB, anonymous {found['before']:,.0f} to "
                f"{found['RssAnon']:,.0f} MiB"
            )


if __name__ == "__main__":
    main()
