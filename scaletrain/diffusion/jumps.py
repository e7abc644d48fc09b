"""Jumps along a path: from a time to any earlier one, in one evaluation of a network that is told where to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from scaletrain.diffusion.denoiser import Denoiser
from scaletrain.diffusion.path import Path, beside
from scaletrain.diffusion.solvers import ddim_step, euler_step, heun_step, implied_x0, times
from scaletrain.diffusion.times import stratified

Move = Callable[[Denoiser, Tensor, Tensor, Tensor], Tensor]
"""(student, z (B, ...), times t (B,), earlier or equal times s (B,)) -> z at s (B, ...)."""


def to(student: Denoiser, s: Tensor) -> Denoiser:
    """Tell a student the times to go to (B,)."""
    return student.given(target=student.path.told(s))


def ddim_jump(student: Denoiser, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Jump as DDIM steps, with the x₀ and ε that the student answers for this s: on α = 1, s/t z + (1 − s/t) x₀."""
    return ddim_step(to(student, s), z, t, s)


def euler_jump(student: Denoiser, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Jump as Euler steps, with the velocity that the student answers for this s."""
    return euler_step(to(student, s), z, t, s)


def teacher_step(teacher: Denoiser, z: Tensor, t: Tensor, s: Tensor, solver: str) -> Tensor:
    """Take one step of a teacher's solver, `ddim` or `heun`; to the first time, where there may be no noise, DDIM's."""
    stepped = ddim_step(teacher, z, t, s)
    if solver == "ddim":
        return stepped
    return torch.where(beside(s <= teacher.path.first, z), stepped, heun_step(teacher, z, t, s))


def travel(student: Denoiser, move: Move, noise: Tensor, steps: int, gamma: float = 0.0) -> Tensor:
    """Return the x₀ that noise (B, ...) of unit variance comes to in some jumps over the path's grid.

    gamma: after each jump but the last, noise of γ σ is drawn from torch's global generator, and the jump goes on to
    where there is only the rest, √(1 − γ²) σ (Kim et al., 2024, section 3.3, for any path). 1: all of it.
    """
    path = student.path
    z, grid = path.start(noise), path.grid(steps)
    for now, then in pairwise(grid):
        t, s = times(now, z), times(then, z)
        if gamma and then != grid[-1]:
            z = _jump_with_noise(student, move, z, t, s, gamma)
        else:
            before, z = z, move(student, z, t, s)
    return implied_x0(path, before, t, z, s)


def _jump_with_noise(student: Denoiser, move: Move, z: Tensor, t: Tensor, s: Tensor, gamma: float) -> Tensor:
    path = student.path
    alpha, sigma = path.alpha_sigma(s)
    rest = (1 - gamma**2) ** 0.5 * sigma
    below = path.time_at(2 * (alpha / rest.clamp(min=1e-12)).log()).clamp(min=path.first)
    alpha_below, sigma_below = path.alpha_sigma(below)
    added = (sigma**2 - (alpha / alpha_below * sigma_below) ** 2).clamp(min=0).sqrt()
    return beside(alpha / alpha_below, z) * move(student, z, t, below) + beside(added, z) * torch.randn_like(z)


def any_pairs(count: int, steps: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return numbers of two times of a grid of so many steps, the earlier in the grid first: (count,) each, all pairs
    alike.
    """
    first = torch.floor(stratified(count, device) * (steps + 1)).long()
    other = (first + 1 + torch.floor(torch.rand(count, device=device) * steps).long()) % (steps + 1)
    return torch.minimum(first, other), torch.maximum(first, other)


def sampler_pairs(count: int, samplers: Sequence[int], steps: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return numbers of two times of a grid of `steps`, the earlier in the grid first: jumps that samplers of so many
    steps take, all samplers alike, and each one's jumps: (count,) each. steps: a multiple of all of these.
    """
    which = torch.floor(stratified(count, device) * len(samplers)).long()
    size = torch.full_like(which, steps // samplers[0])
    for i, n in enumerate(samplers[1:], 1):
        size.masked_fill_(which >= i, steps // n)
    number = torch.floor(torch.rand(count, device=device) * (steps // size)).long()
    return number * size, (number + 1) * size


def noised(t: Tensor, path: Path) -> Tensor:
    """Return times (B,) that are not so early that what noise there is drowns in rounding: with log SNR up to 20."""
    return torch.maximum(t, path.time_at(torch.full_like(t, 20.0)))
