"""Distribution matching distillation: a student of one step or a few whose samples are as the teacher's would be.

Yin et al. (2024a, DMD) move samples along the difference of two scores: of the teacher, and of `fake_score`, which is
trained meanwhile to denoise the student's samples. Yin et al. (2024b, DMD2) leave out the regression to the teacher's
samples, train the fake score more often than the student, have the student make the inputs of its later steps itself,
and may add a critic, which sees real samples.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Literal, final

import torch
from pydantic import Field
from torch import Tensor

from scaletrain.config import NetworkSpec, Recipe
from scaletrain.diffusion.denoiser import Denoiser
from scaletrain.diffusion.path import beside
from scaletrain.diffusion.solvers import renoise_step, times
from scaletrain.errors import UserError
from scaletrain.objectives import _judged
from scaletrain.objectives.base import Networks
from scaletrain.player import Batch, Term, Turn

FAKE = "fake_score"


class Config(_judged.Config):
    """Options of `objective` for `type: dmd2`."""

    every: int = Field(5, ge=1)
    """Updates of the fake score for one of the student (2024b, section 4.2)."""
    gradient: Literal["normalised", "expected", "kl"] = "normalised"
    """What the difference of the two x₀ is divided by. normalised: the mean of |x₀ − the teacher's x₀| over the values
    of a sample (2024a, equation 8). expected: that of a Gaussian of the data's standard deviation d, to a factor,
    d σ / √(α² d² + σ²): for samples of few values, whose mean is now and then next to 0. kl: 1 / SNR, so that it is the
    gradient of the KL divergence at each time; it grows with SNR: choose `times`."""
    adversarial: float = Field(0.0, ge=0)
    """Weight of the critic's judgement in the student's loss (2024b, section 4.3, where the critic shares weights with
    the fake score); 0: there is no critic, and no need of data."""


@final
class Objective(_judged.Objective[Config]):
    """Train `student` by `teacher`, which is frozen, and `fake_score`, which follows the student.

    The fake score is by default a network like the student, and begins where that begins.
    """

    def __init__(self, config: Config, recipe: Recipe):
        super().__init__(config, recipe)
        self.criticised = config.adversarial > 0
        for key in () if self.criticised else ("contest", "r1"):
            if getattr(config, key) != Config.model_fields[key].default:
                raise UserError(f"objective.{key} is for a critic; set objective.adversarial, or leave it out.")
        followers = [FAKE, "critic"] if self.criticised else [FAKE]
        self.turns = (*(Turn(name, name) for name in followers), Turn("student", "student", every=config.every))

    def networks(self) -> dict[str, NetworkSpec]:
        """Return the student, its teacher, the fake score and, where there is one, the critic."""
        found = super().networks()
        if FAKE in self.recipe.networks:
            return {**found, FAKE: self.denoiser_spec(FAKE)}
        source = self.origins.get(FAKE) or self.origins.get(self.trained)
        own = {"source": source, "path": None} if source else {}
        return {**found, FAKE: found[self.trained].model_copy(update=own)}

    def save_assets(self, network: str, folder: Path) -> None:
        """Write how both denoisers are called beside their weights."""
        super().save_assets(self.trained if network == FAKE else network, folder)

    def loss(self, turn: Turn, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the fake score's loss on the student's samples, the critic's on them and real ones, or the student's
        by both.
        """
        real: Tensor | None = None
        if turn.name == "critic":
            real, batch = self.data(batch)
        else:
            batch = self.asked(batch)
        with torch.set_grad_enabled(turn.name == "student" and torch.is_grad_enabled()):
            made = self.made(self.student(networks, batch), self.noise(batch))
        if real is not None:
            return self.told_apart(networks, real, made, batch)
        fake = self.denoiser(networks[FAKE]).given(**self.told(batch))
        t = self.config.times.draw(len(made), fake.path, made.device)
        eps = torch.randn_like(made)
        if turn.name == FAKE:
            z = fake.path.noisy(made, eps, t)
            return {"denoising": Term(fake.loss(z, t, made, self.config.weighting, eps).sum(), "samples")}
        gradient = self.gradient(self.teacher(networks, batch), fake, made.detach(), t, eps)
        # Its gradient to a sample is `gradient`, over the number of values (2024a, algorithm 2).
        matched = torch.square(made - (made.detach() - gradient)).flatten(1).mean(1) / 2
        terms = {"matching": Term(matched.sum(), "samples")}
        if self.criticised:
            misled = self.misled(networks, made, batch)
            terms["adversarial"] = Term(misled, "samples", weight=self.config.adversarial)
        return terms

    def made(self, student: Denoiser, noise: Tensor) -> Tensor:
        """Return samples (B, ...) of all steps of the student, evenly, from what its steps before made of noise.

        Those are taken without gradients: the backward simulation of 2024b, section 4.4. The student is called once for
        each step before the last, and once with gradients, whatever B is.
        """
        path, count, steps = student.path, len(noise), self.config.steps
        # Sample j is taken at step ⌊(j + share) steps / count⌋.
        share = float(torch.rand(())) if steps > 1 else 0.0
        firsts = [max(0, math.ceil(count * i / steps - share)) for i in range(steps)] + [count]
        z, parts, at = path.start(noise), [], []
        told = student.told
        for i, (t, s) in enumerate(pairwise(path.grid(steps))):
            number = firsts[i + 1] - firsts[i]
            parts.append(z[:number])
            at.append(times(t, z[:number]))
            if i + 1 < steps:
                # At least one goes on, though it may not be wanted: processes call networks equally often.
                first = min(firsts[i + 1], count - 1)
                z = z[min(number, len(z) - 1) :]
                rest = student.given(**{k: v[first:] for k, v in told.items()})
                with torch.no_grad():
                    z = renoise_step(rest, z, times(t, z), times(s, z))
        return student(torch.cat(parts), torch.cat(at))[0]

    @torch.no_grad()
    def gradient(self, real: Denoiser, fake: Denoiser, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Return the direction (B, ...) in which samples x₀ are less like the teacher's: at times t (B,), the
        difference of the two denoisers at α x₀ + σ ε (2024a, equations 7 and 8).
        """
        z = real.path.noisy(x0, eps, t)
        target = real(z, t)[0]
        apart = fake(z, t)[0] - target
        if self.config.gradient == "normalised":
            return apart / beside((x0 - target).abs().flatten(1).mean(1), apart)
        alpha, sigma = real.path.at(t, z)
        if self.config.gradient == "kl":
            return (alpha / sigma) ** 2 * apart
        std = self.signature.reading.data_std
        return torch.hypot(std * alpha, sigma) / (std * sigma) * apart
