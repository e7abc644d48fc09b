"""Rows, objectives and networks for the tests of objectives over texts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from scaletrain.config import Recipe, SourceSpec
from scaletrain.data.sources import open_rows
from scaletrain.networks.build import build
from scaletrain.objectives.base import Objective
from scaletrain.recipe import objective_of

BERT = {
    "model_type": "bert", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 32,
}  # fmt: skip


def rows_of(folder: Path, *rows: dict[str, Any], name: str = "rows.jsonl") -> Any:
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    return open_rows([SourceSpec(path=str(folder / name))])


def objective(kind: str, network: dict[str, Any] | None = None, seq_len: int | None = 32, **options: Any) -> Any:
    """Make an objective with one new network, and a tokenizer that is trained on the rows unless options differ."""
    options = {"tokenizer": {"vocab_size": 262}, **options}
    return from_recipe({"type": kind, **options}, {"model": {"config": network or BERT}}, seq_len)


def from_recipe(
    options: dict[str, Any], networks: dict[str, Any], seq_len: int | None = 32, **players: Any
) -> Objective[Any]:
    data = {"train": "unused", "seq_len": seq_len}
    recipe = {"objective": options, "networks": networks, "data": data, "players": players}
    return objective_of(Recipe.model_validate(recipe))


def network(own: Objective[Any], name: str = "model", seed: int = 0) -> Any:
    """Build an objective's network with large weights, so that outputs differ."""
    torch.manual_seed(seed)
    module: nn.Module = build(name, own.networks()[name]).eval()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, 0.5)
    return module


def whole_batch(dataset: Any) -> dict[str, torch.Tensor]:
    return dataset.batch(range(len(dataset)), np.arange(len(dataset), dtype=np.uint64))
