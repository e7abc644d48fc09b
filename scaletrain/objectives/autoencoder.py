"""Autoencoders: pictures to small latents and back, for denoisers that are trained on latents.

Rombach et al. (2022), section 3.1: the error of the reconstruction, and a very small weight on the Kullback-Leibler
divergence of the latents from N(0, I) (Kingma & Welling, 2014, appendix B), without their critic of patches.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, final

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from scaletrain.config import NetworkSpec, Recipe
from scaletrain.data.dataset import Dataset
from scaletrain.data.images import ImageOptions
from scaletrain.data.sources import Rows
from scaletrain.objectives import base
from scaletrain.objectives.base import Networks, Request, Samples, completed
from scaletrain.player import Batch, Term, Turn

_SHOWN = 64


class Config(ImageOptions):
    """Options of `objective` for `type: autoencoder`."""

    error: Literal["l1", "l2"] = "l1"
    """Of a value of a picture: absolute, or squared."""
    kl: float = Field(1e-6, ge=0)
    """Weight of a latent's divergence, in nats, against the sum of the errors of its picture."""


@final
class Objective(base.Objective[Config]):
    """Train `autoencoder`, by default diffusers' AutoencoderKL, on the column `image`."""

    turns: tuple[Turn, ...] = (Turn("train", "autoencoder"),)
    throughput: ClassVar[str] = "images"

    def __init__(self, config: Config, recipe: Recipe):
        super().__init__(config, recipe)
        self._some: Tensor | None = None

    def prepare(self, train: Rows, eval: Rows | None) -> None:
        """Find the shape of a picture, and take some to show. Raises UserError that names the row."""
        self._shape = self.config.shape(train)
        some = (train if eval is None else eval).sample(_SHOWN)
        pictures = self.config.pictures(some, False, self._shape)
        self._some = pictures.batch(range(len(pictures)), np.zeros(len(pictures), np.uint64))["image"]

    def examples(self, rows: Rows, training: bool, window: bool = False) -> Dataset:
        """Return pictures."""
        return self.config.pictures(rows, training, self._shape)

    def networks(self) -> dict[str, NetworkSpec]:
        """Return `autoencoder`, which is told the channels of a picture."""
        return {"autoencoder": completed(self.recipe, "autoencoder", "autoencoder_kl", channels=self._shape[0])}

    def counts(self, turn: Turn, batch: Batch) -> dict[str, int]:
        """Count pictures, and their values."""
        return {"images": len(batch["image"]), "values": batch["image"].numel()}

    def loss(self, turn: Turn, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the error of pictures made of drawn latents, and the divergence, both by the value of a picture."""
        made, mean, log_variance = networks["autoencoder"](batch["image"])
        return self._terms(batch["image"], made, mean, log_variance)

    def evaluate(self, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the same of the means, and their squared error."""
        made, mean, log_variance = networks["autoencoder"](batch["image"], "reconstruct")
        squared = (made - batch["image"]).square().sum()
        return {**self._terms(batch["image"], made, mean, log_variance), "mse": Term(squared, "values", 0.0)}

    def _terms(self, image: Tensor, made: Tensor, mean: Tensor, log_variance: Tensor) -> dict[str, Term]:
        error = (made - image).abs() if self.config.error == "l1" else (made - image).square()
        kl = divergence(mean, log_variance).sum()
        return {"reconstruction": Term(error.sum(), "values"), "kl": Term(kl, "values", self.config.kl)}

    def conclude(self, metrics: dict[str, float]) -> dict[str, float]:
        """Add the peak signal-to-noise ratio, in decibels: the peak is the range of pictures, 2."""
        mse = metrics["mse"]
        return {**metrics, "psnr": math.inf if mse == 0 else 10 * math.log10(4 / mse)}

    def sample(self, networks: Networks, request: Request) -> Samples | None:
        """Return some pictures, each with what becomes of it beside it. None after the training: data are not kept."""
        if self._some is None:
            return None
        image = self._some[: max(1, request.count // 2)].to(request.generator.device)
        made, _, _ = networks["autoencoder"](image, "reconstruct")
        both = torch.stack([image, made.clamp(-1, 1)], 1).flatten(0, 1)
        return Samples(images=both / 2 + 0.5, rows=8)


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, variance) ‖ N(0, I)) of each sample, summed over its values: (B, ...) to (B,), in nats."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)
