"""What the tests of this folder measure against: paths, and data whose answer at any time has a closed form."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from scaletrain.diffusion.path import EDM, Cosine, Discrete, Flow, Linear, Path, Trig

ALPHAS_CUMPROD = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)).tolist()  # of Ho et al., 2020

PATHS: dict[str, Path] = {
    "cosine": Cosine(),
    "shifted": Cosine(shift=0.25),
    "linear": Linear(),
    "discrete": Discrete(alphas_cumprod=ALPHAS_CUMPROD),
    "edm": EDM(),
    "flow": Flow(),
    "trig": Trig(data_std=0.5),
}
MEAN, STD = torch.tensor([0.3, -0.5], dtype=torch.float64), torch.tensor([0.4, 0.1], dtype=torch.float64)


def gaussian(z: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return E[x₀ | z] and E[ε | z] of x₀ ~ N(MEAN, diag STD²) for z (B, 2), α and σ (B, 1)."""
    mean, std = MEAN.to(z), STD.to(z)
    part = (z - alpha * mean) / (alpha**2 * std**2 + sigma**2)
    return mean + alpha * std**2 * part, sigma * part
