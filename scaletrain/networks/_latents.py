"""Which autoencoder latents are of: told by it, and kept wherever its latents, or what denoises them, are."""

from __future__ import annotations

from pydantic import Field

from scaletrain.config import Strict

METADATA = "scaletrain.latents"
"""Of a Parquet file: the key under which it says whose latents it holds."""


class Latents(Strict):
    """Whose latents these are: (mean − shift_factor) · scaling_factor.

    autoencoder: a hash of its weights and of the two factors. name: where it was.
    """

    autoencoder: str = Field(min_length=8)
    name: str
    scaling_factor: float
    shift_factor: float

    def __str__(self) -> str:
        return f"`{self.name}` ({self.autoencoder[:8]})"
