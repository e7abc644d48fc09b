"""Consistency models: a student says at any time of a trajectory which data it comes from (Song et al., 2023).

Distilled (CD, algorithm 2): the earlier point is where a teacher's solver gets from the later one. Trained (CT,
algorithm 3): it is of the same data and noise. With targets of the student itself and a pseudo-Huber loss these are
Song & Dhariwal's (2024); with `intervals: {type: near}`, Geng et al.'s (2025).
"""

from __future__ import annotations

from typing import Literal, final

import torch

from scaletrain.config import Recipe
from scaletrain.diffusion.intervals import Even, Intervals
from scaletrain.errors import UserError
from scaletrain.objectives import _consistency
from scaletrain.objectives.base import Networks
from scaletrain.player import Batch, Term, Turn


class Config(_consistency.Config):
    """Options of `objective` for `type: consistency`."""

    intervals: Intervals = Even()
    learns_from: Literal["teacher", "data"] = "teacher"
    """Who gives the earlier point: `teacher` distils it; `data` does without one, which is then only compared with."""


@final
class Objective(_consistency.Objective[Config]):
    """Train `student` by consistency, from `teacher`, which is frozen, or from data alone."""

    def __init__(self, config: Config, recipe: Recipe):
        self.needs_teacher = config.learns_from == "teacher" or "teacher" in recipe.networks
        super().__init__(config, recipe)
        if config.learns_from == "data":
            for key in ("guidance", "solver_steps"):
                if getattr(config, key) != 1:
                    raise UserError(f"objective.{key} is for what a teacher says; leave it out, or learn from it.")

    def loss(self, turn: Turn, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the difference between two times of a trajectory."""
        x0, batch = self.data(batch)
        student, target = (d.given(**self.told(batch)) for d in (self.student(networks), self.target(networks)))
        t, s = self.between(len(x0), x0.device)
        eps = torch.randn_like(x0)
        z = student.path.noisy(x0, eps, t)
        if self.config.learns_from == "data":
            y = student.path.noisy(x0, eps, s)
        else:
            y = self.along_flow(self.teacher(networks, batch), z, t, s)
        return {"loss": Term(self.difference(student, target, z, t, y, s).sum(), "samples")}
