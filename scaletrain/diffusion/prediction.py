"""What a network predicts of z = α x₀ + σ ε, what the others are given one, and how errors are weighed.

Legend: as in `scaletrain.diffusion.path`. v = α ε − σ x₀ (Salimans & Ho, 2022, appendix D). Each conversion is exact
for any α, σ, whether or not α² + σ² = 1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["eps", "x0", "v"]
Weighting = Literal["snr", "snr_plus_one", "truncated_snr", "min_snr"]


def to_x0(kind: Prediction, output: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the x₀ that a prediction of this kind means at z."""
    if kind == "x0":
        return output
    if kind == "eps":
        return (z - sigma * output) / alpha
    return (alpha * z - sigma * output) / (alpha**2 + sigma**2)


def to_eps(kind: Prediction, output: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the ε that a prediction of this kind means at z."""
    if kind == "eps":
        return output
    if kind == "x0":
        return (z - alpha * output) / sigma
    return (sigma * z + alpha * output) / (alpha**2 + sigma**2)


def from_x0(kind: Prediction, x0: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return what a network of this kind has to answer at z for it to mean x₀."""
    if kind == "x0":
        return x0
    eps = (z - alpha * x0) / sigma
    return eps if kind == "eps" else alpha * eps - sigma * x0


def weight(weighting: Weighting, kind: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the factor of a squared error of a prediction of this kind.

    The weighting is named by what it is for a squared error of x₀; the factor that comes back is that, times
    (∂x₀/∂prediction)², so that the loss does not depend on the kind:

    snr: α²/σ², the plain ε loss (Ho et al., 2020). snr_plus_one: SNR + 1, the plain v loss; truncated_snr: max(SNR, 1)
    (both Salimans & Ho, 2022, section 4). min_snr: min(SNR, 5) (Hang et al., 2023, section 3.4).
    """
    snr = (alpha / sigma) ** 2
    if weighting == "snr":
        factor = snr
    elif weighting == "snr_plus_one":
        factor = snr + 1
    elif weighting == "truncated_snr":
        factor = snr.clamp(min=1)
    else:
        factor = snr.clamp(max=5)
    if kind == "x0":
        return factor
    slope = sigma / alpha if kind == "eps" else sigma / (alpha**2 + sigma**2)
    return factor * torch.square(slope)
