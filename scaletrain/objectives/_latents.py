"""What denoisers of latents have to do with the autoencoder whose latents they are (Rombach et al., 2022)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from scaletrain.checkpoint.reader import manifest
from scaletrain.config import NetworkSpec, Recipe
from scaletrain.data.classes import Classes
from scaletrain.data.encoded import EncodedDataset, Encodings
from scaletrain.data.images import Augment, ImageOptions
from scaletrain.data.points import arrays
from scaletrain.data.sources import Rows
from scaletrain.errors import UserError
from scaletrain.explain import decode
from scaletrain.networks._latents import METADATA, Latents
from scaletrain.networks.build import build, outline
from scaletrain.objectives.base import Ahead, Networks, ahead_of, completed
from scaletrain.shelf import Shelf

NAME = "autoencoder"


class Autoencoder:
    """The frozen network `autoencoder` of a recipe, of which is known what its folder tells.

    folder: of the network that it goes on from, if any. Raises UserError for one that is not frozen, or new.
    """

    def __init__(self, recipe: Recipe, folder: Path | None = None):
        self.spec = completed(recipe, NAME, "autoencoder_kl")
        self._folder = folder
        if not self.spec.frozen or (self.spec.source is self.spec.path is None):
            raise UserError(f"networks.{NAME} must have `frozen: true`, and `from` or `path` for its weights.")

    @property
    def name(self) -> str:
        """Where it stands."""
        if self._folder is not None and self.spec.source:
            return f"{self._folder.parents[2]} ({self._folder.parents[1].name})"
        return str(self.spec.path or self.spec.source)

    @cached_property
    def _outline(self) -> nn.Module:
        if self._folder is None:
            return outline(NAME, self.spec)
        return Shelf(self._folder.parents[2]).outline(self._folder.name, self._origin)

    @property
    def _origin(self) -> NetworkSpec:
        assert self._folder is not None
        return NetworkSpec.model_validate(manifest(self._folder.parents[1])["networks"][self._folder.name])

    def shape(self, options: ImageOptions, rows: Rows) -> tuple[int, int, int]:
        """Return the shape of the latents of rows' pictures. Raises UserError for pictures that it does not take."""
        found: tuple[int, int, int] = self._outline.latent_shape(options.shape(rows))  # type: ignore[operator]
        return found

    def picture(self, latents: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the picture of latents of a shape."""
        return tuple(self._outline.to("meta")(torch.zeros(1, *latents, device="meta"), "decode").shape[1:])

    @cached_property
    def latents(self) -> Latents | None:
        """Whose latents it makes; None where its weights are not there yet, as when a run is planned."""
        if self._folder is None:
            module = build(NAME, self.spec.model_copy(update={"dtype": "float32"}))  # by which they are told apart
        elif next(self._folder.glob("*.safetensors"), None) is None:
            return None
        else:
            module = Shelf(self._folder.parents[2]).open(self._folder.parents[1], self._folder.name)
        found: Latents = module.eval().latents(self.name)  # type: ignore[operator]
        return found

    def encodings(self, options: ImageOptions, rows: Rows, shape: tuple[int, ...], recipe: Recipe) -> Encodings:
        """Return the latents of rows' pictures, to be made before the training. Raises UserError."""
        if rows.streaming:
            raise UserError("pictures that stream are not encoded as they come: do it before (scaletrain encode).")
        if options.augment != Augment():
            raise UserError("objective.augment: pictures are encoded once, before the training; leave it out.")
        pictures = options.shape(rows)
        if self.shape(options, rows) != shape:
            raise UserError(
                f"{rows.name(0)} is of {pictures}, so that its latents are {self.shape(options, rows)}, and those of "
                f"the training data {shape}: set objective.size."
            )
        batch = recipe.evaluation_batch
        how = self.latents and self.latents.autoencoder, options.size, pictures, recipe.train.precision
        return Encodings(rows, shape, lambda: options.pictures(rows, False, pictures), batch, *how)


def encoded(rows: Rows, encodings: Encodings, classes: Classes | None, texts: Sequence[str]) -> EncodedDataset:
    """Return latents as examples, with their classes where there are, and columns that say what texts do."""
    found = arrays(rows, texts).tensors if texts else {}
    if classes is not None and "label" in rows.columns:
        found["label"] = torch.from_numpy(classes.encode(rows, "label"))
    return EncodedDataset(rows, encodings, found)


def encoding(works: Sequence[Encodings], spec: NetworkSpec) -> Ahead | None:
    """Return the work of making latents, or None where there are none to be made."""
    if not works:
        return None

    def do(networks: Networks, device: torch.device, work: Encodings, part: int) -> None:
        work.write(part, lambda images: networks[NAME](images.to(device), "encode"))

    return ahead_of({NAME: spec}, works, do)


def pictures_of(autoencoder: nn.Module, latents: Tensor) -> Tensor:
    """Return the pictures (N, C, H, W) in [-1, 1] of latents (N, ...)."""
    made: Tensor = autoencoder(latents, "decode")
    return made.clamp(-1, 1)


def told_by(rows: Rows | None) -> list[tuple[str, Latents]]:
    """Return whose latents files say that they hold, by file."""
    notes = rows.notes(METADATA) if rows is not None else {}
    return [(f"`{file}` holds", decode(Latents, json.loads(note), file)) for file, note in notes.items()]


def agreed(known: Sequence[tuple[str, Latents | None]]) -> Latents | None:
    """Return whose latents all of these mean; None where none says. Raises UserError that names two that differ."""
    told = [(who, found) for who, found in known if found]
    for who, found in told[1:]:
        first, own = told[0]
        if found.autoencoder != own.autoencoder:
            raise UserError(
                f"{first} latents of the autoencoder {own}, and {who} those of {found}: to one, latents of the other "
                "say nothing. Encode the data by the first, or take another network."
            )
    return told[0][1] if told else None
