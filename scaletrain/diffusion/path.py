"""Paths from data to noise: z_t = α_t x₀ + σ_t ε for t in [0, 1], data at 0 and ε ~ N(0, I) at 1.

Legend: z, x₀ and ε are (B, ...); t is (B,); α and σ come as (B, 1, ...) to multiply z. SNR = α² / σ².
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor


class Path(ABC):
    """How much signal and how much noise there is at a time."""

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return α and σ at times t, in its shape; σ > 0 everywhere, and α > 0 except perhaps at 1."""

    def at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return α and σ at times t (B,), shaped (B, 1, ...) to multiply `like` (B, ...)."""
        alpha, sigma = self.alpha_sigma(t)
        shape = (-1,) + (1,) * (like.dim() - 1)
        return alpha.view(shape), sigma.view(shape)

    def noisy(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return z_t (B, ...)."""
        alpha, sigma = self.at(t, x0)
        return alpha * x0 + sigma * eps


@final
class Cosine(Path):
    """The variance-preserving cosine path, α² + σ² = 1 (Nichol & Dhariwal, 2021), with log SNR from 20 down to −20.

    α = cos φ, σ = sin φ, and φ goes evenly from just above 0 to just below π/2, so that α and σ are never 0 and every
    conversion between ε, x₀ and v is defined (Salimans & Ho, 2022, appendix; the bounds are those of their code).
    """

    _first = math.atan(math.exp(-10))

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos φ and sin φ."""
        phi = self._first + t * (math.pi / 2 - 2 * self._first)
        return torch.cos(phi), torch.sin(phi)


def stratified(count: int, device: torch.device) -> Tensor:
    """Return times (count,) in [0, 1), evenly spaced from a random first one: each is uniform, together they spread.

    Gradients vary less than with independent times (Kingma et al., 2021, appendix I.1).
    """
    return (torch.rand(1, device=device) + torch.arange(count, device=device) / count) % 1
