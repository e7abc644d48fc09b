"""Deterministic samplers: from noise at time 1 along a denoiser's probability flow to data at time 0."""

from __future__ import annotations

import torch
from torch import Tensor

from scaletrain.diffusion.denoiser import Denoiser
from scaletrain.diffusion.path import Path


def ddim_step(denoiser: Denoiser, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Take one step of DDIM, from z (B, ...) at times t (B,) to times s (B,) (Song et al., 2021, equation 12)."""
    x0, eps = denoiser(z, t)
    return denoiser.path.noisy(x0, eps, s)


def sample(denoiser: Denoiser, noise: Tensor, steps: int) -> Tensor:
    """Return what DDIM makes of noise (B, ...) in `steps` even steps of time: the last step's x₀."""
    z = noise
    for i in range(steps, 1, -1):
        t, s = (torch.full((len(z),), j / steps, device=z.device) for j in (i, i - 1))
        z = ddim_step(denoiser, z, t, s)
    return denoiser(z, torch.full((len(z),), 1 / steps, device=z.device))[0]


def implied_x0(path: Path, z: Tensor, t: Tensor, z_s: Tensor, s: Tensor) -> Tensor:
    """Return the x₀ with which one DDIM step leads from z at times t to z_s at earlier times s (B,).

    That is what a student of one step has to predict where its teacher took several (Salimans & Ho, 2022, algorithm 2).
    """
    (alpha, sigma), (alpha_s, sigma_s) = path.at(t, z), path.at(s, z)
    ratio = sigma_s / sigma
    return (z_s - ratio * z) / (alpha_s - ratio * alpha)
