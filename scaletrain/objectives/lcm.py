"""Latent consistency distillation: a student of a guided teacher, in large steps of its solver (Luo et al., 2023).

The student is told the scale of guidance (section 4.2), drawn anew for each sample, and compared at times that are
`intervals` of the path apart (section 4.3): of a schedule of 1,000 steps, 50 are their k = 20. An adapter over the
teacher learns one scale and needs not be told it (Luo et al., 2023b, LCM-LoRA).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from pydantic import Field
from torch import Tensor, nn

from scaletrain.config import Recipe
from scaletrain.data.sources import Rows
from scaletrain.diffusion.intervals import Even, Intervals
from scaletrain.errors import UserError
from scaletrain.evaluate.few_steps import Sampler
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
        if not low <= config.guidance <= high:
            raise UserError(
                f"objective.guidance: samples are drawn at {config.guidance:g}, and the student learns `scales` from "
                f"{low:g} to {high:g}."
            )
        adapter = recipe.networks["student"].adapter if "student" in recipe.networks else None
        if adapter and not any(word.endswith("guidance") for word in adapter.train_also):
            raise UserError(
                "objective.scales: an adapter leaves out the layer by which the student is told it: leave `scales` "
                "out and give one `guidance`, or have networks.student.adapter.train_also: [conditions.guidance]."
            )
        self.tells = ("guidance",)

    def prepare(self, train: Rows, eval: Rows | None) -> None:
        """Find what is denoised, and that the teacher can be guided. Raises UserError."""
        super().prepare(train, eval)
        if self.signature.condition is None:
            raise UserError("objective.condition: guidance needs a condition; set it to what the teacher is told.")
        if self.config.scales:
            self._signature = self.signature.model_copy(update={"guidance": self.config.scales})

    def loss(self, turn: Turn, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the difference between two times of the guided teacher's trajectory."""
        x0, batch = self.data(batch)
        told, teacher = self.told(batch), self.teacher(networks, batch)
        if self.config.scales:
            scale = torch.empty(len(x0), device=x0.device).uniform_(*self.config.scales)
            told, teacher = {**told, "guidance": scale}, self.guided(teacher, scale)
        student, target = (d.given(**told) for d in (self.student(networks), self.target(networks)))
        t, s = self.between(len(x0), x0.device)
        z = student.path.noisy(x0, torch.randn_like(x0), t)
        y = self.along_flow(teacher, z, t, s)
        return {"loss": Term(self.difference(student, target, z, t, y, s).sum(), "samples")}

    def sampler(self, network: nn.Module) -> Sampler:
        """Sample at the recipe's scale of guidance."""
        plain = super().sampler(network)
        if not self.config.scales:
            return plain

        def draw(noise: Tensor, steps: int, told: Mapping[str, Tensor]) -> Tensor:
            scale = torch.full((len(noise),), self.config.guidance, device=noise.device)
            return plain(noise, steps, {**told, "guidance": scale})

        return draw
