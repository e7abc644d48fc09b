"""Consistency trajectory models: a student that jumps from any time to any earlier one along its teacher's flow.

Kim et al. (2024). With what it answers, g(z, t, s), the jump is G(z, t, s) = s/t z + (1 − s/t) g on their path, α = 1
(equation 5), and a step of DDIM on every path, so that G(z, t, t) = z. It learns to get from t to s at once where it
gets when the teacher's solver goes a part of the way, to u (soft consistency, equation 6); and, where no time passes,
to denoise (their auxiliary loss, equation 9).

Differences from there: the jumps are compared by the squared error of g, not by a distance of pictures at the first
time; a sample is for one of the two losses; no adversarial loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn

from scaletrain.config import Recipe
from scaletrain.diffusion.denoiser import Denoiser
from scaletrain.diffusion.jumps import any_pairs, ddim_jump, sampler_pairs, teacher_step, travel
from scaletrain.diffusion.path import beside
from scaletrain.diffusion.solvers import implied_x0
from scaletrain.errors import UserError
from scaletrain.evaluate.few_steps import Sampler
from scaletrain.objectives import _jumping
from scaletrain.objectives._jumping import Jumps


class Config(_jumping.Config):
    """Options of `objective` for `type: ctm`."""

    learn: Literal["teacher", "data"] = "data"
    """Whose x₀ the auxiliary loss teaches: that of the data, or the teacher's."""
    solver: Literal["ddim", "heun"] = "ddim"
    """Of the teacher; heun's last step, to the first time, is DDIM's."""
    teacher_steps: int = Field(32, ge=2)
    """Of the grid that t, u and s are on."""
    solver_steps: int = Field(8, ge=1)
    """Most steps of the grid that the teacher's solver takes from t to u: any number up to it, but none beyond s. The
    larger, the less the student is taught by itself."""
    samplers: list[Annotated[int, Field(ge=1)]] = Field([1, 2, 4], min_length=1)
    """Steps of samplers that have a share of the jumps; one that is named twice, twice."""
    sampled: float = Field(0.0, ge=0, le=1)
    """Share of the jumps that these samplers take; the others are between any times."""
    gamma: float = Field(0.0, ge=0, le=1)
    """Of samples: how much of the noise at each time is drawn anew; 0 none, 1 all of it."""


@final
class Objective(_jumping.Objective[Config]):
    """Train `student` on what `teacher`, which is frozen, does to noisy samples of the data."""

    def __init__(self, config: Config, recipe: Recipe):
        if "teacher" not in recipe.networks:
            raise UserError("networks.teacher is missing: say whose solver the student learns from.")
        super().__init__(config, recipe)
        self.teacher_steps = config.teacher_steps
        for steps in config.samplers if config.sampled else ():
            if config.teacher_steps % steps:
                raise UserError(
                    f"objective.teacher_steps ({config.teacher_steps}) must be a multiple of {steps}, which is in "
                    f"`samplers`."
                )

    def jumps(self, student: Denoiser, teacher: Denoiser | None, x0: Tensor) -> Jumps:
        """Return jumps from t to s and where the teacher, to u, and from there the student get."""
        assert teacher is not None
        path, config, device = student.path, self.config, x0.device
        grid = path.times(config.teacher_steps, device)
        start, end = any_pairs(len(x0), config.teacher_steps, device)
        if config.sampled:
            own = sampler_pairs(len(x0), config.samplers, config.teacher_steps, device)
            chosen = torch.rand(len(x0), device=device) < config.sampled
            start, end = torch.where(chosen, own[0], start), torch.where(chosen, own[1], end)
        solved = 1 + torch.floor(torch.rand(len(x0), device=device) * config.solver_steps).long()
        between = torch.minimum(start + solved, end)
        t, u, s = grid[start], grid[between], grid[end]
        z = path.noisy(x0, torch.randn_like(x0), t)
        reached = self.solved(teacher, z, grid, start, between)
        # The jump from s to s is none, but for rounding, and for what is not defined at σ = 0.
        reached = torch.where(beside(between == end, z), reached, ddim_jump(student, reached, u, s))
        target = implied_x0(path, z, t, reached, s)
        return Jumps(z, t, path.told(s), target, student.reading.split(target, z, t, "x0")[1])

    def solved(self, teacher: Denoiser, z: Tensor, grid: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """Return where the teacher's solver gets from z, at numbers of times of a grid (B,), at later numbers (B,)."""
        for i in range(min(self.config.solver_steps, self.config.teacher_steps)):
            now, then = (start + i).minimum(end), (start + i + 1).minimum(end)
            stepped = teacher_step(teacher, z, grid[now], grid[then], self.config.solver)
            z = torch.where(beside(now == then, z), z, stepped)
        return z

    def sampler(self, network: nn.Module) -> Sampler:
        """Return the student's jumps over the path's grid, with noise between them under `gamma`."""
        student = self.drawing(network)

        def draw(noise: Tensor, steps: int, told: Mapping[str, Tensor]) -> Tensor:
            return travel(student.given(**told), ddim_jump, noise, steps, self.config.gamma)

        return draw
