"""The interface of an engine: how players' networks are wrapped, accumulated, scaled, clipped and stepped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from scaletrain.engine.world import World
from scaletrain.player import Outcome, Player


class Engine(ABC):
    """One way of holding networks on one or many processes. The trainer knows only this."""

    name: str
    lockstep: bool = False
    """Whether all processes must call a network together, in evaluation and sampling too: it is held in parts."""

    def __init__(self, world: World, precision: str):
        self.world, self.precision = world, precision

    def wrap(self, networks: Mapping[str, nn.Module], trained: Collection[str]) -> None:  # noqa: B027 (most need not)
        """Change networks in place before players are made of their parameters. trained: those that are not frozen."""

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this process's part of a parameter, or of what is shaped as one; it shares the memory."""
        return tensor

    def whole(self, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return a tensor whole, of which a part may be held as `like` is. All processes call it."""
        return tensor

    def part(self, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return a whole tensor as `like` is held, where it has that shape. All processes call it."""
        return tensor

    @abstractmethod
    def prepare(self, players: Iterable[Player], networks: Mapping[str, nn.Module]) -> None:
        """Take over the networks, on the device already, before the first use."""

    @abstractmethod
    def view(self, player: Player) -> Mapping[str, nn.Module]:
        """Return what a turn of `player` sees: its networks wrapped and requiring grad, the others plain and not."""

    @abstractmethod
    def plain(self) -> Mapping[str, nn.Module]:
        """Return the networks without wrappers, for evaluation, sampling and saving."""

    @abstractmethod
    def accumulate(self, player: Player, last: bool) -> AbstractContextManager[None]:
        """Return the context of a micro-batch: gradients are reduced over processes at the last one only."""

    @abstractmethod
    def backward(self, player: Player, loss: torch.Tensor) -> None:
        """Add the gradients of a loss that is already divided by the global count and multiplied by the world size."""

    @abstractmethod
    def update(self, player: Player, admit: Callable[[float], bool]) -> Outcome:
        """Unscale, agree on overflow over all ranks, clip and step; leave gradients at none.

        When a gradient is not finite, or `admit` says no to the gradient norm, nothing is stepped, on any rank. All
        ranks ask it, with the same norm.
        """

    @abstractmethod
    def synchronise_statistics(self, stepped: bool) -> None:
        """Make statistics that each process gathered on its own (BatchNorm's) the same on all.

        Where nothing was stepped they go back to what they were: what is not finite would stay in them for ever.
        """

    @abstractmethod
    def state(self, player: Player) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the player's optimiser and EMA by parameter name: tensors, and JSON values."""

    @abstractmethod
    def load(self, player: Player, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Take back what `state` returned, whatever engine and number of processes it came from."""
