"""A plan as text and as values for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from scaletrain.callbacks.progress import describe, quantity
from scaletrain.planning.plan import RESERVED, Needs


def as_text(needs: Needs) -> str:
    """Return the arithmetic of a stage, a table of one process's memory, and what fits."""
    memory, way = needs.memory, needs.way
    lines = describe(needs.plan).splitlines()
    lines = [line for line in lines if not line.startswith("  memory ")]
    seen = ", ".join(f"{quantity(count)} {unit}" for unit, count in needs.seen.items())
    hours = "" if needs.hours is None else f": {needs.hours:,.3g} hours"
    lines.append(f"  trained on    {seen}{hours}")
    held = f"{way.engine}{', offloaded' if way.offload else ''}"
    lines.append(f"memory of one process of {way.processes}, {held}")
    rows = [(kind, size) for kind, size in memory.kinds.items() if size]
    if needs.unknown:
        rows = [row for row in rows if row[0] != "activations"]
    largest, shape, dtype = memory.largest
    for kind, size in rows:
        note = f"   the largest is {'x'.join(map(str, shape))} {dtype}, {quantity(largest, 'B')}"
        lines.append(f"  {kind:14}{quantity(size, 'B'):>8}{note if kind == 'activations' and shape else ''}")
    if needs.unknown:
        lines.append(f"  activations   not known: `{needs.unknown}` depends on values, which there are none of")
    else:
        lines += [
            f"  peak: a step  {quantity(memory.step, 'B'):>8}",
            f"        a save  {quantity(memory.save, 'B'):>8}",
        ]
        if needs.plan.eval_examples:
            lines.append(f"  an evaluation {quantity(memory.evaluation, 'B'):>8}")
    if memory.host:
        where = "besides, in host memory" if way.cuda else "of which copies to save from"
        lines.append(f"  {where}: {quantity(memory.host, 'B')}")
    return "\n".join([*lines, *_verdict(needs)])


def _verdict(needs: Needs) -> list[str]:
    if needs.usable is None or needs.unknown:
        return []
    kept = f" ({RESERVED:.0%} of the device is left to libraries and gaps)" if needs.way.cuda else ""
    peak, usable = quantity(needs.memory.peak, "B"), quantity(needs.usable, "B")
    head = f"{'fits' if needs.fits else 'does not fit'}: {peak} of {usable}{kept}"
    if needs.best is not None:
        return [head, f"the largest micro-batch that fits: train.micro_batch={needs.best}"]
    if needs.advice:
        return [head, f"no micro-batch fits; this would: {' '.join(needs.advice)}"]
    return [head, "no micro-batch fits, nor with any setting: take a larger device or a smaller network"]


def as_values(needs: Needs) -> dict[str, Any]:
    """Return everything, in bytes."""
    return {**asdict(needs), "fits": needs.fits, "peak": needs.memory.peak}
