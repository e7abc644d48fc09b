"""What a network predicts of z = α x₀ + σ ε, what the others are given one, and how errors are weighed.

Legend: as in `scaletrain.diffusion.path`. Every prediction is some a x₀ + b ε. With z = α x₀ + σ ε that is a system of
two equations, so one formula converts between all of them, for any path; its determinant is α b − σ a.

| prediction | a | b | |
|---|---|---|---|
| eps | 0 | 1 | the noise (Ho et al., 2020) |
| x0 | 1 | 0 | the data |
| v | −σ | α | Salimans & Ho, 2022, appendix D |
| velocity | dα/dt | dσ/dt | dz/dt, of flow matching (Lipman et al., 2023) |
| score | 0 | −1/σ | ∇ log p(z) (Song et al., 2021) |
| edm | σ / (d s) | −α d / s | F of Karras et al., 2022, equation 7: x₀ = c_skip z + c_out F |
| exact | 1 | 0 | x₀ of a network that is told α and σ, not t: a distribution in closed form |

d is the standard deviation of the data, s² = α² d² + σ², and c_skip = α d² / s², c_out = σ d / s, so that F has unit
variance; the network is given z / s. On α = 1 these are Karras et al.'s; on α² + σ² = 1 and d = 1, F = −v.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["eps", "x0", "v", "velocity", "score", "edm", "exact"]
Weighting = Literal["plain", "x0", "snr", "snr_plus_one", "truncated_snr", "min_snr", "p2"]


def weight(weighting: Weighting, of_x0: Tensor, of_eps: Tensor) -> Tensor:
    """Return the factor of a squared error of a prediction, with which x₀ and ε change as ∂x₀/∂prediction and
    ∂ε/∂prediction.

    plain: 1, the squared error of what the network predicts: for `edm` that of Karras et al. (2022), for `velocity`
    that of flow matching. The others are named by what they are for a squared error of x₀, so that the loss does not
    depend on the prediction. A squared error of ε is SNR times that of x₀; so said, none is lost where σ is 0:

    x0: 1. snr: α²/σ², the plain ε loss (Ho et al., 2020). snr_plus_one: SNR + 1, the plain v loss; truncated_snr:
    max(SNR, 1) (both Salimans & Ho, 2022, section 4). min_snr: min(SNR, 5) (Hang et al., 2023, section 3.4). p2: SNR /
    (1 + SNR) (Choi et al., 2022, equation 8, k = γ = 1).
    """
    if weighting == "plain":
        return torch.ones_like(of_x0)
    x0, eps = of_x0.square(), of_eps.square()
    if weighting == "x0":
        return x0
    if weighting == "snr":
        return eps
    if weighting == "snr_plus_one":
        return x0 + eps
    if weighting == "truncated_snr":
        return torch.maximum(x0, eps)
    if weighting == "min_snr":
        return torch.minimum(5 * x0, eps)
    return x0 * eps / (x0 + eps)
