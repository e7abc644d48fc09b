"""Checkpoints of which each process writes its share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from scaletrain.checkpoint import integrity
from scaletrain.checkpoint.layout import checkpoints, number
from tests.distributed.engines import ENGINES, tensors
from tests.launch import run, start, steps
from tests.recipes.tiny import make_data, overrides

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

FULL_DISK = """
import os
from scaletrain.checkpoint.tensors import TensorFile
append = TensorFile.append
def refused(self, pieces):
    if os.environ["RANK"] == "1" and "step-00000008" in str(self._file.name):
        raise OSError(28, "No space left on device")
    append(self, pieces)
TensorFile.append = refused
from scaletrain.objectives.causal_lm import Config, Objective
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a run that was saved at steps 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("sharded")
    make_data(folder)
    run([*command(folder), "--run", "whole"], 2, variables=ENGINES["fsdp2"])
    return folder


def command(root: Path, *changes: str) -> list[object]:
    change = ["train.duration=12 steps", "evaluate.every=12 steps", "players.model.ema={decay: 0.9}"]
    return ["run", "lm/pretrain", *overrides("lm/pretrain", root), *change, *changes, "--root", root]


def test_each_process_writes_its_share_and_libraries_read_it(root: Path) -> None:
    latest = root / "whole" / "latest"
    assert integrity.verify(latest.resolve()) == []
    for folder in ("networks/model", "training/model"):
        sizes = [path.stat().st_size for path in sorted((latest / folder).glob("*.safetensors"))]
        assert len(sizes) == 2
        assert min(sizes) > max(sizes) / 3
    network = AutoModelForCausalLM.from_pretrained(latest / "networks" / "model")
    for name, tensor in network.state_dict().items():
        if name != "lm_head.weight":  # tied: not there twice
            assert torch.equal(tensor, tensors(latest)[f"networks/model/{name}"])
    index = json.loads((latest / "networks" / "model" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in network.parameters())


def test_written_at_once_it_is_the_same(root: Path) -> None:
    run([*command(root, "checkpoint.asynchronous=false"), "--run", "at-once"], 2, variables=ENGINES["fsdp2"])
    expected, found = (tensors(root / name / "latest") for name in ("whole", "at-once"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_disk_that_one_process_finds_full(asynchronous: str, root: Path, tmp_path: Path) -> None:
    (tmp_path / "full_disk.py").write_text(FULL_DISK)
    words = [*command(root, f"checkpoint.asynchronous={asynchronous}"), "--run", f"full-{asynchronous}"]
    codes, text = start([*words, "--code", tmp_path / "full_disk.py"], 2, variables=ENGINES["fsdp2"]).finish()
    assert codes == [3, 3], text
    assert "the checkpoint of step 8 could not be written" in text
    assert "No space left" in text
    folder = root / f"full-{asynchronous}"
    assert [number(path) for path in checkpoints(folder)] == [4]
    assert integrity.verify(checkpoints(folder)[0]) == []
    run(words, 2, variables=ENGINES["fsdp2"])
    assert steps(folder) == steps(root / "whole")
    expected, found = (tensors(path / "latest") for path in (root / "whole", folder))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert not list(folder.glob(".saving-*"))
