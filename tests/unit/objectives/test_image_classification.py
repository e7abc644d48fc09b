"""The loss against its formula; classes and shapes find their way into the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from scaletrain.config import Recipe
from scaletrain.data.sources import Rows
from scaletrain.data.tables import ArrayTable
from scaletrain.errors import UserError
from scaletrain.networks.build import build
from scaletrain.objectives.image_classification import Config, Objective
from tests.unit.objectives.prepared import prepared


def objective(**options: Any) -> Objective:
    recipe = {"objective": {"type": "image_classification", **options}, "data": {"train": "sklearn:digits"}}
    return Objective(Config(**options), Recipe.model_validate(recipe))


def rows(labels: list[Any], side: int = 12) -> Rows:
    pictures = np.random.default_rng(0).integers(0, 256, (len(labels), side, side), np.uint8)
    return Rows([ArrayTable("set", {"image": pictures, "label": np.array(labels)})])


def test_smoothed_cross_entropy_and_accuracy_are_sums_over_pictures() -> None:
    logits, label = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    networks = {"model": nn.Identity()}
    task = objective(label_smoothing=0.1)
    terms = task.loss(task.turns[0], networks, {"image": logits, "label": label})
    p = logits.double().numpy()
    p = np.exp(p) / np.exp(p).sum(1, keepdims=True)
    target = 0.9 * np.eye(4)[label.numpy()] + 0.1 / 4
    assert terms["loss"].sum.item() == pytest.approx(-(target * np.log(p)).sum(), rel=1e-5)
    assert terms["accuracy"].sum.item() == (p.argmax(1) == label.numpy()).sum()
    assert {(t.per, t.weight) for t in terms.values()} == {("images", 1.0), ("images", 0.0)}
    assert task.counts(task.turns[0], {"image": logits, "label": label}) == {"images": 6}
    plain = task.evaluate(networks, {"image": logits, "label": label})["loss"].sum.item()
    assert plain == pytest.approx(-np.log(p[range(6), label]).sum(), rel=1e-5)


def test_the_network_is_told_shape_and_classes(tmp_path: Path) -> None:
    task = objective(size=16, channels=3, augment={"flip": True})
    data = prepared(task, rows(["b", "a", "c"]), rows(["c"], side=20))
    spec = task.networks()["model"]
    assert (spec.type, spec.config) == ("cnn", {"channels": 3, "height": 16, "width": 16, "classes": 3})
    batch = data.train.batch([0, 2], np.zeros(2, np.uint64))
    assert build("model", spec)(batch["image"]).shape == (2, 3)
    assert batch["label"].tolist() == [1, 2]
    assert data.eval is not None
    assert data.eval.batch([0], np.zeros(1, np.uint64))["label"].tolist() == [2]
    task.save_assets("model", tmp_path)
    assert json.loads((tmp_path / "classes.json").read_text()) == {"names": ["a", "b", "c"], "named": True}


def test_labels_out_of_range_are_named() -> None:
    with pytest.raises(UserError, match="set row 1: `label` is 7, out of range"):
        prepared(objective(num_classes=5), rows([0, 7]), None)
    with pytest.raises(UserError, match="set row 0: `label` is 2, out of range"):
        prepared(objective(), rows([0, 1]), rows([2]))
    with pytest.raises(UserError, match="the class of a picture"):
        prepared(objective(), Rows([ArrayTable("set", {"image": np.zeros((1, 12, 12), np.uint8)})]), None)
