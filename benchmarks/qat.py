"""Perplexity of a language model in int4: rounded after training, against trained for it.

A network is pretrained, then trained on for the same steps in float and with its weights rounded; both are quantised
and evaluated from what was written. Everything goes through `scaletrain`, in processes of its own.

    python benchmarks/qat.py data.txt held.txt --group 32
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

SIZE = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 4}


def call(*words: object) -> str:
    """Run a command. Raises CalledProcessError, with what it printed, when it fails."""
    done = subprocess.run([sys.executable, "-m", "scaletrain", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr)
    done.check_returncode()
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train")
    parser.add_argument("held", help="text to evaluate on")
    parser.add_argument("--steps", type=int, default=400, help="of pretraining")
    parser.add_argument("--more", type=int, default=200, help="steps of training on")
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--root", type=Path, default=Path("checkpoints/qat"))
    options = parser.parse_args()
    data = [f"data.train={options.train}", f"data.eval={options.held}", "data.seq_len=128", "evaluate.samples=0"]
    place = ["--root", options.root]

    def quantised(run: str) -> dict[str, str]:
        out = options.root / f"{run}-int4-{options.group}"
        text = call("quantize", options.root / run, out, "--method", "int4", "--group", options.group)
        return dict(
            zip(("before", "after"), re.findall(r"^perplexity +(\S+) +(\S+)", text, re.MULTILINE)[0], strict=True)
        )

    rows = []
    for seed in range(options.seeds):
        config = [f"networks.model.config.{key}={value}" for key, value in SIZE.items()]
        steps = f"train.duration={options.steps} steps"
        words = [*data, *config, "objective.tokenizer.vocab_size=1024", steps, f"seed={seed}"]
        call("run", "lm/pretrain", *words, "--run", f"pre-{seed}", *place)
        source = f"networks.model.from=run:{options.root}/pre-{seed}/model"
        more = ["networks.model.path=null", source, f"train.duration={options.more} steps", f"seed={seed}"]
        tokenizer = f"objective.tokenizer.path={options.root}/pre-{seed}/latest/networks/model"
        for name, qat in (("float", "null"), ("qat", f"{{type: int4, group: {options.group}}}")):
            words = [*data, *more, tokenizer, f"networks.model.qat={qat}", "--run", f"{name}-{seed}", *place]
            call("run", "lm/qat", *words)
        plain, trained = quantised(f"float-{seed}"), quantised(f"qat-{seed}")
        rows.append({"seed": seed, "fp32": plain["before"], "PTQ int4": plain["after"], "QAT int4": trained["after"]})
    print(json.dumps(rows, indent=2))
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for row in rows:
        print("| " + " | ".join(str(row[name]) for name in names) + " |")


if __name__ == "__main__":
    main()
