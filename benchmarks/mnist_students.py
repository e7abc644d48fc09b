"""A diffusion teacher of MNIST and few-step students of it, judged by LeNet-5: one table, and pictures beside it.

Every run is a process of its own, and goes on where it was killed. What a student is compared by, and its pictures from
the teacher's noise, stand in its run folder, too (steps.json, samples/).

    python benchmarks/mnist_students.py mnist/train.parquet mnist/test.parquet [--students consistency progressive]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

TEACHER = [
    "objective={type: diffusion, path: cosine, prediction: v, weighting: min_snr, solver: dpmpp_2m, steps: 32, "
    "condition: label, dropped: 0.1}",
    "networks.model.config={patch: 2, features: [48, 96], middle: 2}",
    "players.model.ema={decay: 0.995}",
    "train.global_batch=128",
    "train.duration=1700 steps",
]
STUDENTS: dict[str, tuple[str, list[str]]] = {
    "consistency": (
        "",
        [
            "objective={type: consistency, intervals: {type: even, count: 4, on_grid: 0.6}, solver_steps: 4}",
            "players.student.optimizer.lr=4e-4",
            "players.student.ema={decay: 0.99}",
            "train.duration=700 steps",
        ],
    ),
    "progressive": (
        "stages.steps-8.",
        [
            "stages.steps-8.train.duration=150 steps",
            "stages.steps-4.train.duration=400 steps",
            "stages.steps-2.train.duration=250 steps",
            "stages.steps-1.train.duration=250 steps",
        ],
    ),
    "lcm": (
        "",
        [
            "objective.scales=[1.0, 3.0]",
            "objective.guidance=1.5",
            "objective.intervals={type: even, count: 4, on_grid: 0.6}",
            "objective.solver_steps=2",
            "players.student.optimizer.lr=4e-4",
            "players.student.ema={decay: 0.99}",
            "train.duration=650 steps",
        ],
    ),
    "dmd2": (
        "",
        [
            "objective={type: dmd2, steps: 4, every: 2, weighting: min_snr, "
            "times: {type: log_normal, mean: -0.4, std: 1.4}}",
            "players.critic=null",
            "players.student.optimizer.lr=4e-4",
            "players.fake_score.optimizer.lr=8e-4",
            "train.duration=900 steps",
        ],
    ),
}
COLUMNS = {"frechet": "{:.2f}", "confident": "{:.1%}", "entropy": "{:.3f}", "rmse_to_teacher": "{:.3f}"}


def run(recipe: str, name: str, options: argparse.Namespace, changes: list[str]) -> float:
    """Train in a process of its own, or go on with what is there. Returns the seconds that it took."""
    summary = options.root / name / "summary.json"
    if summary.exists() and json.loads(summary.read_text())["status"] == "done":
        return 0.0
    data = [f"data.train={options.train}", f"data.eval={options.eval}", "data.holdout=null"]
    command = [sys.executable, "-m", "scaletrain", "run", recipe, *changes, *data, *options.override]
    begun = time.perf_counter()
    subprocess.run([*command, "--run", name, "--root", str(options.root)], check=True)
    return time.perf_counter() - begun


def main() -> None:
    """Train what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("eval", type=Path)
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--root", type=Path, default=Path("checkpoints/mnist-students"))
    parser.add_argument("--override", nargs="*", default=[], help="for all runs")
    options = parser.parse_args()
    took = {"judge": run("vision/cnn", "lenet", options, [])}
    took["teacher"] = run("diffusion/ddpm", "teacher", options, [*TEACHER, "train.precision=bf16"])
    for name in options.students:
        first, changes = STUDENTS[name]
        teacher = f"run:{options.root / 'teacher'}/model"
        given = [f"{first}networks.{network}.from={teacher}" for network in ("teacher", "student")]
        judged = [f"objective.judge=run:{options.root / 'lenet'}/model", "train.precision=bf16"]
        judged += ["objective.compare_samples=2000", "evaluate={batch: 250, samples: 0}"]
        took[name] = run(f"distill/{name}", name, options, [*changes, *given, *judged])
    print("seconds:", {name: round(seconds) for name, seconds in took.items()})
    print("| | " + " | ".join(COLUMNS) + " |\n|---" * 1 + "|---" * len(COLUMNS) + "|")
    for name in options.students:
        table = json.loads((options.root / name / "steps.json").read_text())
        rows = [("real", table["floor"])]
        rows += [(f"teacher, {n}", figures) for n, figures in table["teacher"].items()]
        rows += [(f"{name}, {n}", figures) for n, figures in table["student"].items()]
        for title, figures in rows:
            cells = (form.format(figures[key]) if key in figures else "" for key, form in COLUMNS.items())
            print(f"| {title} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
