"""Which engine a run has: the one that it was launched for."""

from __future__ import annotations

import os
from collections.abc import Iterable

from scaletrain.engine.base import Engine
from scaletrain.engine.world import World
from scaletrain.errors import UserError


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


def _check_processes() -> None:
    """Raise UserError where accelerate was told to start several processes and has started this one alone.

    Its launcher of one process sets an address for several, and no rank.
    """
    given = os.environ.keys()
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"} <= given and "WORLD_SIZE" not in given:
        raise UserError(
            "the launch configuration asks for several processes, and accelerate has started one, as it does for "
            '`distributed_type: MULTI_CPU` or "NO". Write `distributed_type: MULTI_GPU`, and for the CPU '
            '`gpu_ids: "-1,-1"`, as in launch/cpu_2.yaml. Where one process is meant, unset MASTER_ADDR.'
        )


def check_launch(precisions: Iterable[str]) -> None:
    """Raise UserError where accelerate was told what a recipe says, and told otherwise. precisions: of its stages."""
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    for precision in precisions:
        if told not in ("no", precision):
            raise UserError(
                f"the launch configuration says `mixed_precision: {told}` and the recipe train.precision={precision}: "
                'the recipe decides, so set train.precision there, or `mixed_precision: "no"` in the launch file.'
            )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise UserError("the launch configuration asks for dynamo: leave dynamo_config out and set train.compile=true.")


def engine_name() -> str:
    """Return what `accelerate launch` asks for by its variables. Raises UserError for what there is no engine for."""
    _check_processes()
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        from scaletrain.engine.zero_spec import ZeroSpec

        return f"zero{ZeroSpec.from_environment().stage}"
    if not _asked("ACCELERATE_USE_FSDP"):
        for name in ("dp_shard", "tp", "cp", "sp"):
            if os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", "1") != "1":
                raise UserError(f"parallelism_config_{name}_size is for distributed_type FSDP: leave it out.")
        return "data_parallel"
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("the launch configuration asks for the first FSDP: set `fsdp_version: 2` in its fsdp_config.")
    from scaletrain.engine.fsdp import Sharding

    sharding = Sharding.read(os.environ)
    if sharding.offload and os.environ.get("WORLD_SIZE", "1") == "1":
        raise UserError("fsdp_offload_params needs several processes: one has nothing in parts. Leave it out.")
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # else transformers reads weights on one rank alone
    return "fsdp2"


def build_engine(world: World, precision: str) -> Engine:
    """Return the engine; a single process has nothing to shard, but it may put things off the GPU."""
    name = engine_name()
    if name.startswith("zero"):
        from scaletrain.engine.deepspeed import Zero
        from scaletrain.engine.zero_spec import ZeroSpec

        spec = ZeroSpec.from_environment()
        if world.size > 1 or spec.offloads:
            return Zero(world, precision, spec)
    if name == "fsdp2" and world.size > 1:
        from scaletrain.engine.fsdp import FullyShard, Sharding

        return FullyShard(world, precision, Sharding.read(os.environ))
    from scaletrain.engine.data_parallel import DataParallel

    return DataParallel(world, precision)
