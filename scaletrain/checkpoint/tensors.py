"""Tensors by name in safetensors, in the layout that torch.distributed.checkpoint's safetensors storage reads.

A folder holds one file for each process that wrote; its reader puts parts of a tensor together by their offsets, and
gives any part to whoever asks. Files with whole tensors are written by safetensors itself:
torch.distributed.checkpoint's writer makes two more copies in memory, and holds Python's lock while it does.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

WHOLE = "shard-00001-of-00001.safetensors"


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a file of whole tensors. Raises OSError when the disk refuses."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path)
    except SafetensorError as error:  # a full disk, most often
        raise OSError(str(error)) from error


def load_tensors(folder: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Read the tensors of a folder whose names begin with `prefix`, each put together, on the CPU."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    if not tensors:
        return {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # each process reads for itself
        load(tensors, storage_reader=reader, no_dist=True)
    return tensors
