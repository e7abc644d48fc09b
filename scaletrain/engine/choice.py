"""Which engine a run has: the one that it was launched for."""

from __future__ import annotations

import os

from scaletrain.engine.base import Engine
from scaletrain.engine.world import World
from scaletrain.errors import UserError


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


def engine_name() -> str:
    """Return what `accelerate launch` asks for by its variables. Raises UserError for what there is no engine for."""
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        raise UserError(
            "the launch configuration asks for DeepSpeed, for which there is no engine yet: take distributed_type FSDP "
            "with fsdp_version 2 (launch/fsdp2_8gpu.yaml), or MULTI_GPU."
        )
    if not _asked("ACCELERATE_USE_FSDP"):
        return "data_parallel"
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("the launch configuration asks for the first FSDP: set `fsdp_version: 2` in its fsdp_config.")
    return "fsdp2"


def build_engine(world: World, precision: str) -> Engine:
    """Return the engine; a single process has nothing to shard."""
    if engine_name() == "fsdp2" and world.size > 1:
        from scaletrain.engine.fsdp import FullyShard

        return FullyShard(world, precision)
    from scaletrain.engine.data_parallel import DataParallel

    return DataParallel(world, precision)
