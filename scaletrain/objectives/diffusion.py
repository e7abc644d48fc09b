"""Diffusion: a network learns to tell data from noise at every level, and pictures come of noise step by step.

Ho et al. (2020) and, for prediction types, weights and the sampler's time grid, Salimans & Ho (2022).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, final

import torch
from pydantic import Field

from scaletrain.config import NetworkSpec
from scaletrain.data.dataset import Dataset
from scaletrain.data.images import ImageOptions
from scaletrain.data.sources import Rows
from scaletrain.diffusion.options import DiffusionOptions
from scaletrain.diffusion.path import stratified
from scaletrain.diffusion.pictures import draw, stored_shape
from scaletrain.objectives import base
from scaletrain.objectives.base import Networks, Request, Samples, completed
from scaletrain.player import Batch, Term, Turn


class Config(ImageOptions, DiffusionOptions):
    """Options of `objective` for `type: diffusion`."""

    steps: int = Field(32, ge=1)
    """Evaluations of the network for a sample."""


@final
class Objective(base.Objective[Config]):
    """Train `model`, by default a U-Net, on the column `image`."""

    throughput: ClassVar[str] = "images"

    def prepare(self, train: Rows, eval: Rows | None) -> None:
        """Find the shape of a picture. Raises UserError that names the row."""
        self._shape = self.config.shape(train)

    def examples(self, rows: Rows, training: bool, window: bool = False) -> Dataset:
        """Return pictures."""
        return self.config.pictures(rows, training, self._shape)

    def restore(self, folders: Mapping[str, Path]) -> None:
        """Take the shape of a picture from the stored network."""
        if "model" in folders:
            self._shape = stored_shape(folders["model"])

    def networks(self) -> dict[str, NetworkSpec]:
        """Return `model`, which is told the shape of a picture."""
        channels, height, width = self._shape
        return {"model": completed(self.recipe, "model", "unet", channels=channels, height=height, width=width)}

    def counts(self, turn: Turn, batch: Batch) -> dict[str, int]:
        """Count pictures."""
        return {"images": len(batch["image"])}

    def loss(self, turn: Turn, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the weighted squared error at times that are spread evenly over [0, 1]."""
        denoiser, x0 = self.config.denoiser(networks["model"]), batch["image"]
        t = stratified(len(x0), x0.device)
        z = denoiser.path.noisy(x0, torch.randn_like(x0), t)
        return {"loss": Term(denoiser.loss(z, t, x0, self.config.weighting).sum(), "images")}

    def sample(self, networks: Networks, request: Request) -> Samples:
        """Draw pictures."""
        return draw(self.config.denoiser(networks["model"]), self._shape, self.config.steps, request)
