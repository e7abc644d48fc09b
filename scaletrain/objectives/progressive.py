"""Progressive distillation: a student learns to do in one step of DDIM what its teacher does in several.

Salimans & Ho (2022), algorithm 2. As stages of a run, each with the student of the one before as its teacher, 32 steps
become 16, 8, 4, 2 and 1.
"""

from __future__ import annotations

from typing import final

import torch
from pydantic import Field
from torch import Tensor

from scaletrain.config import Recipe
from scaletrain.diffusion.denoiser import Denoiser
from scaletrain.diffusion.solvers import ddim_step, implied_x0
from scaletrain.diffusion.times import stratified
from scaletrain.errors import UserError
from scaletrain.evaluate.few_steps import Sampler
from scaletrain.objectives import _denoising
from scaletrain.objectives.base import Networks, RunView
from scaletrain.player import Batch, Term, Turn


class Config(_denoising.Config):
    """Options of `objective` for `type: progressive`."""

    steps: int = Field(ge=1)
    """Of the student, for a sample."""
    teacher_steps: int = Field(ge=2)
    """Of the teacher; a multiple of the student's."""


@final
class Objective(_denoising.Objective[Config]):
    """Train `student` on what `teacher`, which is frozen, does to noisy samples of the data."""

    def __init__(self, config: Config, recipe: Recipe):
        super().__init__(config, recipe)
        self.steps, self.teacher_steps = config.steps, config.teacher_steps
        if config.solver != "ddim":
            raise UserError(
                f"objective.solver: steps of DDIM are what is distilled, not of {config.solver}; leave it out."
            )
        if config.teacher_steps % config.steps or config.teacher_steps == config.steps:
            raise UserError(
                f"objective.teacher_steps ({config.teacher_steps}) must be 2 or more times objective.steps "
                f"({config.steps})"
            )

    def loss(self, turn: Turn, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the weighted squared error to the teacher, at times that are spread over the student's steps."""
        x0, batch = self.data(batch)
        student, steps = self.student(networks, batch), self.config.steps
        number = torch.floor(stratified(len(x0), x0.device) * steps).long()
        grid = student.path.times(self.config.teacher_steps, x0.device)
        t = grid[number * (self.config.teacher_steps // steps)]
        z = student.path.noisy(x0, torch.randn_like(x0), t)
        with torch.no_grad():
            target = self.target(self.teacher(networks, batch), z, grid, number)
        return {"loss": Term(student.loss(z, t, target, self.config.weighting).sum(), "samples")}

    def target(self, teacher: Denoiser, z: Tensor, grid: Tensor, number: Tensor) -> Tensor:
        """Return the x₀ with which the student would get in one step to where the teacher gets from z.

        grid: the teacher's times, falling. number: of the student's step, (B,), 0 the first.
        """
        each = self.config.teacher_steps // self.config.steps
        reached = z
        for i in range(each):
            now, then = grid[number * each + i], grid[number * each + i + 1]
            reached = ddim_step(teacher, reached, now, then)
        return implied_x0(teacher.path, z, grid[number * each], reached, then)

    def samplers(self, view: RunView, stage: str) -> dict[int, Sampler]:
        """Return the student, at its own number of steps."""
        return {self.config.steps: self.sampler(view.network(stage, self.trained))}
