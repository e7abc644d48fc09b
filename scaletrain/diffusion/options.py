"""The options that all diffusion objectives share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from scaletrain.config import Strict
from scaletrain.diffusion.denoiser import Denoiser
from scaletrain.diffusion.path import Cosine
from scaletrain.diffusion.prediction import Prediction, Weighting


class DiffusionOptions(Strict):
    """How a network is read, and how its errors are weighed."""

    prediction: Prediction = "v"
    """What the network predicts: the noise, the data, or the velocity between them."""
    weighting: Weighting = "snr_plus_one"
    """Of errors, by what it is for x₀ (see `scaletrain.diffusion.prediction.weight`)."""
    clip: bool = False
    """Keep the predicted x₀ in [-1, 1] while sampling."""

    def denoiser(self, network: Callable[[Tensor, Tensor], Tensor]) -> Denoiser:
        """Read a network by these options."""
        return Denoiser(network, Cosine(), self.prediction, self.clip)
