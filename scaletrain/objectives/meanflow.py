"""MeanFlow: a student that answers the average velocity from a time to an earlier one, and so jumps at once.

Geng et al. (2025). u(z, t, r) = 1 / (t − r) ∫ v dτ obeys u = v − (t − r) du/dt along the flow (the MeanFlow identity,
equation 6), whose right side is the target, without gradient (equation 10). du/dt = v ∂u/∂z + ∂u/∂t is one
Jacobian-vector product. v comes from data, α' x₀ + σ' ε, or from a teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
import torch.autograd.forward_ad as forward
from pydantic import Field
from torch import Tensor, nn

from scaletrain.diffusion.denoiser import Denoiser
from scaletrain.diffusion.jumps import euler_jump, noised, to, travel
from scaletrain.diffusion.path import beside
from scaletrain.diffusion.solvers import Solver
from scaletrain.evaluate.few_steps import Sampler
from scaletrain.objectives import _jumping
from scaletrain.objectives._jumping import Jumps


class Config(_jumping.Config):
    """Options of `objective` for `type: meanflow`."""

    power: float = Field(1.0, ge=0, le=1)
    """p of adaptive weights (see there)."""
    whole: float = Field(0.0, ge=0, le=1)
    """Share of the jumps that go to the first time; the others are between two of `times`."""
    solver: Solver = "ddim"
    """Of the teacher in the table."""


@final
class Objective(_jumping.Objective[Config]):
    """Train `student` to obey the MeanFlow identity."""

    differentiates_forward = True

    def jumps(self, student: Denoiser, teacher: Denoiser | None, x0: Tensor) -> Jumps:
        """Return jumps and the average velocity that follows from the identity, as x₀ and ε."""
        path, count, device = student.path, len(x0), x0.device
        one, other = (self.config.times.draw(count, path, device) for _ in range(2))
        other = other[torch.randperm(count, device=device)]  # stratified draws come in order
        t, s = torch.maximum(one, other), torch.minimum(one, other)
        whole = torch.rand(count, device=device) < self.config.whole
        t, s = torch.where(whole, one, t), torch.where(whole, path.first, s)
        t = noised(t, path)
        eps = torch.randn_like(x0)
        z = path.noisy(x0, eps, t)
        a, b = student.reading.parts(t, z, "velocity")
        x0, eps = self.truth(teacher, z, t, x0, eps)
        v = a * x0 + b * eps
        average = v - beside(t - s, z) * rate(student, z, t, s, v)
        return Jumps(z, t, path.told(s), *student.reading.split(average, z, t, "velocity"))

    def sampler(self, network: nn.Module) -> Sampler:
        """Return the student's jumps over the path's grid."""
        student = self.drawing(network)

        def draw(noise: Tensor, steps: int, told: Mapping[str, Tensor]) -> Tensor:
            return travel(student.given(**told), euler_jump, noise, steps)

        return draw


def rate(student: Denoiser, z: Tensor, t: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """Return du/dt (B, ...) of the student's average velocity u(z, t, s) along dz/dt = v, without gradients.

    By forward differentiation, of the wrapped network as it is called: hooks and collectives of engines are as they
    are in any call without gradients.
    """
    with torch.no_grad(), forward.dual_level():
        u = to(student, s).velocity(forward.make_dual(z, v), forward.make_dual(t, torch.ones_like(t)))
        tangent: Tensor = forward.unpack_dual(u).tangent
    return tangent
