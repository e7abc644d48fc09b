"""Losses that are made in parts, under every kind of engine: micro-batches without a learned token, and all options."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.engines import ENGINES
from tests.distributed.test_engines import losses
from tests.launch import run
from tests.recipes.tiny import make_data, overrides

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SPARSE = '''
"""A causal language model that learns nothing from some micro-batches, on one rank or the other."""

from typing import final

from scaletrain.objectives import causal_lm

Config = causal_lm.Config


@final
class Objective(causal_lm.Objective):
    def loss(self, turn, networks, batch):
        if int(batch["input_ids"].sum()) % 2:
            batch = {**batch, "learned": batch["learned"][:0]}
        return super().loss(turn, networks, batch)
'''


BY_TOKEN = '''
"""A causal language model whose loss is made of the probability of each token."""

from typing import final

from scaletrain.networks import heads
from scaletrain.objectives import causal_lm
from scaletrain.player import Term

Config = causal_lm.Config


def log_p(logits, targets):
    return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


@final
class Objective(causal_lm.Objective):
    def loss(self, turn, networks, batch):
        targets = batch["labels"].flatten().index_select(0, batch["learned"])
        inputs = {k: batch[k] for k in ("input_ids", "position_ids")}
        found = heads.reduce(networks["model"], inputs, batch["learned"], log_p, [targets], per_token=True)
        return {"loss": Term(found.square().sum(), per="targets")}
'''


@pytest.mark.parametrize(
    ("name", "code"),
    [("lm/pretrain", SPARSE), ("lm/lora", SPARSE), ("lm/pretrain", BY_TOKEN)],
    ids=["pretrain", "lora", "by token"],
)
def test_two_processes_train_as_one(name: str, code: str, tmp_path: Path) -> None:
    make_data(tmp_path)
    (tmp_path / "own.py").write_text(code)
    words = ["run", name, *overrides(name, tmp_path), "objective.type=own", "--code", tmp_path / "own.py"]
    words += [
        "objective.label_smoothing=0.1",
        "objective.z_loss=0.01",
        "objective.neftune_alpha=5",
        "data.packing=true",
    ]
    words += ["train.duration=8 steps", "train.global_batch=8", "train.micro_batch=2", "log.every=1"]
    words += ["checkpoint.every=1000 steps", "evaluate.samples=0", "--root", tmp_path]
    if name == "lm/lora":
        words += ["players.model.optimizer.lr=0.01", "networks.model.adapter.train_also=[lm_head]"]
    if code is BY_TOKEN:
        words += ["networks.model.config.tie_word_embeddings=false"]
    run([*words, "--run", "one"])
    expected = losses(tmp_path / "one")
    for engine in ("ddp", "fsdp2", "zero2", "zero3"):
        run([*words, "--run", engine], 2, variables=ENGINES[engine])
        assert losses(tmp_path / engine) == pytest.approx(expected, rel=1e-5)
