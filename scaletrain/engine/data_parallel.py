"""Every process holds whole networks: one process alone, or DDP over gloo or nccl."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from scaletrain.engine.native import Native
from scaletrain.player import Player


def _no_buffers() -> dict[str, Any]:
    """Return the argument that keeps DDP from overwriting buffers, under the name that this torch knows it by."""
    known = inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}


class DataParallel(Native):
    """Whole networks on every process; gradients are averaged by DDP while the backward pass runs."""

    name = "data_parallel"

    def wrapped(self, module: nn.Module) -> nn.Module:
        """Return it in DDP where there are several processes."""
        if self.world.size == 1:
            return module
        # Buffers are ours to synchronise: DDP would overwrite them between two forward passes of one loss.
        return DistributedDataParallel(
            module,
            device_ids=[self.world.device.index] if self.world.device.type == "cuda" else None,
            **_no_buffers(),
            gradient_as_bucket_view=True,
        )

    def norm(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return their norm. They are equal on all ranks, unless one rank's memory went wrong after the reduction."""
        norm = get_total_norm(gradients)
        if self.world.size > 1:
            norm = norm.nan_to_num(nan=math.inf, posinf=math.inf)  # a maximum over ranks may lose a NaN
            dist.all_reduce(norm, op=dist.ReduceOp.MAX)
        return norm

    @contextmanager
    def accumulate(self, player: Player, last: bool) -> Iterator[None]:
        """Hold gradients back on all but the last micro-batch."""
        with ExitStack() as stack:
            if not last:
                for name in player.networks:
                    wrapped = self._wrapped[name]
                    if isinstance(wrapped, DistributedDataParallel):
                        stack.enter_context(wrapped.no_sync())
            yield
