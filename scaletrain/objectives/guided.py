"""Guidance folded into a network: a student says at once what its teacher says in two calls (Meng et al., 2023,
section 3.1).

Without guidance it copies what a teacher says into a network of another kind or size: of a mixture, into one that can
be trained further.
"""

from __future__ import annotations

from typing import final

import torch
from pydantic import Field

from scaletrain.config import Recipe
from scaletrain.data.sources import Rows
from scaletrain.diffusion.times import Times, Uniform
from scaletrain.errors import UserError
from scaletrain.evaluate.few_steps import Sampler
from scaletrain.objectives import _denoising
from scaletrain.objectives.base import Networks, RunView
from scaletrain.player import Batch, Term, Turn


class Config(_denoising.Config):
    """Options of `objective` for `type: guided`."""

    scales: tuple[float, float] | None = Field(None, strict=False)
    """Draw the scale of guidance evenly from here to there, and tell the student; samples then have `guidance`. By
    default the student learns `guidance` alone, and is told nothing."""
    times: Times = Uniform()
    """At which it is trained."""
    steps: int = Field(32, ge=1)
    """Of a sample."""


@final
class Objective(_denoising.Objective[Config]):
    """Train `student` to say what `teacher`, which is frozen, says under guidance."""

    def __init__(self, config: Config, recipe: Recipe):
        super().__init__(config, recipe)
        self.steps = self.teacher_steps = config.steps
        if config.scales:
            low, high = config.scales
            if not 0 < low < high:
                raise UserError(f"objective.scales: [{low:g}, {high:g}] is no range above 0.")
            self.scales, self.unconditioned = (low, high), True

    def prepare(self, train: Rows, eval: Rows | None) -> None:
        """Find what is denoised, and that the teacher can be guided. Raises UserError."""
        super().prepare(train, eval)
        if self.scales:
            self.require_guidable("scales")

    def loss(self, turn: Turn, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the weighted squared error to the teacher's x₀ at times that are spread over the path."""
        x0, batch = self.data(batch)
        student, teacher = self.student(networks, batch), self.teacher(networks, batch)
        t = self.config.times.draw(len(x0), student.path, x0.device)
        z = student.path.noisy(x0, torch.randn_like(x0), t)
        with torch.no_grad():
            target, eps = teacher(z, t)
        return {"loss": Term(student.loss(z, t, target, self.config.weighting, eps).sum(), "samples")}

    def samplers(self, view: RunView, stage: str) -> dict[int, Sampler]:
        """Return the student, at its own number of steps, which is its teacher's."""
        return {self.config.steps: self.sampler(view.network(stage, self.trained))}
