"""A network read as a denoiser: at any time of a path, what it takes z for in terms of x₀ and ε."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scaletrain.diffusion.path import Path
from scaletrain.diffusion.prediction import Prediction, Weighting, from_x0, to_eps, to_x0, weight


@dataclass(frozen=True)
class Denoiser:
    """A network (z (B, ...), t (B,)) -> prediction (B, ...), the path that it was trained on, and what it predicts.

    clip: bring x₀ into [-1, 1], the range of pictures, and change ε to agree with it (Ho et al., 2020, section 3.2).
    """

    network: Callable[[Tensor, Tensor], Tensor]
    path: Path
    prediction: Prediction
    clip: bool = False

    def __call__(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return x₀ and ε (B, ...) at z and times t (B,), in fp32."""
        alpha, sigma = self.path.at(t, z)
        output = self.network(z, t).float()
        x0 = to_x0(self.prediction, output, z, alpha, sigma)
        if self.clip:
            x0 = x0.clamp(-1, 1)
            return x0, to_eps("x0", x0, z, alpha, sigma)
        return x0, to_eps(self.prediction, output, z, alpha, sigma)

    def loss(self, z: Tensor, t: Tensor, x0: Tensor, weighting: Weighting) -> Tensor:
        """Return the weighted squared error for a target x₀, a mean over the values of each sample: (B,), fp32.

        It is taken in the network's own terms, where rounding does not grow with the SNR.
        """
        alpha, sigma = self.path.at(t, z)
        error = self.network(z, t).float() - from_x0(self.prediction, x0, z, alpha, sigma)
        return (weight(weighting, self.prediction, alpha, sigma) * torch.square(error)).flatten(1).mean(1)
