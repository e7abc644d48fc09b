"""How the output of a network is read: on which path it was trained, and what it predicts there."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from scaletrain.config import Strict
from scaletrain.diffusion.path import AnyPath, Cosine
from scaletrain.diffusion.prediction import Prediction


class Reading(Strict):
    """A path, what a network predicts on it, and, for `edm`, the standard deviation of the data."""

    path: AnyPath = Cosine()
    prediction: Prediction = "v"
    data_std: float = Field(1.0, gt=0)

    @property
    def begins_blind(self) -> bool:
        """Whether the prediction tells nothing of x₀ at the last time of the path, where α is 0."""
        alpha, _ = self.path.alpha_sigma(torch.tensor(self.path.last))
        return self.prediction in ("eps", "score") and float(alpha) == 0

    def scale(self, alpha: Tensor, sigma: Tensor) -> Tensor | None:
        """Return what z is divided by before the network, for `edm`; None for nothing."""
        return torch.sqrt((self.data_std * alpha) ** 2 + sigma**2) if self.prediction == "edm" else None

    def parts(self, t: Tensor, like: Tensor, kind: Prediction | None = None) -> tuple[Tensor, Tensor]:
        """Return a and b of the prediction a x₀ + b ε at times t (B,), shaped as `Path.at` shapes.

        kind: another prediction than this one's.
        """
        kind = kind or self.prediction
        alpha, sigma = self.path.at(t, like)
        one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
        if kind in ("x0", "exact"):
            return one, zero
        if kind == "eps":
            return zero, one
        if kind == "v":
            return -sigma, alpha
        if kind == "score":
            return zero, -1 / sigma
        if kind == "velocity":
            slopes = self.path.slopes(t)
            return slopes[0].view_as(alpha), slopes[1].view_as(alpha)
        scale = torch.sqrt((self.data_std * alpha) ** 2 + sigma**2)
        return sigma / (self.data_std * scale), -self.data_std * alpha / scale

    def split(self, output: Tensor, z: Tensor, t: Tensor, kind: Prediction | None = None) -> tuple[Tensor, Tensor]:
        """Return the x₀ and ε (B, ...) that a prediction means at z and times t (B,)."""
        alpha, sigma = self.path.at(t, z)
        kind = kind or self.prediction
        if kind in ("x0", "exact"):
            return output, (z - alpha * output) / sigma
        if kind == "score":
            output, kind = -sigma * output, "eps"
        if kind == "eps":
            return (z - sigma * output) / alpha, output
        a, b = self.parts(t, z, kind)
        whole = alpha * b - sigma * a
        return (b * z - sigma * output) / whole, (alpha * output - a * z) / whole

    def joined(self, x0: Tensor, z: Tensor, t: Tensor, kind: Prediction | None = None) -> Tensor:
        """Return what a network has to answer at z and times t for it to mean x₀ (B, ...)."""
        kind = kind or self.prediction
        if kind in ("x0", "exact"):
            return x0
        alpha, sigma = self.path.at(t, z)
        a, b = self.parts(t, z, kind)
        # b ε = b (z − α x₀) / σ; a − b α / σ is −(determinant) / σ
        return (b * z - (alpha * b - sigma * a) * x0) / sigma

    def slopes(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return ∂x₀/∂prediction and ∂ε/∂prediction at times t, shaped as `Path.at` shapes."""
        alpha, sigma = self.path.at(t, like)
        if self.prediction in ("x0", "exact"):
            return torch.ones_like(alpha), -alpha / sigma
        a, b = self.parts(t, like)
        whole = alpha * b - sigma * a
        return -sigma / whole, alpha / whole
