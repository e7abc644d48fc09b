"""Diffusion: a network learns to tell data from noise at every level, and samples come of noise step by step.

Ho et al. (2020), Karras et al. (2022) or Lipman et al. (2023), by `path`, `prediction`, `times` and `weighting`; for
prediction types, weights and the grid of times of the first, Salimans & Ho (2022).
"""

from __future__ import annotations

from typing import ClassVar, final

import torch
from pydantic import Field

from scaletrain.config import Recipe
from scaletrain.data.sources import Rows
from scaletrain.diffusion.denoiser import filled
from scaletrain.diffusion.pairing import optimal_pairs
from scaletrain.diffusion.path import beside
from scaletrain.diffusion.times import Times, Uniform
from scaletrain.errors import UserError
from scaletrain.objectives import _denoising
from scaletrain.objectives.base import Networks
from scaletrain.player import Batch, Term, Turn


class Config(_denoising.Config):
    """Options of `objective` for `type: diffusion`."""

    steps: int = Field(32, ge=1)
    """Evaluations of the network for a sample."""
    times: Times = Uniform()
    """At which it is trained."""
    dropped: float = Field(0.0, ge=0, lt=1)
    """Share of the samples whose condition is left out, so that the network can be guided (Ho & Salimans, 2021)."""
    pairing: bool = False
    """Pair noise and data of a micro-batch by optimal transport (Pooladian et al., 2023; Tong et al., 2024)."""


@final
class Objective(_denoising.Objective[Config]):
    """Train `model`, by default a U-Net (for points, a perceptron), on the column `image`, `latent` or `point`.

    With a mixture as `teacher`, its samples are the data.
    """

    trained: ClassVar[str] = "model"
    turns = (Turn("train", "model"),)
    needs_teacher = False

    def __init__(self, config: Config, recipe: Recipe):
        super().__init__(config, recipe)
        if config.dropped and config.condition is None:
            raise UserError("objective.dropped: there is no condition to leave out; set objective.condition=label.")
        self.steps = config.steps
        self.unconditioned = config.dropped > 0

    def prepare(self, train: Rows, eval: Rows | None) -> None:
        """Find what is denoised. Raises UserError that names the row."""
        super().prepare(train, eval)
        self._signature = self.signature.model_copy(update={"dropped": self.config.dropped > 0})
        if self.config.guidance != 1:
            self.require_guidable()

    def loss(self, turn: Turn, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the weighted squared error at times that are spread over the path."""
        x0, batch = self.data(batch)
        model = self.student(networks, self._with_dropped(batch))
        t = self.config.times.draw(len(x0), model.path, x0.device)
        eps = torch.randn_like(x0)
        if self.config.pairing:
            eps = optimal_pairs(x0, eps)
        z = model.path.noisy(x0, eps, t)
        # For a velocity on a path that ends without noise, the target is that of x₀ and ε, not of x₀ and z.
        return {"loss": Term(model.loss(z, t, x0, self.config.weighting, eps).sum(), "samples")}

    def _with_dropped(self, batch: Batch) -> Batch:
        """Leave the condition of some samples out."""
        if not self.config.dropped:
            return batch
        first = next(iter(batch.values()))
        kept = torch.rand(len(first), device=first.device) >= self.config.dropped
        null = {k: filled(v, first.device) for k, v in self.null().items() if k in batch}
        return {**batch, **{k: torch.where(beside(kept, batch[k]), batch[k], v) for k, v in null.items()}}

    def evaluate(self, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the loss with every condition."""
        x0, batch = self.data(batch)
        model = self.student(networks, batch)
        t = self.config.times.draw(len(x0), model.path, x0.device)
        eps = torch.randn_like(x0)
        loss = model.loss(model.path.noisy(x0, eps, t), t, x0, self.config.weighting, eps)
        return {"loss": Term(loss.sum(), "samples")}
