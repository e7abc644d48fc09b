"""Pictures and their classes as examples: decoding, sizes and augmentation.

A data set that fits is decoded once, before training, so that a corrupt picture is named before the first step; a
larger one is decoded as it is needed, in worker processes. Batches are `image` (B, C, H, W) float32 in [-1, 1] and,
with labels, `label` (B,) int64.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal, final

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from scaletrain.config import Strict
from scaletrain.data.classes import Classes
from scaletrain.data.dataset import Dataset, Example
from scaletrain.data.order import Int, Lanes, Ordering
from scaletrain.data.sources import Rows
from scaletrain.errors import UserError

Pixels = npt.NDArray[np.uint8]
IN_MEMORY_BYTES = 512 << 20
"""Decoded size up to which a data set is kept in memory."""


class Augment(Strict):
    """Random changes to a training picture, in this order; all off by default."""

    crop: int = Field(0, ge=0)
    """Pixels of black border, from which a picture of the old size is cut at random (He et al., 2016, section 4.2)."""
    flip: bool = False
    """Mirror left and right with probability 1/2."""
    erase: int = Field(0, ge=0)
    """Side of a square, centred anywhere, that is made grey (DeVries and Taylor, 2017, cutout)."""
    noise: float = Field(0.0, ge=0)
    """Standard deviation of Gaussian noise on the values in [-1, 1]."""

    def apply(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        """Return (C, H, W) changed by all but the noise."""
        height, width = image.shape[1:]
        if self.crop:
            dy, dx = rng.integers(-self.crop, self.crop, 2, endpoint=True).tolist()
            moved = np.zeros_like(image)
            moved[:, max(-dy, 0) : height - max(dy, 0), max(-dx, 0) : width - max(dx, 0)] = image[
                :, max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)
            ]
            image = moved
        if self.flip and rng.random() < 0.5:
            image = image[:, :, ::-1]
        if self.erase:
            y, x = rng.integers(0, (height, width)).tolist()
            half = self.erase // 2
            image = image.copy()
            image[:, max(y - half, 0) : y - half + self.erase, max(x - half, 0) : x - half + self.erase] = 128
        return image


@final
class ImageDataset(Dataset):
    """Pictures of one size from the rows' `image` column: PNG or JPEG bytes, `{bytes, path}`, paths, or arrays.

    Arrays are (H, W) or (H, W, C), of whole numbers from 0 to 255 or of floats from 0 to 1.

    size: side of a square, or (height, width); a picture is scaled to cover it and cut at the centre. By default all
    must have the size of the first. channels: 1 (grey) or 3 (RGB); by default as in the first picture.
    classes: of the `label` column; without, there are no labels.

    Raises UserError that names the row: a picture that cannot be decoded or has another size, a label out of range.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        size: int | tuple[int, int] | None = None,
        channels: Literal[1, 3] | None = None,
        augment: Augment | None = None,
        classes: Classes | None = None,
    ):
        self.classes = classes
        self._rows, self._augment = rows, Augment() if augment is None else augment
        self._size, self._channels = (size, size) if isinstance(size, int) else size, channels
        self._images = rows.column(rows.require("image", "pictures"))
        if classes:
            rows.require("label", "the class of a picture")
        self._labels = classes.encode(rows, "label") if classes and not rows.streaming else None
        self._decoded: Pixels | None = None
        self.shape: tuple[int, int, int] = self._read(0).shape
        if self._augment.crop >= min(self.shape[1:]):
            raise UserError(f"augment.crop={self._augment.crop} leaves nothing of pictures of {self.shape[1:]} pixels")
        if not rows.streaming and len(rows) * math.prod(self.shape) <= IN_MEMORY_BYTES:
            self._decoded = self._read_all()
        self.decodes = self._decoded is None or self._augment != Augment()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def channels(self) -> Literal[1, 3]:
        """1 for grey, 3 for colour."""
        return 1 if self.shape[0] == 1 else 3

    def name(self, index: int) -> str:
        """Return the row's name."""
        return self._rows.name(index)

    def pixels(self, index: int) -> Pixels:
        """Return a picture without augmentation, (C, H, W)."""
        return self._read(index) if self._decoded is None else self._decoded[index]

    def _read(self, index: int) -> Pixels:
        return self._decode(index, self._images[index])

    def _decode(self, index: int, value: Any) -> Pixels:
        try:
            image = decode(value, self._rows.folder(index), self._size, self._channels)
        except Exception as error:  # a decoder that meets broken bytes may raise anything
            raise UserError(f"{self.name(index)}: the picture cannot be decoded: {error}") from error
        shape = getattr(self, "shape", image.shape)
        if image.shape[0] == 1 and shape[0] == 3:
            image = np.repeat(image, 3, 0)
        if image.shape != shape:
            key = "size" if image.shape[0] == shape[0] else "channels"
            raise UserError(
                f"{self.name(index)} has (channels, height, width) {image.shape}, the first picture has {shape}: "
                f"give the `{key}` that all are brought to"
            )
        return image

    def _read_all(self) -> Pixels:
        out = np.empty((len(self), *self.shape), np.uint8)

        def read(start: int) -> None:
            for i in range(start, min(start + 256, len(self))):
                out[i] = self._read(i)

        pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        try:
            for _ in pool.map(read, range(0, len(self), 256)):  # in order, so that the first fault is the one told
                pass
        finally:
            pool.shutdown(cancel_futures=True)
        return out

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Return one picture, augmented (noise still apart), and its label."""
        if self._rows.streaming:
            return self._streamed([index], [rng])[0]
        label = None if self._labels is None else self._labels[index]
        return self._example(self.pixels(index), label, rng)

    def _example(self, pixels: Pixels, label: int | None, rng: np.random.Generator) -> Example:
        example: Example = {"image": self._augment.apply(pixels, rng)}
        if label is not None:
            example["label"] = label
        if self._augment.noise:
            example["noise"] = rng.standard_normal(self.shape, np.float32)
        return example

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Stack, and bring the pixels to [-1, 1]."""
        return self._scale({name: np.stack([e[name] for e in examples]) for name in examples[0]})

    def batch(self, indices: Sequence[int], seeds: npt.NDArray[np.uint64]) -> dict[str, torch.Tensor]:
        """Take all at once where rows are streamed, or where nothing is decoded or drawn."""
        if self._rows.streaming:
            draws = [np.random.Generator(np.random.Philox(key=seed)) for seed in seeds.tolist()]
            return self.collate(self._streamed(indices, draws))
        if self._decoded is None or self._augment != Augment():
            return super().batch(indices, seeds)
        chosen = np.asarray(indices)
        batch: dict[str, np.ndarray] = {"image": self._decoded[chosen]}
        if self._labels is not None:
            batch["label"] = self._labels[chosen]
        return self._scale(batch)

    def order(self, lanes: Lanes, shuffle: int, *seed: object) -> Ordering:
        """Return the order of the rows."""
        return self._rows.order(lanes, shuffle, *seed)

    def prefetch(self, indices: Int) -> None:
        """Pass the hint on."""
        self._rows.prefetch(indices)

    def _streamed(self, indices: Sequence[int], draws: Sequence[np.random.Generator]) -> list[Example]:
        """Return examples of rows that are read now, all at once."""
        taken = self._rows.take(["image", "label"] if self.classes else ["image"], np.asarray(indices))
        labels: Sequence[Any] = [None] * len(indices)
        if self.classes:
            pairs = zip(indices, taken["label"], strict=True)
            labels = [self.classes.number(self._rows, i, "label", label) for i, label in pairs]
        pixels = [self._decode(i, value) for i, value in zip(indices, taken["image"], strict=True)]
        return [self._example(*part) for part in zip(pixels, labels, draws, strict=True)]

    def _scale(self, arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        batch["image"] = batch["image"].float().div_(127.5).sub_(1)
        if "noise" in batch:
            batch["image"].add_(batch.pop("noise"), alpha=self._augment.noise)
        return batch


class ImageOptions(Strict):
    """The options of an objective over pictures that say how they are read."""

    size: int | Annotated[tuple[int, int], Field(strict=False)] | None = None
    """Side of a square, or (height, width), that pictures are scaled and cut to; by default they stay as they are."""
    channels: Literal[1, 3] | None = None
    """1 for grey, 3 for colour; by default as in the first picture."""
    augment: Augment = Augment()
    """Random changes to the pictures that are trained on."""

    def shape(self, rows: Rows) -> tuple[int, int, int]:
        """Return (channels, height, width) of the first picture as it is read, which all others must have."""
        return ImageDataset(rows.select([0]), size=self.size, channels=self.channels).shape

    def pictures(
        self, rows: Rows, training: bool, shape: tuple[int, int, int], classes: Classes | None = None
    ) -> ImageDataset:
        """Return pictures of one shape, augmented where they are trained on. Raises UserError."""
        channels: Literal[1, 3] = 1 if shape[0] == 1 else 3
        augment = self.augment if training else Augment()
        found = ImageDataset(rows, size=self.size, channels=channels, augment=augment, classes=classes)
        if found.shape != shape:
            raise UserError(
                f"{rows.name(0)} has (channels, height, width) {found.shape}, the pictures to train on have {shape}: "
                "give the `objective.size` that all are brought to"
            )
        return found


def decode(value: Any, folder: str = "", size: tuple[int, int] | None = None, channels: int | None = None) -> Pixels:
    """Return a picture as (C, H, W): of 1 channel or 3 as `channels` says, by default as it is; of `size` if given.

    value: PNG, JPEG ... bytes, `{bytes, path}`, a path (relative to `folder`), or an array. Transparency is left out.
    Raises ValueError or OSError with the reason, and whatever a decoder raises on broken bytes.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, str):
        value = _load(value, folder)
    if isinstance(value, bytes):
        try:
            image: Image.Image = Image.open(io.BytesIO(value))
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"it has {image.mode} pixels; save it with 8 bits a channel")
            ImageOps.exif_transpose(image, in_place=True)
        except UnidentifiedImageError as error:
            raise ValueError("it is in no known picture format") from error
    elif isinstance(value, np.ndarray | list):
        image = Image.fromarray(_as_bytes(np.asarray(value)))
    else:
        raise ValueError(f"expected bytes, a path or an array, found {type(value).__name__}")
    grey = image.mode in ("1", "L", "LA") if channels is None else channels == 1
    mode = "L" if grey else "RGB"
    image = image if image.mode == mode else image.convert(mode)
    if size is not None and image.size != size[::-1]:
        image = ImageOps.fit(image, size[::-1], Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    return pixels[None] if grey else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _load(path: str, folder: str) -> bytes:
    if "://" not in path and folder and not os.path.isabs(path):
        path = f"{folder}/{path}"
    if "://" not in path:
        with open(path, "rb") as stream:
            return stream.read()
    import fsspec

    with fsspec.open(path, "rb") as stream:
        return bytes(stream.read())


def _as_bytes(array: np.ndarray) -> Pixels:
    """Bring an array of pixels to what PIL takes: (H, W) or (H, W, 3) bytes."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] != 3):
        raise ValueError(f"an array of shape {array.shape} is neither (height, width) nor (height, width, 3)")
    highest = 1.0 if array.dtype.kind == "f" else 255
    if array.dtype.kind not in "iuf" or not (array.min() >= 0 and array.max() <= highest):
        raise ValueError("an array must hold whole numbers from 0 to 255, or floats from 0 to 1")
    return (np.rint(array * 255) if array.dtype.kind == "f" else array).astype(np.uint8)
