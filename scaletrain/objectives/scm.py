"""Continuous-time consistency models (Lu & Song, 2025): the slope of a student's answer along a trajectory goes to 0.

On TrigFlow, z = cos(t) x₀ + d sin(t) ε, d the standard deviation of the data, f = cos(t) z − sin(t) V is the student's
x₀ and V = d F its velocity. Distilled (sCD) the trajectory is the teacher's, trained (sCT) the straight one of data and
noise. Students and teachers of other paths are read on this one: they need not be trained anew (appendix B.1).
"""

from __future__ import annotations

from typing import ClassVar, Literal, final

import torch
import torch.autograd.forward_ad as forward_ad
from pydantic import Field
from torch import Tensor

from scaletrain.config import Recipe
from scaletrain.diffusion.denoiser import Denoiser
from scaletrain.diffusion.path import AnyPath, Trig, beside
from scaletrain.diffusion.solvers import Solver
from scaletrain.diffusion.times import LogNormal, Times
from scaletrain.errors import UserError
from scaletrain.objectives import _consistency
from scaletrain.objectives.base import Networks
from scaletrain.player import Batch, Term, Turn


class Config(_consistency.Sampling):
    """Options of `objective` for `type: scm`."""

    learns_from: Literal["teacher", "data"] = "teacher"
    """Whose trajectory it is: `teacher` distils it (sCD); `data` trains without one (sCT), which is then only compared
    with."""
    times: Times = LogNormal(mean=-0.1, std=1.6)
    """At which it is trained, for data of unit variance: `log_normal` is of tan t. The paper's −0.8 is for data of
    standard deviation 0.5."""
    normalize: float = Field(0.1, gt=0)
    """c of tangent normalisation, g ← g / (‖g‖ + c), ‖g‖ the root of the mean square (section 4.1)."""
    warmup: int = Field(0, ge=0)
    """Updates over which the part of the tangent that may be unstable comes in (section 4.1)."""
    solver: Solver = "ddim"
    """Of the teacher in the table."""
    weighting: ClassVar[None] = None  # type: ignore[misc]
    """There is none: the normalised tangent weighs."""


@final
class Objective(_consistency.Sampled[Config]):
    """Train `student` by the slope of its answers, from `teacher`, which is frozen, or from data alone."""

    differentiates_forward = True

    def __init__(self, config: Config, recipe: Recipe):
        self.needs_teacher = config.learns_from == "teacher" or "teacher" in recipe.networks
        super().__init__(config, recipe)
        if config.learns_from == "data" and config.guidance != 1:
            raise UserError("objective.guidance: data are not guided; learn from a teacher, or leave it out.")

    def new_path(self, data_std: float) -> AnyPath:
        """Return TrigFlow."""
        return Trig(data_std=data_std)

    @property
    def flow(self) -> Trig:
        """TrigFlow at the scale of the data."""
        return Trig(data_std=self.signature.reading.data_std)

    def loss(self, turn: Turn, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the squared error of F to where its normalised tangent points (algorithm 1, equation 8).

        The value is the square of that tangent, near 1 until the slope is near `normalize`. tangent: before.
        """
        x0, batch = self.data(batch)
        flow, unit = self.flow, self.signature.reading.data_std
        student = self.student(networks, batch).along(flow)
        t = self.config.times.draw(len(x0), Trig(), x0.device)  # of tan t, whatever the scale
        eps = torch.randn_like(x0)
        z = flow.noisy(x0, eps, t)
        with torch.no_grad():
            if self.config.learns_from == "data":
                slopes = flow.slopes(t)
                slope = beside(slopes[0], z) * x0 + beside(slopes[1], z) * eps
            else:
                slope = self.teacher(networks, batch).along(flow).velocity(z, t)
            velocity, g = self.tangent(student, z, t, slope)
            g = g / unit
            size = g.flatten(1).square().mean(1).sqrt()
            aim = velocity / unit + g / (beside(size, g) + self.config.normalize)
        error = (student.velocity(z, t) / unit - aim).flatten(1).square().mean(1)
        return {"loss": Term(error.sum(), "samples"), "tangent": Term(size.sum(), "samples", 0.0)}

    def tangent(self, student: Denoiser, z: Tensor, t: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """Return V and g = cos t · df/dt at z and t, where z changes by slope, dz/dt. Without gradients.

        g = −cos² t (V − dz/dt) − r cos t sin t (z + dV/dt). dV/dt is taken times cos t sin t, by tangents that are as
        small, so that it does not overflow (section 4.2, JVP rearrangement). r rises from 0 to 1 over the warm-up.
        """
        cos, sin = beside(t.cos(), z), beside(t.sin(), z)
        with torch.no_grad(), forward_ad.dual_level():
            both = student.velocity(
                forward_ad.make_dual(z, cos * sin * slope), forward_ad.make_dual(t, t.cos() * t.sin())
            )
            velocity, change = forward_ad.unpack_dual(both)
            assert change is not None
        rise = min(1.0, self._updates / self.config.warmup) if self.config.warmup else 1.0
        return velocity, -(cos**2) * (velocity - slope) - rise * (cos * sin * z + change)
