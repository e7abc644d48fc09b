"""Which times a denoiser is trained at."""

from __future__ import annotations

import math
from typing import Annotated, Literal, final

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from scaletrain.config import Strict
from scaletrain.diffusion.path import Path


def stratified(count: int, device: torch.device) -> Tensor:
    """Return shares (count,) in [0, 1), evenly spaced from a random first one: each is uniform, together they spread.

    Gradients vary less than with independent ones (Kingma et al., 2021, appendix I.1).
    """
    return (torch.rand(1, device=device) + torch.arange(count, device=device) / count) % 1


@final
class Uniform(Strict):
    """Evenly from the first to the last time of the path."""

    type: Literal["uniform"] = "uniform"

    def draw(self, count: int, path: Path, device: torch.device) -> Tensor:
        """Return times (count,)."""
        return path.first + (path.last - path.first) * stratified(count, device)


@final
class LogitNormal(Strict):
    """The logit of the share of the way from first to last is normal (Esser et al., 2024, section 3.1)."""

    type: Literal["logit_normal"] = "logit_normal"
    mean: float = 0.0
    std: float = Field(1.0, gt=0)

    def draw(self, count: int, path: Path, device: torch.device) -> Tensor:
        """Return times (count,)."""
        share = torch.sigmoid(self.mean + self.std * normal(count, device))
        return path.first + (path.last - path.first) * share


@final
class LogNormal(Strict):
    """The logarithm of σ/α is normal (Karras et al., 2022, table 1); within the path."""

    type: Literal["log_normal"] = "log_normal"
    mean: float = -1.2
    std: float = Field(1.2, gt=0)

    def draw(self, count: int, path: Path, device: torch.device) -> Tensor:
        """Return times (count,)."""
        return path.time_at(-2 * (self.mean + self.std * normal(count, device))).clamp(path.first, path.last)


def normal(count: int, device: torch.device) -> Tensor:
    """Return normal quantiles of stratified shares (count,)."""
    shares = stratified(count, device).double().clamp(1e-7, 1 - 1e-7)
    return (math.sqrt(2) * torch.erfinv(2 * shares - 1)).float()


def _named(value: object) -> object:
    return {"type": value} if isinstance(value, str) else value


Times = Annotated[Annotated[Uniform | LogitNormal | LogNormal, Field(discriminator="type")], BeforeValidator(_named)]
"""A distribution of times in a recipe."""
