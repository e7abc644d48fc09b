"""metrics.jsonl: one JSON object for each logged step and each evaluation, and the curves drawn from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from scaletrain.callbacks.base import Observer, Plan


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a metrics file; a last line that a kill cut short is left out."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return


def rewind(path: Path, step: int) -> None:
    """Drop the records after `step`: steps that will be taken again, so that each stands in the file once."""
    if path.exists():
        kept = [json.dumps(record) for record in read(path) if record["step"] <= step]
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_text("".join(line + "\n" for line in kept))
        temporary.replace(path)


class MetricsLog(Observer):
    """Appends to metrics.jsonl; draws the curves when a run ends."""

    def __init__(self, path: Path):
        self.path = path
        self._file: IO[str] | None = None

    def _write(self, record: Mapping[str, Any]) -> None:
        if self._file is None:
            self._file = self.path.open("a")
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def begin(self, plan: Plan) -> None:
        """Forget the file handle: a rewind may have replaced the file."""
        self.end()

    def step(self, step: int, record: Mapping[str, Any] | None) -> None:
        """Write a line."""
        if record:
            self._write(record)

    def evaluated(self, step: int, record: Mapping[str, Any]) -> None:
        """Write a line."""
        self._write(record)

    def noted(self, step: int, record: Mapping[str, Any]) -> None:
        """Write a line; a rewind may have replaced the file."""
        self.end()
        self._write(record)

    def end(self) -> None:
        """Close."""
        if self._file:
            self._file.close()
            self._file = None


def draw(metrics: Path, picture: Path) -> None:
    """Draw losses and evaluation metrics against the step, a panel for each name, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for record in read(metrics):
        kind = "evaluation" if record["kind"] == "evaluate" else "training"
        for name, value in record.items():
            known = name.rpartition("/")[2] in ("loss", "grad_norm", "lr") or kind == "evaluation"
            if known and isinstance(value, (int, float)) and name not in ("step", "stage_step", "seconds"):
                xs, ys = curves.setdefault(name, {}).setdefault(kind, ([], []))
                xs.append(record["step"])
                ys.append(value)
    if not curves:
        return
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(5 * columns, 3.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (name, kinds) in enumerate(curves.items()):
        axes = figure.add_subplot(rows, columns, number + 1)
        for kind, (xs, ys) in kinds.items():
            axes.plot(xs, ys, label=kind, marker="o" if len(xs) < 30 else None, markersize=3, linewidth=1.2)
        values = [y for _, ys in kinds.values() for y in ys]
        if min(values) > 0 and max(values) > 30 * min(values):
            axes.set_yscale("log")
        axes.set_title(name)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if len(kinds) > 1:
            axes.legend()
    figure.savefig(picture, dpi=110)
