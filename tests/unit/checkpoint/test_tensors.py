"""Tensors written by ours, and by torch.distributed.checkpoint as several sharded processes would."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from scaletrain.checkpoint.tensors import WHOLE, TensorFile, Tensors, save_tensors, stored

TENSORS = {
    "optimizer/exp_avg/model/w": torch.randn(5, 3),
    "optimizer/step/model/w": torch.tensor(7.0),
    "ema/model/w": torch.randn(5, 3).to(torch.bfloat16),
    "optimizer/state/model/w": torch.randint(0, 255, (8,), dtype=torch.uint8),
}


def equal(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a
    )


def test_round_trip(tmp_path: Path) -> None:
    save_tensors(tmp_path / "model" / WHOLE, TENSORS)
    assert equal(Tensors(tmp_path / "model"), TENSORS)


def test_a_player_without_state(tmp_path: Path) -> None:
    save_tensors(tmp_path / WHOLE, {})
    assert not Tensors(tmp_path)


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
    assert equal(Tensors(tmp_path), TENSORS)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_files_of_several_processes_are_one_set(tmp_path: Path) -> None:
    names = sorted(TENSORS)
    for number, part in enumerate((names[:1], names[1:]), 1):
        save_tensors(tmp_path / f"shard-0000{number}-of-00002.safetensors", {name: TENSORS[name] for name in part})
    assert equal(Tensors(tmp_path), TENSORS)
    found = {name: torch.zeros_like(value) for name, value in TENSORS.items()}
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert equal(found, TENSORS)
    for name, value in TENSORS.items():
        assert torch.equal(load_file(stored(tmp_path)[name].path)[name], value)  # by the format's own library


def test_a_piece_is_read_by_itself(tmp_path: Path) -> None:
    save_tensors(tmp_path / WHOLE, TENSORS)
    for name, value in TENSORS.items():
        entry, flat = stored(tmp_path)[name], value.flatten()
        assert torch.equal(entry.read(1, 4), flat[1:4])
        assert entry.read(3, 3).numel() == 0
        assert entry.read(2).untyped_storage().nbytes() == flat[2:].numel() * value.dtype.itemsize


def test_tensors_that_were_not_announced_are_refused(tmp_path: Path) -> None:
    kinds = {"w": (torch.Size([2]), torch.float)}
    with pytest.raises(ValueError, match="in place of"), TensorFile(tmp_path / "a", kinds) as file:
        file.append([torch.zeros(3)])
    with pytest.raises(ValueError, match="1 tensors are missing"), TensorFile(tmp_path / "b", kinds):
        pass


def test_a_file_that_was_cut_is_told(tmp_path: Path) -> None:
    save_tensors(tmp_path / WHOLE, {"w": torch.zeros(100)})
    os.truncate(tmp_path / WHOLE, (tmp_path / WHOLE).stat().st_size - 8)
    with pytest.raises(OSError, match="ends before"):
        Tensors(tmp_path)["w"]
