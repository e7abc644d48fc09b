"""Latent consistency distillation: a student of a guided teacher, in large steps of its solver (Luo et al., 2023).

The student is told the scale of guidance (section 4.2), drawn anew for each sample, and compared at times that are
`intervals` of the path apart (section 4.3): of a schedule of 1,000 steps, 50 are their k = 20. An adapter over the
teacher learns one scale and needs not be told it (Luo et al., 2023b, LCM-LoRA).
"""

from __future__ import annotations

from typing import final

import torch
from pydantic import Field

from scaletrain.config import Recipe
from scaletrain.data.sources import Rows
from scaletrain.diffusion.intervals import Even, Intervals
from scaletrain.errors import UserError
from scaletrain.objectives import _consistency
from scaletrain.objectives.base import Networks
from scaletrain.player import Batch, Term, Turn


class Config(_consistency.Config):
    """Options of `objective` for `type: lcm`."""

    intervals: Intervals = Even(count=50)
    scales: tuple[float, float] | None = Field(None, strict=False)
    """Draw the scale of guidance evenly from here to there, and tell the student; by default it learns `guidance`."""


@final
class Objective(_consistency.Objective[Config]):
    """Train `student` on what `teacher`, which is frozen, says under guidance."""

    def __init__(self, config: Config, recipe: Recipe):
        super().__init__(config, recipe)
        if not config.scales:
            return
        low, high = config.scales
        if not 0 < low < high:
            raise UserError(f"objective.scales: [{low:g}, {high:g}] is no range above 0.")
        adapter = recipe.networks["student"].adapter if "student" in recipe.networks else None
        if adapter and not any(word.endswith("guidance") for word in adapter.train_also):
            raise UserError(
                "objective.scales: an adapter leaves out the layer by which the student is told it: leave `scales` "
                "out and give one `guidance`, or have networks.student.adapter.train_also: [conditions.guidance]."
            )
        self.scales, self.unconditioned = (low, high), True

    def prepare(self, train: Rows, eval: Rows | None) -> None:
        """Find what is denoised, and that the teacher can be guided. Raises UserError."""
        super().prepare(train, eval)
        if self.signature.condition is None:
            raise UserError("objective.condition: guidance needs a condition; set it to what the teacher is told.")
        if self.scales:
            self.require_guidable("scales")

    def loss(self, turn: Turn, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the difference between two times of the guided teacher's trajectory."""
        x0, batch = self.data(batch)
        told, teacher = self.told(batch), self.teacher(networks, batch)
        student, target = (d.given(**told) for d in (self.student(networks), self.target(networks)))
        t, s = self.between(len(x0), x0.device)
        z = student.path.noisy(x0, torch.randn_like(x0), t)
        y = self.along_flow(teacher, z, t, s)
        return {"loss": Term(self.difference(student, target, z, t, y, s).sum(), "samples")}
