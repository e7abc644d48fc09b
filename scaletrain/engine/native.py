"""What engines share that step a torch optimiser themselves: scaling, clipping, skipping, and state by name.

Parameters may be held whole or in parts; `local`, `gathered`, `part`, `norm` and `accumulate` are what differs.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from scaletrain.engine.base import Engine, Part
from scaletrain.engine.statistics import Statistics
from scaletrain.player import Outcome, Player


class Native(Engine):
    """Steps the players' own optimisers over the parameters that the networks have."""

    def prepare(self, players: Iterable[Player], networks: Mapping[str, nn.Module]) -> None:
        """Take over the networks."""
        self._plain = dict(networks)
        self._players = list(players)
        self._wrapped = {name: self.wrapped(m) for player in self._players for name, m in player.networks.items()}
        self._statistics = Statistics(networks, self.world)

    @abstractmethod
    def wrapped(self, module: nn.Module) -> nn.Module:
        """Return what a turn calls in place of a network that it trains."""

    @abstractmethod
    def norm(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the norm of the whole gradients, the same on all processes, of this process's parts."""

    def view(self, player: Player) -> Mapping[str, nn.Module]:
        """Set requires_grad and return the networks."""
        for other in self._players if len(self._players) > 1 else ():
            for parameter in other.trainable.values():
                parameter.requires_grad_(other is player)
        return {name: self._wrapped[name] if name in player.networks else plain for name, plain in self._plain.items()}

    def plain(self) -> Mapping[str, nn.Module]:
        """Return the modules themselves."""
        return self._plain

    def backward(self, player: Player, loss: torch.Tensor) -> None:
        """Scale and differentiate."""
        (loss * player.scaler.scale if player.scaler else loss).backward()

    def update(self, player: Player, admit: Callable[[float], bool]) -> Outcome:
        """Step once, or skip on every rank. The one host synchronisation of an update is reading the norm here."""
        scale = player.scaler.scale if player.scaler else 1.0
        gradients = [self.local(p.grad) for p in player.trainable.values() if p.grad is not None]
        if player.scaler:
            torch._foreach_mul_(gradients, 1.0 / scale)
        value = float(self.norm(gradients))
        finite = math.isfinite(value)
        stepped = finite and admit(value)
        if stepped:
            if player.clip is not None and value > player.clip:
                torch._foreach_mul_(gradients, player.clip / (value + 1e-6))
            player.set_lr()
            player.optimizer.step()
        player.optimizer.zero_grad(set_to_none=True)
        if player.scaler:
            player.scaler.advance(overflow=not finite)
        return Outcome(stepped, finite, value, scale)

    def synchronise_statistics(self, stepped: bool) -> None:
        """Average BatchNorm's running statistics over the processes, or take them back."""
        self._statistics.settle(stepped)

    def state(self, player: Player) -> tuple[dict[str, Part], dict[str, Any]]:
        """Read the optimiser's state by parameter name."""
        tensors: dict[str, Part] = {}
        values: dict[str, Any] = {}
        for name, parameter in player.trainable.items():
            for key, value in player.optimizer.state.get(parameter, {}).items():  # bitsandbytes' state_dict is nested
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer/{key}/{name}"] = self.gathered(value, parameter)
                else:
                    values.setdefault(name, {})[key] = value
        if player.ema:
            for name, value in player.ema.shadow.items():
                tensors[f"ema/{name}"] = self.gathered(value, player.trainable.get(name, value))
        return tensors, values

    def load(self, player: Player, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Write the optimiser's state, through its own `load_state_dict` so that its placement rules hold."""
        states: dict[str, dict[str, Any]] = {name: dict(entry) for name, entry in values.items()}
        for key in tensors:  # which may be read as they are asked for
            kind, _, rest = key.partition("/")
            if kind == "optimizer":
                field, _, name = rest.partition("/")
                states.setdefault(name, {})[field] = self.part(tensors[key], player.trainable[name])
        numbered = {i: states[name] for i, name in enumerate(self._in_order(player)) if name in states}
        groups = player.optimizer.state_dict()["param_groups"]
        player.optimizer.load_state_dict({"state": numbered, "param_groups": groups})
        if player.ema:
            shadow = player.ema.shadow
            like = {name: player.trainable.get(name, value) for name, value in shadow.items()}
            player.ema.load_state_dict({n: self.local(self.part(tensors[f"ema/{n}"], like[n])) for n in shadow})

    @staticmethod
    def _in_order(player: Player) -> list[str]:
        """Parameter names in the optimiser's order, which groups may have changed."""
        names = {id(p): name for name, p in player.trainable.items()}
        return [names[id(p)] for group in player.optimizer.param_groups for p in group["params"]]
