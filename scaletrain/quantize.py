"""Quantisation after training: what is written, and how good, large and fast it is against what was trained."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from scaletrain.engine.world import World
from scaletrain.errors import UserError
from scaletrain.evaluation import evaluate
from scaletrain.export.gate import Probe, probe
from scaletrain.export.plain import load, outputs
from scaletrain.export.run import Form, Written, export_run
from scaletrain.finished import FinishedStage


@dataclass(frozen=True)
class Figures:
    """What a form of the networks costs, and how good it is. Sizes in bytes."""

    metrics: Mapping[str, float]
    disk: int
    memory: int
    tokens_per_second: float


def quantize_run(
    folder: Path, destination: Path, form: Form, data: Sequence[str] | None = None
) -> tuple[list[Written], str]:
    """Export a run's networks quantised, adapters merged. Returns what was written, and a table of before and after.

    data: other files to evaluate on than the recipe's. Everything is computed on the CPU, in one process. Raises as
    `export_run` does, and UserError when there is nothing to evaluate on.
    """
    run = FinishedStage.open(folder)
    recipe = run.stage.recipe
    run.restore()
    held = run.held(data or ())
    if held is None:
        raise UserError("there is no evaluation data: give --data FILE, or data.eval in the recipe.")
    world = World(torch.device("cpu"))
    networks: dict[str, Any] = run.networks(world.device)
    written = export_run(folder, destination, form)
    kinds = {p.path: json.loads((p.path / "config.json").read_text()).get("architectures", [None])[0] for p in written}
    folders = {path.name: path for path, kind in kinds.items() if kind}
    asked = {name: probe(run, name, networks[name]) for name in folders}
    metrics = evaluate(run.objective, networks, held, recipe, world)
    whole = sum(_memory(networks[name]) for name in folders)
    before = Figures(metrics, whole, whole, _speed(networks, asked))
    for name, path in folders.items():
        networks[name] = load(str(path), kinds[path], None)[0].requires_grad_(False)
    metrics = evaluate(run.objective, networks, held, recipe, world)
    disk = sum(file.stat().st_size for path in folders.values() for file in path.glob("*.safetensors"))
    memory = sum(_memory(networks[name]) for name in folders)
    return written, as_table(before, Figures(metrics, disk, memory, _speed(networks, asked)))


def _memory(module: nn.Module) -> int:
    """Return the bytes of a network's weights; a tied one counts once."""
    held = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(map(_bytes, held.values()))


def _bytes(tensor: Any) -> int:
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    extra = [getattr(tensor, name, None) for name in ("SCB", "quant_state")]  # of bitsandbytes, beside its parameters
    return tensor.numel() * tensor.element_size() + sum(_bytes_of_state(part) for part in extra if part is not None)


def _bytes_of_state(state: Any) -> int:
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    parts = (getattr(state, name, None) for name in ("absmax", "code", "state2"))
    return sum(_bytes_of_state(part) for part in parts if part is not None)


def _speed(networks: Mapping[str, Any], asked: Mapping[str, Probe | None]) -> float:
    """Return tokens in a second of a forward pass of some networks one after the other: the median of some passes."""
    total, seconds = 0, 0.0
    for name, inputs in asked.items():
        assert inputs is not None  # or it would not have been quantised
        times = []
        for _ in range(6):
            begun = time.perf_counter()
            outputs(networks[name], inputs.inputs)
            times.append(time.perf_counter() - begun)
        total += inputs.inputs["input_ids"].numel()
        seconds += median(times[1:])
    return total / seconds


def as_table(before: Figures, after: Figures) -> str:
    """Return the figures side by side."""
    rows = [("", "trained", "quantised")]
    rows += [(name, f"{value:.6g}", f"{after.metrics[name]:.6g}") for name, value in before.metrics.items()]
    for name, a, b in (("on disk", before.disk, after.disk), ("in memory", before.memory, after.memory)):
        rows.append((name, f"{a / 1e6:.3f} MB", f"{b / 1e6:.3f} MB"))
    rows.append(("tokens/s", f"{before.tokens_per_second:,.0f}", f"{after.tokens_per_second:,.0f}"))
    width = max(len(name) for name, *_ in rows)
    return "\n".join(f"{name:{width}}  {a:>14}  {b:>14}" for name, a, b in rows)
