"""What a launch configuration says of FSDP2 is followed or refused, never ignored."""

from __future__ import annotations

from pathlib import Path

import pytest

from scaletrain.engine.fsdp import Sharding
from scaletrain.errors import UserError

MESH = {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "4"}


def launched(tmp_path: Path, fsdp: str, mesh: str = "{}", processes: int = 8) -> dict[str, str]:
    """Return the variables that accelerate itself sets for a configuration."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    path = tmp_path / "launch.yaml"
    path.write_text(
        f"distributed_type: FSDP\nfsdp_config: {fsdp}\nparallelism_config: {mesh}\nnum_processes: {processes}\n"
        "num_machines: 1\nmain_process_port: 0\nmixed_precision: 'no'\ncompute_environment: LOCAL_MACHINE\n"
        "use_cpu: false\ndebug: false\n"
    )
    arguments, *_ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    )
    found = prepare_multi_gpu_env(arguments)
    return {k: v for k, v in found.items() if k.startswith(("FSDP_", "PARALLELISM_"))} | {"WORLD_SIZE": str(processes)}


def test_what_accelerate_sets_by_itself_passes(tmp_path: Path) -> None:
    found = launched(tmp_path, "{fsdp_version: 2}")
    assert found["FSDP_RESHARD_AFTER_FORWARD"] == "true"
    assert len(found) > 10
    assert Sharding.read(found) == Sharding()
    assert Sharding.read({}) == Sharding()


def test_options_and_meshes_are_read(tmp_path: Path) -> None:
    options = (
        "{fsdp_version: 2, fsdp_reshard_after_forward: false, fsdp_offload_params: true, "
        "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP, fsdp_transformer_layer_cls_to_wrap: 'A, B', "
        "fsdp_state_dict_type: SHARDED_STATE_DICT}"
    )
    mesh = "{parallelism_config_dp_replicate_size: 2, parallelism_config_dp_shard_size: 4}"
    found = Sharding.read(launched(tmp_path, options, mesh))
    assert found == Sharding(reshard=False, offload=True, replicas=2, classes=("A", "B"))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}, r"fsdp_sharding_strategy: SHARD_GRAD_OP .*fsdp_reshard_after"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "full_shard"}, "fsdp_reshard_after_forward: full_shard .*write true or false"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "fsdp_auto_wrap_policy: SIZE_BASED_WRAP .*leave it out"),
        ({"FSDP_BACKWARD_PREFETCH": "BACKWARD_POST"}, "fsdp_backward_prefetch: BACKWARD_POST"),
        ({"FSDP_FORWARD_PREFETCH": "true"}, "fsdp_forward_prefetch: true"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "train.recompute=full"),
        ({"FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true"}, "train.offload_activations=true"),
        ({"FSDP_IGNORED_MODULES": "head"}, "fsdp_ignored_modules: head"),
        ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, "parallelism_config_tp_size is 2"),
        ({**MESH, "WORLD_SIZE": "6"}, r"2 x 4 = 8, but there are 6 process\(es\)"),
        ({**MESH, "WORLD_SIZE": "1"}, r"there are 1 process\(es\)"),
        ({"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "WORLD_SIZE": "2"}, "dp_shard_size is 1: .* MULTI_GPU"),
    ],
)
def test_what_would_be_ignored_is_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sharding.read(variables)
