"""Every process holds whole networks: one process alone, or DDP over gloo or nccl."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from scaletrain.engine.base import Engine
from scaletrain.engine.statistics import statistics
from scaletrain.player import Outcome, Player


def _no_buffers() -> dict[str, Any]:
    """Return the argument that keeps DDP from overwriting buffers, under the name that this torch knows it by."""
    known = inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}


class DataParallel(Engine):
    """Whole networks on every process; gradients are averaged by DDP while the backward pass runs."""

    name = "data_parallel"

    def prepare(self, players: Iterable[Player], networks: Mapping[str, nn.Module]) -> None:
        """Wrap what is trained."""
        self._plain = dict(networks)
        self._players = list(players)
        self._wrapped: dict[str, nn.Module] = {}
        for player in self._players:
            for name, module in player.networks.items():
                # Buffers are ours to synchronise: DDP would overwrite them between two forward passes of one loss.
                self._wrapped[name] = (
                    DistributedDataParallel(
                        module,
                        device_ids=[self.world.device.index] if self.world.device.type == "cuda" else None,
                        **_no_buffers(),
                        gradient_as_bucket_view=True,
                    )
                    if self.world.size > 1
                    else module
                )
        self._statistics = list(statistics(networks).values())
        self._kept = [tensor.clone() for tensor in self._statistics]

    def view(self, player: Player) -> Mapping[str, nn.Module]:
        """Set requires_grad and return the networks."""
        for other in self._players if len(self._players) > 1 else ():
            for parameter in other.trainable.values():
                parameter.requires_grad_(other is player)
        return {name: self._wrapped[name] if name in player.networks else plain for name, plain in self._plain.items()}

    def plain(self) -> Mapping[str, nn.Module]:
        """Return the modules themselves."""
        return self._plain

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

    def backward(self, player: Player, loss: torch.Tensor) -> None:
        """Scale and differentiate."""
        (loss * player.scaler.scale if player.scaler else loss).backward()

    def update(self, player: Player, admit: Callable[[float], bool]) -> Outcome:
        """Step once, or skip on every rank. The one host synchronisation of an update is reading the norm here."""
        scale = player.scaler.scale if player.scaler else 1.0
        gradients = [p.grad for p in player.trainable.values() if p.grad is not None]
        if player.scaler:
            torch._foreach_mul_(gradients, 1.0 / scale)
        norm = get_total_norm(gradients)
        if self.world.size > 1:
            # Reduced gradients are equal on all ranks, unless one rank's memory went wrong after the reduction.
            norm = norm.nan_to_num(nan=math.inf, posinf=math.inf)  # a maximum over ranks may lose a NaN
            dist.all_reduce(norm, op=dist.ReduceOp.MAX)
        value = float(norm)
        finite = math.isfinite(value)
        stepped = finite and admit(value)
        if stepped:
            if player.clip is not None:
                clip_grads_with_norm_(list(player.trainable.values()), player.clip, norm)
            player.set_lr()
            player.optimizer.step()
        player.optimizer.zero_grad(set_to_none=True)
        if player.scaler:
            player.scaler.advance(overflow=not finite)
        return Outcome(stepped, finite, value, scale)

    def synchronise_statistics(self, stepped: bool) -> None:
        """Average BatchNorm's running statistics over the processes, or take them back."""
        if not self._statistics:
            return
        if stepped:
            self.world.mean_(self._statistics)
            torch._foreach_copy_(self._kept, self._statistics)
        else:
            torch._foreach_copy_(self._statistics, self._kept)

    def state(self, player: Player) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Read the optimiser's state by parameter name."""
        tensors: dict[str, torch.Tensor] = {}
        values: dict[str, Any] = {}
        states = player.optimizer.state_dict()["state"]
        for number, name in enumerate(self._in_order(player)):
            for key, value in states.get(number, {}).items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer/{key}/{name}"] = value
                else:
                    values.setdefault(name, {})[key] = value
        if player.ema:
            tensors |= {f"ema/{name}": value for name, value in player.ema.shadow.items()}
        return tensors, values

    def load(self, player: Player, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Write the optimiser's state, through its own `load_state_dict` so that its placement rules hold."""
        states: dict[str, dict[str, Any]] = {name: dict(entry) for name, entry in values.items()}
        for key, value in tensors.items():
            kind, _, rest = key.partition("/")
            if kind == "optimizer":
                field, _, name = rest.partition("/")
                states.setdefault(name, {})[field] = value
        numbered = {i: states[name] for i, name in enumerate(self._in_order(player)) if name in states}
        groups = player.optimizer.state_dict()["param_groups"]
        player.optimizer.load_state_dict({"state": numbered, "param_groups": groups})
        if player.ema:
            player.ema.load_state_dict({k.removeprefix("ema/"): v for k, v in tensors.items() if k.startswith("ema/")})

    @staticmethod
    def _in_order(player: Player) -> list[str]:
        """Parameter names in the optimiser's order, which groups may have changed."""
        names = {id(p): name for name, p in player.trainable.items()}
        return [names[id(p)] for group in player.optimizer.param_groups for p in group["params"]]
