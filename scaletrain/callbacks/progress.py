"""What a person sees while a run goes on: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from scaletrain.callbacks.base import Observer, Plan
from scaletrain.evaluation import of_source


def quantity(value: float, unit: str = "") -> str:
    """Write a number in three digits: 950, 12.3k, 1.20M, 7.00G."""
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{letter}{unit}"
    return f"{value:.3g}{unit}"


def clock(seconds: float) -> str:
    """Write a duration as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def table(metrics: Mapping[str, float], sources: Sequence[str]) -> str:
    """Write a line for each metric, with what it is of all rows and of those of each source; empty without sources."""
    if not sources:
        return ""
    columns = {name: [of_source(name, source) for source in sources] for name in metrics}
    own = {name for names in columns.values() for name in names}
    rows = [("", "all", *sources)]
    rows += [
        (name, *(f"{metrics[n]:.4g}" if n in metrics else "" for n in (name, *columns[name])))
        for name in metrics
        if name not in own
    ]
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(
        f"  {name:{first}}  " + "  ".join(f"{v:>{w}}" for v, w in zip(values, widths, strict=True))
        for name, *values in rows
    )


def describe(plan: Plan) -> str:
    """Tell what was derived: the arithmetic of a stage before it starts."""
    kinds = [f"{kind} {quantity(size, 'B')}" for kind, size in plan.bytes.items() if size]
    share = 100 * plan.trainable / max(plan.parameters, 1)
    batch = plan.micro_batch * plan.accumulate * plan.processes
    cut = f"{plan.micro_batch} micro x {plan.accumulate} accumulate x {plan.processes} processes"
    epochs = plan.steps * batch / max(plan.train_examples, 1)
    count = "rows, read as they are needed" if plan.streamed else f"examples, {epochs:.3g} epochs"
    held = f"; {plan.eval_examples:,} for evaluation" if plan.eval_examples else ""
    number = plan.stages.index(plan.stage) + 1
    title = f"stage {plan.stage} ({number} of {len(plan.stages)})" if len(plan.stages) > 1 else "training"
    lines = [
        f"{title}: {plan.steps:,} steps on {plan.processes} x {plan.device}, {plan.precision}",
        f"  parameters    {quantity(plan.parameters)}, trained {quantity(plan.trainable)} ({share:.3g}%)",
        f"  global batch  {batch} = {cut}",
        f"  data          {plan.train_examples:,} {count}{held}",
        f"  memory        {' + '.join(kinds)}, and activations, on each process",
    ]
    if plan.at:
        lines.append(f"  resumed       at step {plan.at:,} of {plan.steps:,}")
    return "\n".join(lines)


class Progress(Observer):
    """The live line (rewritten at most ten times a second), or a plain line for each logged step."""

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self._shown = 0.0
        self._width = 0
        self._record: Mapping[str, Any] = {}
        self._plan: Plan | None = None

    def begin(self, plan: Plan) -> None:
        """Print the plan."""
        self._plan, self._record = plan, {}
        self._began = time.monotonic()
        self.say(describe(plan))

    def step(self, step: int, record: Mapping[str, Any] | None) -> None:
        """Show the newest figures."""
        if record:
            self._record = record
        now = time.monotonic()
        if self.live and now - self._shown > 0.1:
            self._shown = now
            line = self._line(step)
            self.stream.write("\r" + line.ljust(self._width))
            self.stream.flush()
            self._width = len(line)
        elif record and not self.live and (now - self._shown > 5 or self._done(step)):
            self._shown = now
            self.stream.write(self._line(step) + "\n")
            self.stream.flush()

    def _done(self, step: int) -> bool:
        return self._plan is not None and step - self._plan.first_step == self._plan.steps

    def _line(self, step: int) -> str:
        assert self._plan is not None
        plan, record = self._plan, self._record
        here = step - plan.first_step
        taken = here - plan.at
        left = (time.monotonic() - self._began) / max(taken, 1) * (plan.steps - here)
        parts = [f"{plan.stage} {here:,}/{plan.steps:,}"]
        parts += [f"{k} {record[k]:.4g}" for k in record if k.rpartition("/")[2] == "loss"]
        if "lr" in record:
            parts.append(f"lr {record['lr']:.3g}")
        if "throughput" in record:
            parts.append(f"{quantity(record['throughput'])} {plan.unit}/s")
        if "mfu" in record:
            parts.append(f"MFU {100 * record['mfu']:.1f}%")
        parts.append(f"ETA {clock(left)}")
        return "  ".join(parts)

    def evaluated(self, step: int, record: Mapping[str, Any]) -> None:
        """Print the metrics."""
        skip = ("step", "stage_step")
        metrics = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k not in skip}
        by_source = table(metrics, self._plan.eval_sources if self._plan else ())
        figures = f"\n{by_source}" if by_source else " " + "  ".join(f"{k} {v:.4g}" for k, v in metrics.items())
        self.say(f"evaluation at step {step:,}:{figures}")

    def noted(self, step: int, record: Mapping[str, Any]) -> None:
        """Print what happened and why."""
        if record["kind"] == "rollback":
            self.say(f"rolled back to step {step:,}: {record['reason']} That window of the data is passed over.")
        else:
            self.say(f"update left out: {record['reason']}")

    def say(self, text: str) -> None:
        """Print above the live line."""
        if self.live and self._width:
            self.stream.write("\r" + " " * self._width + "\r")
            self._width = 0
        self.stream.write(text + "\n")
        self.stream.flush()

    def end(self) -> None:
        """Leave the cursor on a line of its own."""
        if self.live and self._width:
            self.stream.write("\n")
            self.stream.flush()
            self._width = 0
