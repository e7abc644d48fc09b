from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

LAUNCH = Path(__file__).parents[2] / "launch"
FILES = sorted(LAUNCH.glob("*.yaml"))
PROCESSES = {"cpu": 1, "cpu_2": 2, "gpu": 1, "ddp_8gpu": 8, "cpu_2_fsdp2": 2, "fsdp2_8gpu": 8}


def test_the_files_are_there():
    assert {file.stem for file in FILES} >= set(PROCESSES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_it_and_the_header_tells_the_command(file):
    config = load_config_from_file(str(file))
    assert config.num_machines >= 1
    assert f"accelerate launch --config_file launch/{file.name} -m scaletrain run " in file.read_text()
    if file.stem in PROCESSES:
        assert config.num_processes == PROCESSES[file.stem]


@pytest.mark.parametrize(("name", "several"), [("cpu", False), ("cpu_2", True), ("gpu", False), ("ddp_8gpu", True)])
def test_accelerate_chooses_the_launcher_that_starts_as_many(name, several):
    args = launch_command_parser().parse_args(["--config_file", str(LAUNCH / f"{name}.yaml"), "-m", "scaletrain"])
    args, _, _ = _validate_launch_command(args)
    assert args.multi_gpu is several
    assert args.num_processes == PROCESSES[name]
    assert args.use_cpu is (name == "cpu")
    assert args.mixed_precision == "no"


@pytest.mark.parametrize("name", ["cpu_2_fsdp2", "fsdp2_8gpu"])
def test_accelerate_asks_for_fsdp2(name):
    args = launch_command_parser().parse_args(["--config_file", str(LAUNCH / f"{name}.yaml"), "-m", "scaletrain"])
    args, _, _ = _validate_launch_command(args)
    assert args.use_fsdp
    assert str(args.fsdp_version) == "2"
    assert args.num_processes == PROCESSES[name]


@pytest.mark.distributed
def test_cpu_2_starts_two_ranks_that_see_no_gpu(tmp_path):
    (tmp_path / "probe.py").write_text(
        "import json, os, sys\n"
        "keys = ('RANK', 'WORLD_SIZE', 'CUDA_VISIBLE_DEVICES')\n"
        "open(f'{sys.argv[1]}/{os.environ[\"RANK\"]}.json', 'w').write(json.dumps([os.environ[k] for k in keys]))\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH / "cpu_2.yaml")]
    subprocess.run(
        [*command, "-m", "probe", str(tmp_path)],
        check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found == [["0", "2", "-1,-1"], ["1", "2", "-1,-1"]]
