"""Pictures to classes, by cross-entropy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from pydantic import Field

from scaletrain.config import NetworkSpec
from scaletrain.data.classes import Classes
from scaletrain.data.dataset import Dataset
from scaletrain.data.images import ImageOptions
from scaletrain.data.sources import Rows
from scaletrain.objectives import base
from scaletrain.objectives.base import Networks, completed
from scaletrain.player import Batch, Term, Turn


class Config(ImageOptions):
    """Options of `objective` for `type: image_classification`."""

    num_classes: int | None = Field(None, ge=2)
    """By default what the labels of the training data tell: names, or ids up to the largest."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is spread evenly over all classes (Szegedy et al., 2016, section 7)."""


@final
class Objective(base.Objective[Config]):
    """Train `model`, by default LeNet-5, on columns `image` and `label`; evaluate loss and accuracy."""

    throughput: ClassVar[str] = "images"
    classes: Classes | None = None

    def prepare(self, train: Rows, eval: Rows | None) -> None:
        """Number the classes and find the shape of a picture. Raises UserError that names the row."""
        label = train.require("label", "the class of a picture")
        self.classes = self.classes or Classes.find(train, label, self.config.num_classes)
        self._shape = self.config.shape(train)

    def examples(self, rows: Rows, training: bool, window: bool = False) -> Dataset:
        """Return pictures and their classes."""
        return self.config.pictures(rows, training, self._shape, self.classes)

    def networks(self) -> dict[str, NetworkSpec]:
        """Return `model`, which is told the shape of a picture and the number of classes."""
        assert self.classes is not None
        channels, height, width = self._shape
        found = {"channels": channels, "height": height, "width": width, "classes": len(self.classes)}
        return {"model": completed(self.recipe, "model", "cnn", **found)}

    def restore(self, folders: Mapping[str, Path]) -> None:
        """Take the names of the classes from the network's folder."""
        if "model" in folders:
            self.classes = Classes.load(folders["model"])

    def save_assets(self, network: str, folder: Path) -> None:
        """Write the names of the classes, by id, beside the weights."""
        assert self.classes is not None
        self.classes.save(folder)

    def counts(self, turn: Turn, batch: Batch) -> dict[str, int]:
        """Count pictures."""
        return {"images": len(batch["label"])}

    def loss(self, turn: Turn, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the cross-entropy, smoothed, and the accuracy."""
        return self._terms(networks, batch, self.config.label_smoothing)

    def evaluate(self, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the plain cross-entropy and the accuracy."""
        return self._terms(networks, batch, 0.0)

    def _terms(self, networks: Networks, batch: Batch, smoothing: float) -> dict[str, Term]:
        label = batch["label"]
        logits: torch.Tensor = networks["model"](batch["image"]).float()
        loss = F.cross_entropy(logits, label, reduction="sum", label_smoothing=smoothing)
        correct = (logits.detach().argmax(1) == label).sum()
        return {"loss": Term(loss, "images"), "accuracy": Term(correct, "images", weight=0.0)}
