"""The interface of an engine: how players' networks are wrapped, accumulated, scaled, clipped and stepped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from scaletrain.checkpoint.tensors import Stored
from scaletrain.config import NetworkSpec
from scaletrain.engine.world import World
from scaletrain.player import Outcome, Player

PIECE = 1 << 22
"""Elements of the pieces in which a tensor that is held in parts is gathered: all the memory that it takes."""


@dataclass(frozen=True)
class Part:
    """A tensor of the state, of which this process may hold a part.

    pieces: gives it whole, flat, piece by piece; a piece is to be used before the next is asked for. All processes
    call it and take all pieces. held: the tensor, where it is whole here.
    """

    shape: torch.Size
    dtype: torch.dtype
    pieces: Callable[[], Iterator[torch.Tensor]]
    held: torch.Tensor | None = None

    @classmethod
    def whole(cls, tensor: torch.Tensor) -> Part:
        """Make one of a tensor that each process holds whole."""
        return cls(tensor.shape, tensor.dtype, lambda: iter([tensor.flatten()]), tensor)

    def gather(self) -> torch.Tensor:
        """Return it whole. All processes call it."""
        if self.held is not None:
            return self.held
        pieces = list(map(torch.clone, self.pieces()))
        return torch.cat(pieces).view(self.shape)


class Engine(ABC):
    """One way of holding networks on one or many processes. The trainer knows only this."""

    name: str
    lockstep: bool = False
    """Whether all processes must call a network together, in evaluation and sampling too: it is held in parts."""

    sharded: bool = False
    """Whether weights or their state are held in parts, which all processes gather together."""

    def __init__(self, world: World, precision: str):
        self.world, self.precision = world, precision

    differentiates_forward: bool = True
    """Whether networks can be called with dual numbers (torch.autograd.forward_ad)."""

    reads: bool = False
    """Whether networks may come to `wrap` with parameters on the meta device, to be read from files in parts."""

    def wrap(  # noqa: B027 (most need not)
        self,
        networks: Mapping[str, nn.Module],
        parts: Collection[str],
        weights: Mapping[str, Mapping[str, Stored]],
    ) -> None:
        """Change networks in place before players are made of their parameters.

        parts: those to hold in parts, by an engine that does: what is trained, and large frozen ones. weights: where
        the weights are, by name, of networks that come without them.
        """

    def refuses(self, optimizer: str) -> str | None:
        """Return why optimisers of a type cannot be stepped, or None when they can."""
        return None

    def cannot_hold(self, spec: NetworkSpec) -> str | None:
        """Return why a network cannot be held, or None when it can."""
        if self.sharded and spec.quantize and not spec.frozen:
            return (
                f"{self.name} holds what is trained, or its state, in parts, and weights in {spec.quantize.type} are "
                "held whole: launch with MULTI_GPU, or leave `quantize` out."
            )
        return None

    def shape(self, parameter: torch.Tensor) -> torch.Size:
        """Return the shape that a parameter has when it is whole."""
        return parameter.shape

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this process's part of a parameter, or of what is held as one; it shares the memory."""
        return tensor.detach()

    def gathered(self, tensor: torch.Tensor, like: torch.Tensor) -> Part:
        """Return a tensor, of which a part may be held as `like` is, to be gathered."""
        return Part.whole(tensor)

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

    def changing(self, player: Player) -> AbstractContextManager[None]:
        """Return the context in which a family may change the weights of a player's networks in place."""
        return nullcontext()

    @abstractmethod
    def accumulate(self, player: Player, last: bool) -> AbstractContextManager[None]:
        """Return the context of a micro-batch. After the last one, gradients are those of all processes."""

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
    def state(self, player: Player) -> tuple[dict[str, Part], dict[str, Any]]:
        """Return the player's optimiser and EMA by parameter name: tensors, and JSON values."""

    @abstractmethod
    def load(self, player: Player, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Take back what `state` returned, whatever engine and number of processes it came from."""

    def close(self) -> None:  # noqa: B027 (most need not)
        """Let go of what would outlive the stage."""
