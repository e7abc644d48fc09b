"""The engines, and the variables by which `accelerate launch` asks for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

_DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
ENGINES = {
    "ddp": {},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    **{f"zero{n}": {**_DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(n)} for n in (1, 2, 3)},
}


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint, by its folder and name: each is in one of the files there."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(checkpoint.resolve().rglob("*.safetensors")):
        folder = path.parent.relative_to(checkpoint.resolve())
        for name, tensor in load_file(path).items():
            assert f"{folder}/{name}" not in found
            found[f"{folder}/{name}"] = tensor
    assert found
    return found


def assert_close(checkpoint: Path, expected: Path, **tolerance: Any) -> None:
    """Compare all tensors of two checkpoints: weights, moments, averages."""
    ours, theirs = tensors(checkpoint), tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
