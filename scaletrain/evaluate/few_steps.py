"""Samplers of few steps beside their teacher: one table, one file of figures, and samples from the same noise."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scaletrain.evaluate.judges import Judging
from scaletrain.objectives.base import Report, Samples

Sampler = Callable[[Tensor, int, Mapping[str, Tensor]], Tensor]
"""(noise (N, ...) of unit variance, steps, what is told of each by name) -> samples (N, ...)."""

_GRID = 64  # pictures in a sampler's own grid
_ROW = 16  # pictures in a sampler's row of the common grid
_POINTS = 4000  # of a sampler's own scatter plot


def compare(
    teacher: Sampler,
    teacher_steps: int,
    students: Mapping[int, Sampler],
    also: Sequence[int],
    noise: Tensor,
    told: Mapping[str, Tensor],
    judge: Judging,
    shown: Callable[[Tensor], Samples],
) -> Report:
    """Judge a teacher at its own number of steps and at some others, and students by their number of steps.

    All start from the same noise (N, ...). Besides the judge's figures, rmse_to_teacher: over all values, to the
    teacher's samples at its own steps; per_second: samples made in a second.
    """
    made: dict[str, dict[int, Tensor]] = {"teacher": {}, "student": {}}
    table: dict[str, Any] = {"floor": judge.floor(), "student": {}, "teacher": {}}

    def take(who: str, sampler: Sampler, steps: int) -> None:
        begun = _now(noise)
        made[who][steps] = samples = sampler(noise, steps, told)
        rate = len(noise) / (_now(noise) - begun)
        table[who][str(steps)] = judge.figures(samples, told) | {"per_second": rate}

    for n in sorted({*also, teacher_steps}):
        take("teacher", teacher, n)
    for n in sorted(students):
        take("student", students[n], n)
    target = made["teacher"][teacher_steps]
    for who, n in ((who, n) for who, by in made.items() for n in by if (who, n) != ("teacher", teacher_steps)):
        table[who][str(n)]["rmse_to_teacher"] = _rmse(made[who][n], target)
    text = _text(table, judge, len(noise))
    return Report(text=text, files={"steps.json": table}, pictures=_pictures(made, teacher_steps, shown))


def _now(like: Tensor) -> float:
    """Return the time, once the device has done what it was given."""
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.perf_counter()


def _rmse(samples: Tensor, target: Tensor) -> float:
    return float((samples - target).square().mean().sqrt())


def _pictures(
    made: Mapping[str, Mapping[int, Tensor]], teacher_steps: int, shown: Callable[[Tensor], Samples]
) -> dict[str, Samples]:
    """Return samples of each sampler, and of pictures, a grid with a row of each: in a column, from the same noise."""
    names = [("teacher", teacher_steps), *(("student", n) for n in sorted(made["student"], reverse=True))]
    if made["teacher"][teacher_steps].dim() == 2:
        return {f"{name}-{n}-steps": shown(made[name][n][:_POINTS]) for name, n in names}
    grids = {f"{name}-{n}-steps": _grid(shown(made[name][n][:_GRID]), 8) for name, n in names}
    rows = torch.cat([made[name][n][:_ROW] for name, n in names])
    title = "same-noise-teacher-{}-student-{}".format(teacher_steps, "-".join(str(n) for _, n in names[1:]))
    return {**grids, title: _grid(shown(rows), min(_ROW, len(made["teacher"][teacher_steps])))}


def _grid(samples: Samples, rows: int) -> Samples:
    return Samples(images=samples.images, rows=rows)


_OWN = {"rmse_to_teacher": ("RMSE to teacher", "{:.4f}"), "per_second": ("samples/s", "{:,.0f}")}


def _text(table: Mapping[str, Any], judge: Judging, count: int) -> str:
    """Lay the figures out, teacher and student side by side at each number of steps."""
    columns = {**judge.columns, **_OWN}

    def cells(figures: Mapping[str, float]) -> str:
        return "".join(f"{form.format(figures[k]) if k in figures else '-':>17}" for k, (_, form) in columns.items())

    lines = [f"{'steps':>5} {'':<7}" + "".join(f"{title:>17}" for title, _ in columns.values())]
    for n in sorted({*table["teacher"], *table["student"]}, key=int):
        lines += [f"{n:>5} {who:<7}" + cells(table[who][n]) for who in ("teacher", "student") if n in table[who]]
    lines.append(f"{'':>5} {'real':<7}" + cells(table["floor"]))
    lines.append(f"{count:,} samples each, from the same noise; {judge.about}")
    return "\n".join(lines)
