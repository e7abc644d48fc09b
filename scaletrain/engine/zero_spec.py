"""What a launch asks of DeepSpeed: by accelerate's variables, or by a file of DeepSpeed's own."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from scaletrain.errors import UserError

_ELSEWHERE = {
    "GRADIENT_CLIPPING": "players.<name>.clip",
    "GRADIENT_ACCUMULATION_STEPS": "train.global_batch and train.micro_batch",
    "DEEPSPEED_MOE_LAYER_CLS_NAMES": "blocks are found by themselves",
}
"""Variables of accelerate's for DeepSpeed that say what is said elsewhere."""
_OURS = {
    "optimizer": "players.<name>.optimizer",
    "scheduler": "players.<name>.schedule",
    "gradient_clipping": "players.<name>.clip",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "torch_autocast": "train.precision",
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch",
}
"""Keys of a DeepSpeed configuration that belong to the recipe, and where there."""


@dataclass(frozen=True)
class ZeroSpec:
    """What `accelerate launch` asks of DeepSpeed. config: its own `zero_optimization`, and other keys for it."""

    stage: int
    config: Mapping[str, Any]

    @property
    def offloads(self) -> bool:
        """Whether something is kept in host memory."""
        zero = self.config["zero_optimization"]
        return any(zero.get(part, {}).get("device") == "cpu" for part in ("offload_optimizer", "offload_param"))

    @classmethod
    def from_environment(cls) -> ZeroSpec:
        """Read accelerate's variables, or the DeepSpeed file that they name. Raises UserError."""
        if find_spec("deepspeed") is None:
            raise UserError(
                "this launch asks for DeepSpeed, which is not installed: pip install 'scaletrain[deepspeed]'."
            )
        path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        if path != "none":
            return cls._from_file(Path(path))
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        if stage not in ("1", "2", "3"):
            raise UserError(f"deepspeed_config.zero_stage is {stage}: take 1, 2 or 3, or distributed_type MULTI_GPU.")
        for variable, place in _ELSEWHERE.items():
            if os.environ.get(f"ACCELERATE_{variable}", "auto") not in ("auto", "none", "1"):
                key = variable.removeprefix("DEEPSPEED_").lower()
                raise UserError(
                    f"deepspeed_config.{key} belongs to the recipe ({place}): leave it out of the launch file."
                )
        zero: dict[str, Any] = {"stage": int(stage)}
        for part in ("optimizer", "param"):
            device = os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none")
            if device not in ("none", "cpu"):
                raise UserError(f"deepspeed_config.offload_{part}_device is {device}: take cpu or none.")
            if device == "cpu":
                zero[f"offload_{part}"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if "offload_param" in zero and stage != "3":
            raise UserError("deepspeed_config.offload_param_device needs zero_stage 3: below, parameters stay whole.")
        return cls(int(stage), {"zero_optimization": zero})

    @classmethod
    def _from_file(cls, path: Path) -> ZeroSpec:
        try:
            config = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"deepspeed_config_file {path} cannot be read: {error}") from error
        for key, place in _OURS.items():
            if config.pop(key, "auto") != "auto":
                raise UserError(f"{path}: `{key}` belongs to the recipe ({place}): remove it here, or write `auto`.")
        zero = {k: v for k, v in config.get("zero_optimization", {}).items() if v != "auto"}
        if zero.get("stage") not in (1, 2, 3):
            raise UserError(f"{path}: zero_optimization.stage is {zero.get('stage')}: take 1, 2 or 3.")
        for part in ("offload_optimizer", "offload_param"):
            if zero.get(part, {}).get("device", "none") not in ("none", "cpu"):
                raise UserError(f"{path}: zero_optimization.{part}.device: take cpu or none.")
        if zero["stage"] < 3 and zero.get("offload_param", {}).get("device") == "cpu":
            raise UserError(f"{path}: zero_optimization.offload_param needs stage 3: below, parameters stay whole.")
        return cls(zero["stage"], {**config, "zero_optimization": zero})
