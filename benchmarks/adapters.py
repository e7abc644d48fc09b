"""Accuracy, trained share, step time and peak memory of every way to finetune a classifier, from text/classify.

Each setting trains in a process of its own, by `scaletrain run`, on the same rows in the same order.

    python benchmarks/adapters.py MODEL TRAIN DEV [--epochs 3] [--settings full lora ...] [--train-also pooler]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def settings(r: int, alpha: float, lr: float) -> dict[str, dict[str, object]]:
    """Return what each setting changes of the recipe. Rates were searched for with full finetuning and LoRA only: 1e-4
    for all weights, 3e-3 for (IA)³, which has few; LoRA+ has a fifth of LoRA's for A, and 16 times that for B.
    """
    lora = {"type": "lora", "r": r, "alpha": alpha}
    rate = "players.model.optimizer.lr"
    return {
        "full": {"networks.model.adapter": None, rate: 1e-4},
        "lora": {"networks.model.adapter": lora, rate: lr},
        "qlora-4": {
            "networks.model.adapter": lora,
            "networks.model.quantize": {"type": "nf4", "double": True},
            rate: lr,
        },
        "qlora-8": {"networks.model.adapter": lora, "networks.model.quantize": "int8", rate: lr},
        "rslora": {"networks.model.adapter": {"type": "rslora", "r": r, "alpha": alpha / r**0.5}, rate: lr},
        "pissa": {"networks.model.adapter": {"type": "pissa", "r": r, "alpha": r}, rate: lr},
        "lora+": {
            "networks.model.adapter": lora,
            rate: lr / 5,
            "players.model.optimizer.groups": [{"match": "lora_B", "lr_factor": 16}],
        },
        "dora": {"networks.model.adapter": {"type": "dora", "r": r, "alpha": alpha}, rate: lr},
        "ia3": {"networks.model.adapter": {"type": "ia3"}, rate: 3e-3},
    }


def measure(name: str, options: argparse.Namespace, root: Path) -> list[str]:
    """Train with one setting. Returns its line: the best accuracy of all evaluations, two an epoch, that at the end,
    trained share, seconds of a step, peak memory.
    """
    changes = {
        "networks.model.path": options.model,
        "data.train": options.train,
        "data.eval": options.dev,
        "train.duration": f"{options.epochs} epochs",
        "checkpoint.every": "1_000_000 steps",
        "evaluate.every": "0.5 epochs",
        **settings(options.r, options.alpha, options.lr)[name],
    }
    adapter = changes["networks.model.adapter"]
    if isinstance(adapter, dict) and options.train_also:
        changes["networks.model.adapter"] = {**adapter, "train_also": options.train_also}
    words = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    command = [sys.executable, "-m", "scaletrain", "run", "text/classify", *words, *options.override]
    with (root / f"{name}.txt").open("w") as out:
        process = subprocess.Popen([*command, "--root", root, "--run", name], stdout=out, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
    text = (root / f"{name}.txt").read_text()
    if status:
        raise SystemExit(f"{name}: {text[-2000:]}")
    records = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    told = [record["accuracy"] for record in records if record["kind"] == "evaluate"]
    rates = [record["throughput"] for record in records if "throughput" in record][1:]
    batch = re.search(r"global batch\s+(\d+)", text)
    share = re.search(r"trained \S+ \((\S+)\)", text)
    assert batch
    assert share
    seconds = int(batch.group(1)) / statistics.median(rates)
    memory = f"{used.ru_maxrss / 1024:,.0f}"
    return [name, f"{max(told):.4f}", f"{told[-1]:.4f}", share.group(1), f"{seconds:.3f}", memory]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "train", "dev"):
        parser.add_argument(name)
    parser.add_argument("--epochs", type=int, default=3)
    for name, value in {"r": 64, "alpha": 64.0, "lr": 5e-4}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help="of LoRA")
    known = list(settings(64, 64.0, 5e-4))
    parser.add_argument("--settings", nargs="+", choices=known, default=known)
    parser.add_argument("--train-also", nargs="*", default=[], help="modules that every adapter trains whole")
    parser.add_argument("--override", nargs="*", default=[], help="further keys of the recipe, such as seed=1")
    options = parser.parse_args()
    print("| setting | best | at the end | trained | s a step | peak MiB |\n|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.settings:
            print(f"| {' | '.join(measure(name, options, Path(folder)))} |", flush=True)


if __name__ == "__main__":
    main()
