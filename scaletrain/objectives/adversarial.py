"""Adversarial distillation: a student of one step or a few, taught by a critic of its samples and by the teacher.

Sauer et al. (2023, ADD). The critic sees samples noised at all times, as that of LADD (Sauer et al., 2024) does, but is
a network of its own rather than a head on features of the teacher.
"""

from __future__ import annotations

from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from scaletrain.config import Recipe
from scaletrain.diffusion.denoiser import Denoiser
from scaletrain.diffusion.times import stratified
from scaletrain.objectives import _judged
from scaletrain.objectives.base import Networks
from scaletrain.player import Batch, Term, Turn


class Config(_judged.Config):
    """Options of `objective` for `type: adversarial`."""

    distillation: float = Field(2.5, ge=0)
    """λ, the weight of the distance to the teacher's x₀ (2023, section 3.1); 0 is none, as in LADD."""
    every: int = Field(1, ge=1)
    """Updates of the critic for one of the student."""
    weighting: ClassVar[None] = None  # type: ignore[misc]
    """There is none: what noised samples tell is weighed as α."""


@final
class Objective(_judged.Objective[Config]):
    """Train `student` on noised data by `critic`, which is trained in turn, and `teacher`, which is frozen."""

    criticised = True

    def __init__(self, config: Config, recipe: Recipe):
        super().__init__(config, recipe)
        self.turns = (Turn("critic", "critic"), Turn("student", "student", every=config.every))

    def loss(self, turn: Turn, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the critic's loss, or the student's by the critic and the teacher."""
        x0, batch = self.data(batch)
        with torch.set_grad_enabled(turn.name == "student" and torch.is_grad_enabled()):
            made = self.made(self.student(networks, batch), x0)
        if turn.name == "critic":
            return self.told_apart(networks, x0, made, batch)
        terms = {"adversarial": Term(self.misled(networks, made, batch), "samples")}
        if self.config.distillation:
            distance = self.distance(self.teacher(networks, batch), made)
            terms["distillation"] = Term(distance.sum(), "samples", weight=self.config.distillation)
        return terms

    def made(self, student: Denoiser, x0: Tensor) -> Tensor:
        """Return what the student makes of data x₀ (B, ...), noised at the times of its steps, evenly (2023, section
        3.1): at the first of them there is next to nothing left of x₀.
        """
        grid = student.path.times(self.config.steps, x0.device)
        t = grid[torch.floor(stratified(len(x0), x0.device) * self.config.steps).long()]
        return student(student.path.noisy(x0, torch.randn_like(x0), t), t)[0]

    def distance(self, teacher: Denoiser, made: Tensor) -> Tensor:
        """Return the weighted squared distance of samples (B, ...) to what the teacher makes of them, noised: (B,).

        The weight falls with noise as α does where the variance is preserved (2023, equation 4, "exponential").
        """
        t = self.config.times.draw(len(made), teacher.path, made.device)
        with torch.no_grad():
            target, _ = teacher(teacher.path.noisy(made, torch.randn_like(made), t), t)
        alpha, sigma = teacher.path.alpha_sigma(t)
        factor = alpha / torch.hypot(alpha, sigma)
        return factor * torch.square(made - target).flatten(1).mean(1)
