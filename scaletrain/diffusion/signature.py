"""What is kept beside a denoiser's weights, so that others know how to call it: its reading, and what it denoises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import Field

from scaletrain.config import Strict
from scaletrain.diffusion.reading import Reading
from scaletrain.explain import decode
from scaletrain.networks._latents import Latents
from scaletrain.networks.mixture import Config as MixtureConfig

FILE = "denoiser.json"

Space = Literal["image", "latent", "point"]
"""What is denoised, by the column that it comes in: pictures (C, H, W), latents (C, H, W), points (D,)."""


class Signature(Strict):
    """How a denoiser is called and read.

    condition: what it is told of each sample, if anything; classes: how many there are; texts: the columns that say
    what a text does. fixed: what it is told of all samples alike, by name. dropped: whether it was trained without the
    condition, too, as guidance needs. guidance: the scales that it can be told.
    """

    reading: Reading
    space: Space
    shape: tuple[int, ...] = Field(min_length=1, strict=False)
    condition: Literal["label", "text"] | None = None
    classes: int = Field(0, ge=0)
    texts: list[str] = Field([])
    fixed: dict[str, list[float]] = Field({})
    dropped: bool = False
    guidance: tuple[float, float] | None = Field(None, strict=False)
    source: MixtureConfig | None = None
    """The mixture that data are drawn from, where there are no others."""
    pipeline: str | None = None
    """Of diffusers, that the first teacher came from: a folder or a Hub id."""
    latents: Latents | None = None
    """Whose latents it denoises, where that is known."""

    def save(self, folder: Path) -> None:
        """Write it into a network's folder."""
        (folder / FILE).write_text(json.dumps(self.model_dump(mode="json"), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Signature | None:
        """Read what `save` wrote; None where there is none."""
        file = folder / FILE
        return decode(cls, json.loads(file.read_text()), str(file)) if file.exists() else None
