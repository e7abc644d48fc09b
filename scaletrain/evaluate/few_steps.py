"""Samplers of few steps beside their teacher: one table, one file of figures, and pictures from the same noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scaletrain.evaluate.distances import energy_distance
from scaletrain.evaluate.judge import Judge
from scaletrain.objectives.base import Report, Samples

Sampler = Callable[[Tensor, int], Tensor]
"""(noise (N, C, H, W), steps) -> pictures (N, C, H, W) in [-1, 1]."""
Figures = dict[str, float]

_GRID = 64  # pictures in a sampler's own grid
_ROW = 16  # pictures in a sampler's row of the common grid


@dataclass(frozen=True)
class Real:
    """Pictures (N, C, H, W) in [-1, 1], and their classes (N,) where they are known."""

    images: Tensor
    labels: Tensor | None = None


def compare(
    teacher: Sampler,
    teacher_steps: int,
    students: Mapping[int, Sampler],
    also: Sequence[int],
    noise: Tensor,
    train: Real,
    held: Real,
) -> Report:
    """Judge a teacher at its own number of steps and at some others, and students by their number of steps.

    All start from the same noise (N, C, H, W). energy_distance: to the held-out pictures, unbiased, on values in
    [-1, 1]; its floor is what the training pictures score. confident, smallest_class: by a `Judge` of the training
    pictures, where they have labels. rmse_to_teacher: over all values, to the teacher's pictures at its own steps.
    """
    judge = None if train.labels is None else Judge(train.images, train.labels)

    def figures(images: Tensor) -> Figures:
        found = {"energy_distance": energy_distance(images, held.images)}
        if judge:
            found |= {"confident": judge.confident(images), "smallest_class": judge.smallest_class(images)}
        return found

    target = teacher(noise, teacher_steps)
    made: dict[str, dict[int, Tensor]] = {
        "teacher": {n: target if n == teacher_steps else teacher(noise, n) for n in sorted({*also, teacher_steps})},
        "student": {n: students[n](noise, n) for n in sorted(students)},
    }
    table: dict[str, Any] = {name: {str(n): figures(x) for n, x in by.items()} for name, by in made.items()}
    for name, n in ((name, n) for name, by in made.items() for n in by if (name, n) != ("teacher", teacher_steps)):
        table[name][str(n)]["rmse_to_teacher"] = _rmse(made[name][n], target)
    floor = figures(held.images) | {"energy_distance": energy_distance(train.images, held.images)}
    table = {"floor": floor, **table}
    return Report(text=_text(table, len(noise)), files={"steps.json": table}, pictures=_pictures(made, teacher_steps))


def _rmse(images: Tensor, target: Tensor) -> float:
    return float((images - target).square().mean().sqrt())


def _pictures(made: Mapping[str, Mapping[int, Tensor]], teacher_steps: int) -> dict[str, Samples]:
    """Return a grid of each sampler, and one with a row of each: in a column, all from the same noise."""
    names = [("teacher", teacher_steps), *(("student", n) for n in sorted(made["student"], reverse=True))]
    grids = {f"{name}-{n}-steps": Samples(images=(made[name][n][:_GRID] + 1) / 2, rows=8) for name, n in names}
    rows = torch.cat([made[name][n][:_ROW] for name, n in names])
    title = "same-noise-teacher-{}-student-{}".format(teacher_steps, "-".join(str(n) for _, n in names[1:]))
    return {**grids, title: Samples(images=(rows + 1) / 2, rows=min(_ROW, len(made["teacher"][teacher_steps])))}


_COLUMNS = {
    "energy_distance": ("energy distance", "{:.4f}"),
    "confident": ("over 90% sure", "{:.1%}"),
    "smallest_class": ("smallest class", "{:.1%}"),
    "rmse_to_teacher": ("RMSE to teacher", "{:.4f}"),
}


def _text(table: Mapping[str, Any], count: int) -> str:
    """Lay the figures out, teacher and student side by side at each number of steps."""
    columns = {key: column for key, column in _COLUMNS.items() if any(key in f for f in table["teacher"].values())}
    columns["rmse_to_teacher"] = _COLUMNS["rmse_to_teacher"]

    def cells(figures: Mapping[str, float]) -> str:
        return "".join(f"{form.format(figures[k]) if k in figures else '-':>17}" for k, (_, form) in columns.items())

    lines = [f"{'steps':>5} {'':<7}" + "".join(f"{title:>17}" for title, _ in columns.values())]
    for n in sorted({*table["teacher"], *table["student"]}, key=int):
        lines += [f"{n:>5} {who:<7}" + cells(table[who][n]) for who in ("teacher", "student") if n in table[who]]
    lines.append(f"{'':>5} {'real':<7}" + cells(table["floor"]))
    lines.append(f"{count} pictures each, from the same noise; real: energy distance between training and held-out.")
    return "\n".join(lines)
