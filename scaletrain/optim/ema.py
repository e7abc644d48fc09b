"""An exponential moving average of a player's weights, kept in fp32 (Polyak & Juditsky, 1992; Ho et al., 2020)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from scaletrain.config import EMASpec


class EMA:
    """shadow ← d · shadow + (1 − d) · weight after every update, with d = `decay`, smaller at first under `warmup`.

    Statistics that belong to the weights (BatchNorm's) are averaged as they are. shadow: by the parameters' names,
    fp32, on their device and sharded as they are. It starts as the weights.
    Raises ValueError for parameters that are not fp32: they are the optimiser's masters.
    """

    def __init__(self, named: Mapping[str, Tensor], spec: EMASpec):
        other = [name for name, p in named.items() if p.dtype != torch.float32]
        if other:
            raise ValueError(f"an average needs fp32 weights; {other[0]} is {named[other[0]].dtype}")
        self.spec = spec
        self.shadow: dict[str, Tensor] = {name: p.detach().clone() for name, p in named.items()}
        self._params = dict(named)
        self._swapped = False

    def decay(self, updates: int) -> float:
        """Return d for the update that makes it `updates` in all."""
        return min(self.spec.decay, (1 + updates) / (10 + updates)) if self.spec.warmup else self.spec.decay

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Move the average towards the weights; `updates` is how many the player has made, the last one included."""
        self._must_be_home()
        weights = [p.detach() for p in self._params.values()]
        torch._foreach_lerp_(list(self.shadow.values()), weights, 1 - self.decay(updates))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Have the average in the parameters for a while; both come back bit for bit.

        Contents are exchanged in place, one parameter at a time: no memory to speak of, and whoever holds the storage
        (a sharded module, a captured graph) sees the average. Until the end `shadow` holds the weights.
        """
        self._must_be_home()
        self._exchange()
        self._swapped = True
        try:
            yield
        finally:
            self._exchange()
            self._swapped = False

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, p in self._params.items():
            weight = p.detach().clone()
            p.copy_(self.shadow[name])
            self.shadow[name].copy_(weight)

    def _must_be_home(self) -> None:
        if self._swapped:
            raise RuntimeError("the average is in the parameters: leave `swapped` first")

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average by name, without a copy."""
        self._must_be_home()
        return dict(self.shadow)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` returned. Raises ValueError when names or shapes differ."""
        self._must_be_home()
        if state.keys() != self.shadow.keys():
            differ = sorted(state.keys() ^ self.shadow.keys())
            raise ValueError(f"the average is not of this player's parameters: {', '.join(differ[:5])}")
        for name, value in state.items():
            if value.shape != self.shadow[name].shape:
                raise ValueError(f"{name}: {tuple(value.shape)} is not {tuple(self.shadow[name].shape)}")
            self.shadow[name].copy_(value)
