"""Samplers: from noise at the last time along a denoiser's probability flow to data.

Each takes a grid of times, falling, and returns x₀: the last evaluation is at the last time but one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from scaletrain.diffusion.denoiser import Denoiser
from scaletrain.diffusion.path import Path, beside

Solver = Literal["ddim", "euler", "heun", "dpmpp_2m", "ancestral", "renoise"]


def times(t: float, like: Tensor) -> Tensor:
    """Return (B,) times, all t, for `like` (B, ...)."""
    return torch.full((len(like),), t, dtype=like.dtype, device=like.device)


def ddim_step(denoiser: Denoiser, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Take one step of DDIM, from z (B, ...) at times t (B,) to times s (B,) (Song et al., 2021, equation 12)."""
    x0, eps = denoiser(z, t)
    return denoiser.path.noisy(x0, eps, s)


def heun_step(denoiser: Denoiser, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Take one step of Heun's method in time, of two evaluations (Karras et al., 2022, algorithm 1)."""
    step = beside(s - t, z)
    first = denoiser.velocity(z, t)
    return z + step * (first + denoiser.velocity(z + step * first, s)) / 2


def euler_step(denoiser: Denoiser, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Take one step of Euler's method in time."""
    return z + beside(s - t, z) * denoiser.velocity(z, t)


def solve(denoiser: Denoiser, z: Tensor, grid: Sequence[float], solver: Solver = "ddim") -> Tensor:
    """Return x₀ (B, ...) of z at the first time of a grid. The last part is DDIM's for all: its x₀ at the last time but
    one. ancestral and renoise draw from torch's global generator.
    """
    if solver == "dpmpp_2m":
        return _dpmpp_2m(denoiser, z, grid)
    for t, s in pairwise(grid[:-1]):
        z = STEPS[solver](denoiser, z, times(t, z), times(s, z))
    return denoiser(z, times(grid[-2], z))[0]


def ancestral_step(denoiser: Denoiser, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Draw z at times s given z at t and x₀ (Ho et al., 2020, equation 7, for any path: Kingma et al., 2021, 2)."""
    x0, _ = denoiser(z, t)
    (alpha, sigma), (alpha_s, sigma_s) = denoiser.path.at(t, z), denoiser.path.at(s, z)
    ratio = alpha / alpha_s
    share = (ratio * sigma_s / sigma) ** 2  # of the noise at t that is there at s already
    mean = ratio * (sigma_s / sigma) ** 2 * z + alpha_s * (1 - share) * x0
    return mean + sigma_s * torch.sqrt((1 - share).clamp(min=0)) * torch.randn_like(z)


def renoise_step(denoiser: Denoiser, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Noise x₀ anew, to times s (Song et al., 2023, algorithm 1): for networks that tell all of x₀ in one step."""
    x0, _ = denoiser(z, t)
    return denoiser.path.noisy(x0, torch.randn_like(x0), s)


STEPS: Mapping[str, Callable[[Denoiser, Tensor, Tensor, Tensor], Tensor]] = {
    "ddim": ddim_step,
    "euler": euler_step,
    "heun": heun_step,
    "ancestral": ancestral_step,
    "renoise": renoise_step,
}
"""Solvers of one step: (denoiser, z (B, ...), t (B,), s (B,)) -> z at s."""


def _dpmpp_2m(denoiser: Denoiser, z: Tensor, grid: Sequence[float]) -> Tensor:
    """DPM-Solver++(2M) (Lu et al., 2022, algorithm 2): of second order with one evaluation a step."""
    before: Tensor | None = None
    last_step = torch.zeros(())
    for t, s in pairwise(grid[:-1]):
        now, then = times(t, z), times(s, z)
        x0, _ = denoiser(z, now)
        step = (denoiser.path.log_snr(then) - denoiser.path.log_snr(now)) / 2
        guess = x0
        if before is not None:
            ratio = beside(last_step / step, z)
            guess = x0 + (x0 - before) / (2 * ratio)
        (_, sigma), (alpha_s, sigma_s) = denoiser.path.at(now, z), denoiser.path.at(then, z)
        z = sigma_s / sigma * z - alpha_s * beside(torch.expm1(-step), z) * guess
        before, last_step = x0, step
    return denoiser(z, times(grid[-2], z))[0]


def sample(denoiser: Denoiser, noise: Tensor, steps: int, solver: Solver = "ddim") -> Tensor:
    """Return what a solver makes of noise (B, ...) of unit variance in `steps` steps of the path's grid."""
    return solve(denoiser, denoiser.path.start(noise), denoiser.path.grid(steps), solver)


def implied_x0(path: Path, z: Tensor, t: Tensor, z_s: Tensor, s: Tensor) -> Tensor:
    """Return the x₀ with which one DDIM step leads from z at times t to z_s at earlier times s (B,).

    That is what a student of one step has to predict where its teacher took several (Salimans & Ho, 2022, algorithm 2).
    """
    (alpha, sigma), (alpha_s, sigma_s) = path.at(t, z), path.at(s, z)
    ratio = sigma_s / sigma
    return (z_s - ratio * z) / (alpha_s - ratio * alpha)
