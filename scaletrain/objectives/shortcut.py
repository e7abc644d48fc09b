"""Shortcut models: a velocity that is told the step to take, so that one long step comes to what two half ones do.

Frans et al. (2025). Steps are those of samplers of 1, 2, 4 ... `finest` steps; for some samples the step is 0 and the
target is the velocity of flow matching, from data or from a teacher. The paper's path is `flow`, where a jump is
x + d s(x, t, d); on others a jump is a step of DDIM, which is the same there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn

from scaletrain.config import Recipe
from scaletrain.diffusion.denoiser import Denoiser
from scaletrain.diffusion.jumps import sampler_pairs, teacher_step, travel
from scaletrain.diffusion.path import Path, beside
from scaletrain.diffusion.solvers import ddim_step, implied_x0
from scaletrain.errors import UserError
from scaletrain.evaluate.few_steps import Sampler
from scaletrain.objectives import _jumping
from scaletrain.objectives._jumping import Jumps


class Config(_jumping.Config):
    """Options of `objective` for `type: shortcut`."""

    still: float = Field(0.75, gt=0, lt=1)
    """Share of the samples that teach the velocity; the others teach jumps."""
    solver: Literal["ddim", "heun"] = "ddim"
    """Of the teacher; heun's last step, to the first time, is DDIM's."""
    finest: int = Field(128, ge=2)
    """Jumps of the finest sampler, a power of 2. Half of one of these is a step of the teacher's or, where the student
    learns from data, a step with what it answers for a step of 0."""


@final
class Objective(_jumping.Objective[Config]):
    """Train `student` so that each jump agrees with two half ones."""

    def __init__(self, config: Config, recipe: Recipe):
        super().__init__(config, recipe)
        if config.finest & (config.finest - 1):
            raise UserError(f"objective.finest ({config.finest}) must be a power of 2.")
        self._samplers = [2**level for level in range(config.finest.bit_length())]

    def jumps(self, student: Denoiser, teacher: Denoiser | None, x0: Tensor) -> Jumps:
        """Return jumps and what two half ones come to (Frans et al., 2025, equation 4 and algorithm 1)."""
        path, finest = student.path, self.config.finest
        first, last = sampler_pairs(len(x0), self._samplers, finest, x0.device)
        grid = path.times(2 * finest, x0.device)
        t, half, s = grid[2 * first], grid[first + last], grid[2 * last]
        z = path.noisy(x0, torch.randn_like(x0), t)
        size = (last - first) / finest
        halves = student.given(target=self.told_size(size / 2))
        reached = ddim_step(halves, ddim_step(halves, z, t, half), half, s)
        if self.config.learn == "teacher":
            assert teacher is not None
            solver = self.config.solver
            known = teacher_step(teacher, teacher_step(teacher, z, t, half, solver), half, s, solver)
            reached = torch.where(beside(last - first == 1, z), known, reached)
        target = implied_x0(path, z, t, reached, s)
        return Jumps(z, t, self.told_size(size), target, student.reading.split(target, z, t, "x0")[1])

    def told_size(self, size: Tensor) -> Tensor:
        """Return what the student is told of a jump of so much of the grid (B,), 1 for all of it: its logarithm, from 1
        down to 0 for half of the finest jump, and for none.
        """
        return 1 + torch.log2(size) / (1 + math.log2(self.config.finest))

    def nowhere(self, path: Path, t: Tensor) -> Tensor:
        """Tell that there is no step."""
        return torch.zeros_like(t)

    def sampler(self, network: nn.Module) -> Sampler:
        """Return the student's jumps over the path's grid."""
        student = self.drawing(network)

        def draw(noise: Tensor, steps: int, told: Mapping[str, Tensor]) -> Tensor:
            size = self.told_size(torch.full((len(noise),), 1 / steps, device=noise.device)).clamp(min=0)
            return travel(student.given(target=size, **told), ddim_step, noise, steps)

        return draw
