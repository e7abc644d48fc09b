"""Tensors written by ours, and by torch.distributed.checkpoint as several sharded processes would."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from scaletrain.checkpoint.tensors import WHOLE, load_tensors, save_tensors

TENSORS = {
    "optimizer/exp_avg/model/w": torch.randn(5, 3),
    "optimizer/step/model/w": torch.tensor(7.0),
    "ema/model/w": torch.randn(5, 3).to(torch.bfloat16),
    "optimizer/state/model/w": torch.randint(0, 255, (8,), dtype=torch.uint8),
}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a
    )


def test_round_trip(tmp_path: Path) -> None:
    save_tensors(tmp_path / "model" / WHOLE, TENSORS)
    assert equal(load_tensors(tmp_path / "model"), TENSORS)
    assert load_tensors(tmp_path / "model", "ema/").keys() == {"ema/model/w"}
    assert load_tensors(tmp_path / "model", "nothing/") == {}


def test_a_player_without_state(tmp_path: Path) -> None:
    save_tensors(tmp_path / WHOLE, {})
    assert load_tensors(tmp_path) == {}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoint_reads_a_part_of_ours(tmp_path: Path) -> None:
    save_tensors(tmp_path / WHOLE, TENSORS)
    found = {"optimizer/exp_avg/model/w": torch.zeros(5, 3)}
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert torch.equal(found["optimizer/exp_avg/model/w"], TENSORS["optimizer/exp_avg/model/w"])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_ours_reads_what_distributed_checkpoint_wrote(tmp_path: Path) -> None:
    dcp.save(
        dict(TENSORS), storage_writer=dcp.HuggingFaceStorageWriter(str(tmp_path), save_distributed=True), no_dist=True
    )
    assert equal(load_tensors(tmp_path), TENSORS)


def test_shards_of_several_processes_are_put_together(tmp_path: Path) -> None:
    whole = TENSORS["optimizer/exp_avg/model/w"]
    for number, (first, last) in enumerate(((0, 2), (2, 5)), 1):
        where = {"w": {"saved_offsets": [first, 0]}}
        save_file(
            {"w": whole[first:last].contiguous()},
            tmp_path / f"shard-0000{number}-of-00002.safetensors",
            metadata={"DCP_SHARDING_INFO": json.dumps(where), "format": "pt"},
        )
    assert torch.equal(load_tensors(tmp_path)["w"], whole)
