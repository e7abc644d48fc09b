"""The parity gate: what was written, loaded by the libraries alone in a new process, against what was trained."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from scaletrain.checkpoint.tensors import stored
from scaletrain.data.sources import open_rows
from scaletrain.errors import UserError
from scaletrain.export import plain
from scaletrain.finished import FinishedStage
from scaletrain.networks._positions import positions

log = logging.getLogger("scaletrain")

ROWS, POSITIONS = 4, 128
"""How many rows are compared, and how many of their positions."""
EXACT = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Largest difference between a network here and the same one loaded elsewhere, as a part of the largest logit."""


@dataclass(frozen=True)
class Probe:
    """Inputs by keyword, (B, T) each, and where they come from."""

    inputs: dict[str, torch.Tensor]
    source: str


@dataclass(frozen=True)
class Gap:
    """The largest |difference| of logits, and the largest |logit|."""

    difference: float
    scale: float

    @classmethod
    def between(cls, found: torch.Tensor, expected: torch.Tensor) -> Gap:
        """Compare. Raises RuntimeError for other shapes, or values that are not finite."""
        if expected.shape != found.shape or not found.numel() or not (found.isfinite() & expected.isfinite()).all():
            raise RuntimeError(f"logits {tuple(found.shape)}, not finite or not {tuple(expected.shape)} as they should")
        return cls(float((found - expected).abs().max()), float(expected.abs().max()))

    @property
    def part(self) -> float:
        """The difference as a part of the largest logit."""
        return self.difference / max(self.scale, 1e-12)

    def __str__(self) -> str:
        return f"{self.difference:.3g} ({self.part:.2g} of the largest)"


def probe(run: FinishedStage, network: str, module: Any) -> Probe | None:
    """Return inputs to compare a network on: rows of the run's data where they can be read, else some tokens.

    None for a network that takes no tokens.
    """
    real = _rows(run, network)
    if real:
        return Probe({k: v[:ROWS, :POSITIONS].contiguous() for k, v in real.items()}, "rows of the run's data")
    if getattr(module, "get_input_embeddings", lambda: None)() is None:
        return None
    settings = module.config.get_text_config()
    length = min(32, positions(module) or 32)
    ids = (torch.arange(ROWS * length) * 7919 % settings.vocab_size).view(ROWS, length)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if module.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.clone()
    return Probe(inputs, "tokens in turn, since the run's data cannot be read")


def _rows(run: FinishedStage, network: str) -> dict[str, torch.Tensor] | None:
    """Return a network's inputs for the first rows of the evaluation or training data; None where there are none."""
    spec = run.stage.recipe.data
    sources = [source.model_copy(update={"weight": None}) for source in spec.eval or spec.train]
    data = spec.model_copy(update={"train": sources, "eval": None, "holdout": 0.0, "packing": False})
    reading = run.under(data=data)
    reading.restore()
    objective = reading.objective
    try:
        rows = open_rows(sources).sample(ROWS)
        objective.prepare(rows, None)
        examples = objective.examples(rows, False, window=True)
        if not len(examples):
            return None
        indices = range(min(ROWS, len(examples)))
        return objective.inputs(network, examples.batch(indices, np.arange(len(indices), dtype=np.uint64)))
    except (UserError, OSError) as error:
        log.warning("`%s` is not compared on rows of the run's data: %s", network, error)
        return None


def check(
    folder: Path, kind: str, base: Mapping[str, Any] | None, module: nn.Module, expected: torch.Tensor, probe: Probe
) -> tuple[Gap, torch.Tensor]:
    """Load a folder in a new process, and compare it with the network that it was written from.

    kind, base: as for `plain.load`. expected: the network's outputs. Returns how far they are apart, and the outputs of
    what was loaded. Raises RuntimeError when they differ, when a tensor is empty, lost or another, or it does not load.
    """
    if empty := sorted(name for name, entry in stored(folder).items() if not entry.shape.numel()):
        raise RuntimeError(f"{len(empty)} tensors are empty, as {empty[0]}")
    found, facts = elsewhere({"folder": str(folder.resolve()), "kind": kind, "base": base}, probe)
    if facts["faults"]:
        raise RuntimeError(f"{len(facts['faults'])} weights do not load: {'; '.join(facts['faults'][:3])}")
    _compare(plain.fingerprints(module), facts["fingerprints"], adapter=base is not None)
    gap = Gap.between(found, expected)
    if gap.part > EXACT[next(p.dtype for p in module.parameters() if p.is_floating_point())]:
        raise RuntimeError(f"loaded elsewhere it gives other logits: max |difference| {gap}")
    return gap, found


def elsewhere(
    asked: Mapping[str, Any], probe: Probe, program: ModuleType = plain
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Load a network as `plain.load` is asked to and call it, in a new process that has the libraries alone.

    program: another such module. Returns its outputs, and its `faults` and `fingerprints`. Raises RuntimeError when it
    does not load.
    """
    with tempfile.TemporaryDirectory() as place:
        there = Path(place)
        files = {key: str(there / f"{key}.safetensors") for key in ("inputs", "outputs")}
        save_file(probe.inputs, files["inputs"])
        request = there / "request"
        request.write_text(repr({**asked, **files, "facts": str(there / "facts.json")}))
        # A program given as a text finds no modules beside a file of its own; nor does it in an empty folder.
        command = [sys.executable, "-c", Path(str(program.__file__)).read_text(), str(request)]
        done = subprocess.run(command, cwd=there, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"it cannot be loaded by the libraries alone:\n{done.stderr[-2000:]}")
        facts = json.loads((there / "facts.json").read_text())
        assert not facts["own"], "this package was imported"
        return load_file(files["outputs"])["outputs"], facts


def _compare(trained: Mapping[str, list[Any]], loaded: Mapping[str, list[Any]], adapter: bool) -> None:
    """Raise RuntimeError unless both hold the same tensors, bit for bit.

    adapter: it may be written in another form, with tensors of other shapes; the logits tell whether it is the same.
    """
    if odd := sorted(trained.keys() ^ loaded.keys()):
        raise RuntimeError(f"{len(odd)} tensors are lost or gained, as {odd[0]}")
    for name, facts in trained.items():
        other = loaded[name]
        if facts != other and not (adapter and facts[0] != other[0]):
            raise RuntimeError(f"`{name}` differs after loading it back")
