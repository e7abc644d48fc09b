"""Half of an encoder's layers, finetuned with and without a finetuned teacher: accuracy over seeds.

The teacher is the whole encoder, finetuned once. Each student is made of the same layers of the pretrained encoder and
sees the same rows in the same order; only the loss differs. Every run is a process of its own.

    python benchmarks/distill_text.py ENCODER TRAIN.jsonl EVAL.jsonl [--seeds 3] [--layers 1,3,5] [--epochs 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path


def run(recipe: str, name: str, root: Path, changes: list[str]) -> dict[str, float]:
    """Train in a process of its own, or go on with what is there. Returns its last evaluation."""
    command = [sys.executable, "-m", "scaletrain", "run", recipe, *changes, "--run", name, "--root", str(root)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if r["kind"] == "evaluate"][-1]


def main() -> None:
    """Train the teacher, then the students, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("eval", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--layers", default="1,3,5", help="of the encoder, that the student keeps")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--alpha", type=float, default=0.9)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--hidden", type=float, default=0.0)
    parser.add_argument("--rows", type=int, help="take the first so many, to try it")
    parser.add_argument("--root", type=Path, default=Path("checkpoints/distill-text"))
    options = parser.parse_args()
    rows = {"rows": options.rows} if options.rows else {}
    common = [
        f"data.train={json.dumps({'path': str(options.train), **rows})}",
        f"data.eval={json.dumps({'path': str(options.eval), **rows})}",
        f"train.duration={options.epochs:g} epochs",
    ]
    players = f"{{optimizer: {{type: adamw, lr: {options.lr}, weight_decay: 0.01}}, clip: 1.0, "
    players += "schedule: {type: linear, warmup_share: 0.1}}"
    plain = [*common, "networks.model.adapter=null", f"networks.model.path={options.encoder}"]
    plain += [f"players.model={players}", "train.global_batch=16"]
    teacher = run("text/classify", "teacher", options.root, plain)
    print(f"teacher: accuracy {teacher['accuracy']:.4f}")

    layers = f"[{options.layers}]"
    taught = [
        *common, f"players.student={players}", f"networks.student.path={options.encoder}",
        f"networks.student.config.layers={layers}", f"networks.teacher.from=run:{options.root / 'teacher'}/model",
        f"objective.alpha={options.alpha}", f"objective.temperature={options.temperature}",
        f"objective.hidden={options.hidden}",
    ]  # fmt: skip
    found: dict[str, list[float]] = {"alone": [], "taught": []}
    for seed in range(options.seeds):
        alone = [*plain, f"networks.model.config.layers={layers}", f"seed={seed}"]
        found["alone"].append(run("text/classify", f"alone-{seed}", options.root, alone)["accuracy"])
        last = run("text/distill", f"taught-{seed}", options.root, [*taught, f"seed={seed}"])
        found["taught"].append(last["accuracy"])
        print(f"seed {seed}: alone {found['alone'][-1]:.4f}, taught {last['accuracy']:.4f}"
              f" (agrees with the teacher in {last['agreement']:.4f})")  # fmt: skip
    print("| student | mean | lowest | highest |\n|---|---|---|---|")
    for name, scores in found.items():
        print(f"| {name} | {statistics.mean(scores):.4f} | {min(scores):.4f} | {max(scores):.4f} |")
    print(f"lowest taught - highest alone: {min(found['taught']) - max(found['alone']):+.4f}")


if __name__ == "__main__":
    main()
