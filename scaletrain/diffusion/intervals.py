"""Which two times of a path a consistency function is compared at: t, and an earlier s."""

from __future__ import annotations

import math
from typing import Annotated, Literal, final

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from scaletrain.config import Strict
from scaletrain.diffusion.path import Path
from scaletrain.diffusion.times import normal, stratified


@final
class Even(Strict):
    """One of `count` even parts of the path's grid, or what is left of the first; t is anywhere after the first time.

    on_grid: share of the draws with t, and so s, at the ends of parts, as all are in Song et al. (2023), algorithm 2.
    count doubles after every `double_every` updates up to `most` (Song & Dhariwal, 2024, section 3.4).
    """

    type: Literal["even"] = "even"
    count: int = Field(18, ge=1)
    on_grid: float = Field(0.0, ge=0, le=1)
    most: int | None = Field(None, ge=1)
    double_every: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _doubles(self) -> Even:
        if (self.most is None) != (self.double_every is None):
            raise ValueError("`most` and `double_every` belong together: give both, or neither")
        if self.most is not None and self.most < self.count:
            raise ValueError(f"most ({self.most}) must not be less than count ({self.count})")
        return self

    def parts(self, updates: int) -> int:
        """Return into how many parts the path is cut after so many updates."""
        if self.most is None or self.double_every is None:
            return self.count
        return min(self.count * 2 ** min(updates // self.double_every, 32), self.most)

    def draw(
        self, count: int, path: Path, updates: int, data_std: float, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return t and s (count,)."""
        parts = self.parts(updates)
        share = 1 - stratified(count, device)  # in (0, 1]
        if self.on_grid:
            snapped = torch.ceil(share * parts).clamp(min=1) / parts
            share = torch.where(torch.rand(count, device=device) < self.on_grid, snapped, share)
        return path.time(share), path.time((share - 1 / parts).clamp(min=0))


@final
class Near(Strict):
    """Easy consistency tuning (Geng et al., 2025, section 3): s nears t, stage by stage of `every` updates.

    In noise levels ν = σ/α, for data of standard deviation 0.5: ln ν of t is normal, and ν of s is that of t times
    1 − n(ν) / q^a, with n(ν) = 1 + k · sigmoid(−b ν) and a the stage, from 1 to `most`. Where that is not above 0, s is
    the first time: diffusion.
    """

    type: Literal["near"] = "near"
    every: int = Field(ge=1)
    most: int = Field(8, ge=1)
    q: float = Field(2.0, gt=1)
    k: float = Field(8.0, ge=0)
    b: float = 1.0
    mean: float = -1.1
    std: float = Field(2.0, gt=0)

    def draw(
        self, count: int, path: Path, updates: int, data_std: float, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return t and s (count,)."""
        unit = math.log(2 * data_std)
        t = path.time_at(-2 * (self.mean + self.std * normal(count, device) + unit))
        t = t.clamp(path.time(1e-4), path.last)
        level = torch.exp(-path.log_snr(t) / 2 - unit)
        stage = min(updates // self.every + 1, self.most)
        ratio = 1 - (1 + self.k * torch.sigmoid(-self.b * level)) / self.q**stage
        s = path.time_at(-2 * (torch.log(level * ratio.clamp(min=1e-30)) + unit)).clamp(min=path.first)
        return t, torch.where(ratio > 0, torch.minimum(s, t), path.first)


def _named(value: object) -> object:
    return {"type": value} if isinstance(value, str) else value


Intervals = Annotated[Annotated[Even | Near, Field(discriminator="type")], BeforeValidator(_named)]
"""In a recipe."""
