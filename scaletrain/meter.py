"""How fast a stage goes, and how much memory it takes."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from typing import Any

import torch

from scaletrain.engine.base import Engine
from scaletrain.engine.hardware import flops_per_token, peak_flops


class Meter:
    """Throughput between two readings, in `unit` per second over all processes, and the peak of memory of this one."""

    def __init__(self, unit: str, engine: Engine):
        self.unit, self._world = unit, engine.world
        self._peak = peak_flops(engine.world.device, engine.precision)
        self._flops = flops_per_token(engine.plain().values(), lambda p: engine.shape(p).numel())
        self.restart({})

    def restart(self, seen: Mapping[str, float]) -> None:
        """Begin anew: what came before was no training. seen: units that have been trained on."""
        self._from = (time.monotonic(), seen.get(self.unit, 0))

    def read(self, seen: Mapping[str, float]) -> dict[str, Any]:
        """Return the figures since the last reading."""
        began, before = self._from
        rate = (seen.get(self.unit, 0) - before) / max(time.monotonic() - began, 1e-9)
        self.restart(seen)
        if self._world.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated()
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found = {"throughput": round(rate, 3), "memory_bytes": memory}
        if self._peak and self.unit == "tokens":
            found["mfu"] = round(rate * self._flops / (self._peak * self._world.size), 4)
        return found
