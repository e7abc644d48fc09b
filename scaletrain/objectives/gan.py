"""Generative adversarial networks: a critic that tells real pictures from made ones, a generator that misleads it.

Goodfellow et al. (2014), with the networks of Radford et al. (2016) by default.
"""

from __future__ import annotations

from typing import ClassVar, final

import numpy as np
import torch
from pydantic import Field

from scaletrain.config import NetworkSpec, Recipe
from scaletrain.data.dataset import Dataset
from scaletrain.data.images import ImageOptions
from scaletrain.data.sources import Rows
from scaletrain.errors import UserError
from scaletrain.evaluate.distances import energy_scores
from scaletrain.objectives import base
from scaletrain.objectives._adversarial import Contest, mislead, tell_apart
from scaletrain.objectives.base import Networks, Request, Samples, completed
from scaletrain.player import Batch, Term, Turn


class Config(ImageOptions):
    """Options of `objective` for `type: gan`."""

    latent: int = Field(100, ge=1)
    """Length of the noise vector, drawn from N(0, 1)."""
    loss: Contest = "non_saturating"
    """Goodfellow et al. (2014), section 3, or Lim and Ye (2017)."""
    critic_repeats: int = Field(1, ge=1)
    """Updates of the critic for each one of the generator."""
    real_target: float = Field(1.0, gt=0.5, le=1)
    """non_saturating: what the critic is to answer for real pictures; 0.9 is one-sided label smoothing (Salimans et
    al., 2016, section 3.4)."""


@final
class Objective(base.Objective[Config]):
    """Train `critic` and `generator` in turn on the column `image`."""

    throughput: ClassVar[str] = "images"

    def __init__(self, config: Config, recipe: Recipe):
        super().__init__(config, recipe)
        if config.loss == "hinge" and config.real_target != 1:
            raise UserError("objective.real_target has no meaning for the hinge loss: leave it out")
        self.turns = (Turn("critic", "critic", config.critic_repeats), Turn("generator", "generator"))

    def prepare(self, train: Rows, eval: Rows | None) -> None:
        """Find the shape of a picture, and how far held-out ones are apart. Raises UserError that names the row."""
        if eval is not None and len(eval) < 2:
            raise UserError("data.eval, data.holdout: one picture is too few to compare samples with; give 2 or more.")
        self._shape = self.config.shape(train)
        if eval is not None:
            some = eval.select(np.linspace(0, len(eval) - 1, min(len(eval), 2000)).astype(int))
            pictures = self.examples(some, False).batch(range(len(some)), np.zeros(len(some), np.uint64))["image"]
            self._spread = float(torch.pdist(_points(pictures)).mean())

    def examples(self, rows: Rows, training: bool, window: bool = False) -> Dataset:
        """Return pictures."""
        return self.config.pictures(rows, training, self._shape)

    def networks(self) -> dict[str, NetworkSpec]:
        """Return both networks, which are told the shape of a picture."""
        channels, height, width = self._shape
        shape = {"channels": channels, "height": height, "width": width}
        return {
            "generator": completed(self.recipe, "generator", "dcgan_generator", latent=self.config.latent, **shape),
            "critic": completed(self.recipe, "critic", "dcgan_critic", **shape),
        }

    def counts(self, turn: Turn, batch: Batch) -> dict[str, int]:
        """Count pictures: as many are made as there are real ones."""
        return {"images": len(batch["image"])}

    def loss(self, turn: Turn, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the critic's loss on real and on made pictures, or the generator's."""
        real = batch["image"]
        z = torch.randn(len(real), self.config.latent, device=real.device)
        if turn.name == "generator":
            judged = networks["critic"](networks["generator"](z))
            return {"adversarial": Term(mislead(self.config.loss, judged), "images")}
        with torch.no_grad():
            made = networks["generator"](z)
        # Two calls, so that BatchNorm sees real and made pictures apart, as in the paper.
        told = self._tell(networks["critic"](real), networks["critic"](made))
        return {"real": Term(told[0], "images"), "made": Term(told[1], "images")}

    def _tell(self, real: torch.Tensor, made: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the critic's sums over logits (B,) of real and of made pictures."""
        return tell_apart(self.config.loss, real, made, self.config.real_target)

    def evaluate(self, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the energy score of the generator, which is the `loss` here, on values in [0, 1], and both players'
        losses.
        """
        real = batch["image"]
        count = len(real)
        made = networks["generator"](torch.randn(max(count, 2), self.config.latent, device=real.device))
        told = self._tell(networks["critic"](real), networks["critic"](made[:count]))
        return {
            "energy_score": Term(energy_scores(_points(real), _points(made)), "images"),
            "critic": Term(told[0] + told[1], "images", weight=0.0),
            "generator": Term(mislead(self.config.loss, networks["critic"](made[:count])), "images", weight=0.0),
        }

    def conclude(self, metrics: dict[str, float]) -> dict[str, float]:
        """Add the energy distance 2 E|x - g| - E|g - g'| - E|x - x'|, which is 0 when the distribution is learned."""
        return metrics | {"energy_distance": 2 * metrics["energy_score"] - self._spread}

    def sample(self, networks: Networks, request: Request) -> Samples:
        """Draw pictures."""
        z = torch.randn(request.count, self.config.latent, generator=request.generator, device=request.generator.device)
        return Samples(images=(networks["generator"](z) + 1) / 2)


def _points(pictures: torch.Tensor) -> torch.Tensor:
    """Return pictures (N, C, H, W) in [-1, 1] as points (N, CHW) in [0, 1]."""
    return (pictures.flatten(1).float() + 1) / 2
