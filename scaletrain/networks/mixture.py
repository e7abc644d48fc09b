"""A mixture of Gaussians as a denoiser: its score is known in closed form, so that it is a teacher without error.

x₀ ~ 1/K Σ_k N(m_k, s² I). At z = α x₀ + σ ε, mode k has the posterior weight w_k ∝ N(z; α m_k, v I), v = α² s² + σ²,
and E[x₀ | z] = Σ_k w_k (m_k + α s² / v · (z − α m_k)).
"""

from __future__ import annotations

from typing import Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn

from scaletrain.config import Strict
from scaletrain.errors import UserError


class Config(Strict):
    """Options of `networks.<name>.config` for `type: mixture`."""

    modes: Literal["ring", "grid", "random"] = "ring"
    """ring: evenly on a circle; grid: on a square (cubic) lattice around 0; random: on a sphere, drawn once."""
    count: int = Field(8, ge=1)
    radius: float = Field(4.0, gt=0)
    """Of the circle or the sphere."""
    spacing: float = Field(2.0, gt=0)
    """grid: between neighbours."""
    sigma: float = Field(0.2, gt=0)
    """Standard deviation of each mode."""
    dim: int = Field(2, ge=1)


@final
class Mixture(nn.Module):
    """z (B, D), α and σ (B,) -> E[x₀ | z] (B, D), in closed form."""

    means: Tensor

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.sigma = config, config.sigma
        self.register_buffer("means", _means(config), persistent=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample: (D,)."""
        return tuple(self.means.shape[1:])

    @property
    def std(self) -> float:
        """Standard deviation of a coordinate, over all."""
        return float((self.means.double().var(0, correction=0).mean() + self.sigma**2).sqrt())

    def forward(self, z: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        """Return E[x₀ | z], and with a label (B,) that of this mode alone; K, and no label, stand for all modes."""
        alpha, sigma = alpha[:, None], sigma[:, None]
        means = self.means.to(z)
        variance = (alpha * self.sigma) ** 2 + sigma**2
        # Differences first: squares of z and of α m would cancel.
        apart = z[:, None] - alpha[..., None] * means
        logits = -apart.square().sum(-1) / (2 * variance)
        if label is not None:
            own = nn.functional.one_hot(label, len(means) + 1).bool()
            logits = logits.masked_fill(~(own[:, :-1] | own[:, -1:]), -torch.inf)
        centre = torch.softmax(logits, 1) @ means
        return centre + alpha * self.sigma**2 / variance * (z - alpha * centre)

    def draw(self, count: int, label: Tensor | None = None) -> Tensor:
        """Return samples (count, D) from torch's global generator: of all modes, or of those of labels (count,)."""
        means = self.means
        chosen = torch.randint(len(means), (count,), device=means.device) if label is None else label
        return means[chosen] + self.sigma * torch.randn(count, means.shape[1], device=means.device)

    def nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distance of x (N, D) to the nearest mode, and which that is: (N,) each."""
        return torch.cdist(x, self.means.to(x)).min(1)


def _means(config: Config) -> Tensor:
    """Return the centres (K, D). Raises UserError for a shape that there is not."""
    if config.modes == "ring":
        if config.dim != 2:
            raise UserError(f"mixture: a ring has dim 2, not {config.dim}; take `modes: random`")
        angles = torch.arange(config.count) * (2 * torch.pi / config.count)
        return config.radius * torch.stack([angles.cos(), angles.sin()], 1)
    if config.modes == "grid":
        side = round(config.count ** (1 / config.dim))
        if side**config.dim != config.count:
            raise UserError(f"mixture: a grid of dim {config.dim} has n^{config.dim} modes, not {config.count}")
        axis = (torch.arange(side) - (side - 1) / 2) * config.spacing
        return torch.cartesian_prod(*[axis] * config.dim).view(config.count, config.dim)
    directions = torch.randn(config.count, config.dim, generator=torch.Generator().manual_seed(0))
    return config.radius * nn.functional.normalize(directions)


def build(config: Config) -> nn.Module:
    """Build the mixture."""
    return Mixture(config)
