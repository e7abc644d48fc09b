"""What students share that are told where to jump: part of the samples teach them the velocity, where no time passes,
the others what their own method says of a jump.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Generic, Literal, NamedTuple, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from scaletrain.config import Recipe
from scaletrain.diffusion.denoiser import Denoiser
from scaletrain.diffusion.jumps import noised
from scaletrain.diffusion.path import Path
from scaletrain.diffusion.times import Times, Uniform
from scaletrain.errors import UserError
from scaletrain.objectives import _denoising
from scaletrain.objectives.base import Networks
from scaletrain.player import Batch, Term, Turn

_SMALL = 1e-3  # beside a squared error that a weight divides by


class Config(_denoising.Config):
    """Options that all of them have."""

    steps: int = Field(1, ge=1)
    """Of a sample, by default."""
    learn: Literal["teacher", "data"] = "teacher"
    """Whose velocity: the teacher's, or that of each sample and its noise, as in flow matching."""
    still: float = Field(0.25, gt=0, lt=1)
    """Share of the samples that teach the velocity; the others teach jumps."""
    times: Times = Uniform()
    """At which the velocity is taught."""
    power: float = Field(0.0, ge=0, le=1)
    """p of adaptive weights: a squared error e counts e / (e + 0.001)^p, the divisor without gradient (Geng et al.,
    2025, equation 22)."""


C = TypeVar("C", bound=Config)


class Jumps(NamedTuple):
    """Samples z (B, ...) at times t (B,), what tells where to go (B,), and the x₀ and ε (B, ...) to be answered."""

    z: Tensor
    t: Tensor
    told: Tensor
    x0: Tensor
    eps: Tensor


class Objective(_denoising.Objective[C], Generic[C]):
    """Train `student`, from `teacher`, which is frozen, or, where it is to learn from data, with or without one."""

    tells = ("target",)

    def __init__(self, config: C, recipe: Recipe):
        self.needs_teacher = config.learn == "teacher" or "teacher" in recipe.networks
        super().__init__(config, recipe)
        self.steps = config.steps
        if config.learn == "data" and config.guidance != 1:
            raise UserError("objective.guidance: data are not guided; set objective.learn=teacher, or leave it out.")
        if not self.needs_teacher and config.solver != "ddim":
            raise UserError("objective.solver is for a teacher, and there is none; leave it out.")

    @property
    def drawn_by(self) -> None:
        """None: samples are drawn by jumps, to times that the student is told."""
        return None

    @abstractmethod
    def jumps(self, student: Denoiser, teacher: Denoiser | None, x0: Tensor) -> Jumps:
        """Return jumps of noisy samples of data x₀ (B, ...), without gradients."""

    def loss(self, turn: Turn, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the weighted squared error to the velocity and to the targets of jumps."""
        x0, batch = self.data(batch)
        # Rounded at random, so that small micro-batches have their share. On the CPU: no device is waited for.
        count = int(self.config.still * len(x0) + torch.rand(()).item())
        with torch.no_grad():
            parts = [
                make(*self._models(networks, {k: v[rows] for k, v in self.told(batch).items()}), x0[rows])
                for make, rows in ((self._still, slice(0, count)), (self.jumps, slice(count, None)))
            ]
        z, t, told, target, eps = (torch.cat(found) for found in zip(*parts, strict=True))
        student = self.student(networks, batch).given(target=told)
        error = student.loss(z, t, target, self.config.weighting, eps)
        if self.config.power:
            error = error / (error.detach() + _SMALL) ** self.config.power
        return {"loss": Term(error.sum(), "samples")}

    def _models(self, networks: Networks, told: Mapping[str, Tensor]) -> tuple[Denoiser, Denoiser | None]:
        student = self.denoiser(networks[self.trained]).given(**told)
        return student, self.teacher(networks, dict(told)) if "teacher" in networks else None

    def truth(self, teacher: Denoiser | None, z: Tensor, t: Tensor, x0: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the x₀ and ε (B, ...) that make the velocity at z, which these made."""
        if self.config.learn == "data":
            return x0, eps
        assert teacher is not None
        return teacher(z, t)

    def nowhere(self, path: Path, t: Tensor) -> Tensor:
        """Return what is told where no time passes, at times t (B,): by default to go to this time."""
        return path.told(t)

    def _still(self, student: Denoiser, teacher: Denoiser | None, x0: Tensor) -> Jumps:
        """Return jumps that take no time."""
        t = noised(self.config.times.draw(len(x0), student.path, x0.device), student.path)
        eps = torch.randn_like(x0)
        z = student.path.noisy(x0, eps, t)
        return Jumps(z, t, self.nowhere(student.path, t), *self.truth(teacher, z, t, x0, eps))
