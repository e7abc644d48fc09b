"""What objectives share whose student makes whole samples, in one step or a few, which others judge.

They are judged noised, at all times of the path (Yin et al., 2024a; Sauer et al., 2024, LADD). Between its steps the
student's x₀ is noised anew.
"""

from __future__ import annotations

from typing import Generic, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from scaletrain.config import NetworkSpec, Recipe
from scaletrain.data.sources import Rows
from scaletrain.diffusion import texts
from scaletrain.diffusion.solvers import Solver
from scaletrain.diffusion.times import Times, Uniform
from scaletrain.errors import UserError
from scaletrain.evaluate.distances import energy_scores
from scaletrain.evaluate.few_steps import Sampler
from scaletrain.objectives import _denoising
from scaletrain.objectives._adversarial import Contest, mislead, tell_apart
from scaletrain.objectives.base import Networks, RunView, completed
from scaletrain.player import Batch, Term

_NUDGE = 0.05
"""Of a critic's input, which has unit variance, where its slope is measured."""


class Config(_denoising.Config):
    """Options that they have."""

    steps: int = Field(1, ge=1)
    """Of the student, for a sample."""
    solver: Solver = "ddim"
    """Of the teacher in the table; between the student's steps its x₀ is noised anew."""
    times: Times = Uniform()
    """At which its samples are judged."""
    contest: Contest = "hinge"
    """What the critic and the student play (see `scaletrain.objectives._adversarial`)."""
    r1: float = Field(0.0, ge=0)
    """γ of the penalty γ/2 E|∇ critic|² on real samples (Mescheder et al., 2018, equation 9). The slope is that along
    a random direction, by a finite difference (Lin et al., 2025, section 3.3), which takes no second derivative."""


C = TypeVar("C", bound=Config)


class Objective(_denoising.Objective[C], Generic[C]):
    """Trains `student` on what is made of its samples, and perhaps `critic`, which tells them from real ones."""

    criticised: bool
    """Whether there is a critic, which needs data."""

    def __init__(self, config: C, recipe: Recipe):
        super().__init__(config, recipe)
        self.steps = config.steps

    def prepare(self, train: Rows, eval: Rows | None) -> None:
        """Find what is denoised, and that there are data for a critic. Raises UserError."""
        super().prepare(train, eval)
        if self.criticised and self._source is None and "draw" in train.columns:
            raise UserError("data.train=noise:N has nothing real to show to the critic: give data.")

    def networks(self) -> dict[str, NetworkSpec]:
        """Return the student, its teacher and, where there is one, the critic, which is told of the condition."""
        found = super().networks()
        if self.criticised:
            signature = self.signature
            told = {"classes": signature.classes} if signature.condition == "label" else {}
            if signature.condition == "text":
                told = {"text": texts.summary(self._texts).shape[1]}
            if len(signature.shape) == 1:
                found["critic"] = completed(self.recipe, "critic", "point_critic", dim=signature.shape[0], **told)
            else:
                shape = dict(zip(("channels", "height", "width"), signature.shape, strict=True))
                found["critic"] = completed(self.recipe, "critic", "conv_critic", **shape, **told)
        return found

    # --- samples ------------------------------------------------------------------------------------------------------

    def noise(self, batch: Batch) -> Tensor:
        """Draw noise for each sample of a batch (B, ...)."""
        some = next(iter(batch.values()))
        return torch.randn(len(some), *self.signature.shape, device=some.device)

    @property
    def drawn_by(self) -> Solver:
        """The solver of samples: x₀ is noised anew."""
        return "renoise"

    def samplers(self, view: RunView, stage: str) -> dict[int, Sampler]:
        """Return the student, at its own number of steps."""
        return {self.config.steps: self.sampler(view.network(stage, self.trained))}

    def evaluate(self, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the energy score of samples (see `energy_scores`), on all values, of the classes of real ones."""
        x0, batch = self.data(batch)
        if self.signature.guidance:
            batch = {**batch, "guidance": torch.full_like(batch["guidance"], self.config.guidance)}
        twice = {k: torch.cat([v, v]) for k, v in self.told(batch).items()}
        noise = torch.cat([self.noise(batch), self.noise(batch)])  # there may be but one real sample
        made = self.sampler(networks[self.trained])(noise, self.steps, twice)
        return {"energy_score": Term(energy_scores(x0.flatten(1).float(), made.flatten(1).float()), "samples")}

    # --- the critic ---------------------------------------------------------------------------------------------------

    def known(self, batch: Batch) -> dict[str, Tensor]:
        """Return what the critic is told of a batch: its class, or a vector of its text (B, E)."""
        if self.signature.condition == "text":
            return {"text": texts.summary(batch)}
        return {"label": batch["label"]} if self.signature.condition else {}

    def misled(self, networks: Networks, made: Tensor, batch: Batch) -> Tensor:
        """Return the student's loss by the critic: a sum."""
        t = self.config.times.draw(len(made), self.signature.reading.path, made.device)
        return mislead(self.config.contest, networks["critic"](*self._shown(made, t), **self.known(batch)))

    def told_apart(self, networks: Networks, real: Tensor, made: Tensor, batch: Batch) -> dict[str, Term]:
        """Return the critic's loss on real and on made samples (B, ...), each noised, in one call of it."""
        config, told = self.config, self.known(batch)
        t = config.times.draw(len(real), self.signature.reading.path, real.device)
        z, time = self._shown(real, t)
        seen = [z, self._shown(made, t)[0]]
        if config.r1:
            seen.append(z + _NUDGE * torch.randn_like(z))
        count = len(seen)
        told = {k: torch.cat([v] * count) for k, v in told.items()}
        said = networks["critic"](torch.cat(seen), time.repeat(count), **told).chunk(count)
        found = tell_apart(config.contest, said[0], said[1])
        terms = {"real": Term(found[0], "samples"), "made": Term(found[1], "samples")}
        if config.r1:
            slope = (said[2].float() - said[0].float()) / _NUDGE
            terms["r1"] = Term(slope.square().sum(), "samples", weight=config.r1 / 2)
        return terms

    def _shown(self, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Noise samples (B, ...) to times t (B,); return them with unit variance, and the times that are told."""
        reading = self.signature.reading
        alpha, sigma = reading.path.at(t, x0)
        z = alpha * x0 + sigma * torch.randn_like(x0)
        return z / torch.hypot(reading.data_std * alpha, sigma), reading.path.told(t)
