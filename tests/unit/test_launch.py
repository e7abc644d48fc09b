"""Each file in launch/ is read by the program that it is for; `--launch` starts what it says and tells how it ended."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from kubeflow_trainer_api import models
from torch.distributed.run import get_args_parser

from scaletrain.engine.choice import engine_name
from scaletrain.errors import UserError
from scaletrain.launching import check, find, names, start, without_launch

LAUNCH = Path(__file__).parents[2] / "launch"
PROCESSES = {
    "cpu": 1, "cpu_2": 2, "cpu_2_fsdp2": 2, "cpu_2_zero2": 2, "cpu_2_zero3": 2, "gpu": 1, "ddp_8gpu": 8,
    "fsdp2_8gpu": 8, "hsdp_8gpu": 8, "zero2_8gpu": 8, "zero3_8gpu": 8, "zero3_offload_8gpu": 8,
    "two_nodes": 16, "two_nodes_hsdp": 16,
}  # fmt: skip
CLUSTERS = {"kubeflow_trainjob.yaml", "skypilot.yaml", "slurm.sbatch", "torchrun_elastic.sh"}


def launched(name: str, *options: str):
    """Return what `accelerate launch` makes of a file."""
    file = str(LAUNCH / f"{name}.yaml")
    args, *_ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", file, *options, "-m", "scaletrain"])
    )
    return args


def test_no_file_is_without_a_test():
    assert {file.name for file in LAUNCH.iterdir()} == CLUSTERS | {f"{name}.yaml" for name in PROCESSES}
    assert names() == sorted(PROCESSES)


@pytest.mark.parametrize("name", PROCESSES)
def test_accelerate_reads_it_and_the_header_tells_the_command(name):
    file = LAUNCH / f"{name}.yaml"
    check(file)
    config = load_config_from_file(str(file))
    assert config.num_processes == PROCESSES[name]
    assert config.num_machines == (2 if name.startswith("two_nodes") else 1)
    options = "--machine_rank 0 --main_process_ip 10.0.0.1 " if config.num_machines == 2 else ""
    assert f"accelerate launch --config_file launch/{file.name} {options}-m scaletrain run " in file.read_text()


@pytest.mark.parametrize("name", PROCESSES)
def test_accelerate_starts_as_many_as_it_says(name):
    args = launched(name)
    several = args.multi_gpu or args.use_fsdp or args.use_deepspeed
    assert several is (PROCESSES[name] > 1)
    assert args.num_processes == PROCESSES[name]
    assert args.mixed_precision == "no"
    assert (args.gpu_ids == "-1,-1") is name.startswith("cpu_2")


@pytest.mark.parametrize("name", ["cpu_2_fsdp2", "fsdp2_8gpu", "hsdp_8gpu", "two_nodes_hsdp"])
def test_accelerate_asks_for_fsdp2(name):
    args = launched(name)
    assert args.use_fsdp
    assert str(args.fsdp_version) == "2"
    mesh = (args.parallelism_config_dp_replicate_size, args.parallelism_config_dp_shard_size)
    if "hsdp" in name:
        assert args.use_parallelism_config
        assert mesh == (2, PROCESSES[name] // 2)
    else:
        assert mesh == (1, 1)


@pytest.mark.parametrize("name", ["cpu_2_zero2", "cpu_2_zero3", "zero2_8gpu", "zero3_8gpu", "zero3_offload_8gpu"])
def test_accelerate_asks_for_zero(name):
    args = launched(name)
    assert args.use_deepspeed
    assert args.zero_stage == int(re.findall(r"zero(\d)", name)[0])
    offload = "cpu" if "offload" in name else None
    assert (args.offload_optimizer_device, args.offload_param_device) == (offload, offload)


@pytest.mark.parametrize("file", ["slurm.sbatch", "torchrun_elastic.sh"])
def test_shellcheck_finds_nothing(file):
    binary = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert binary, "shellcheck is missing: pip install -e '.[test]'"
    done = subprocess.run([binary, str(LAUNCH / file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def programs(folder: Path, **texts: str) -> dict[str, str]:
    """Write shell programs, and return an environment that finds them first."""
    for name, text in texts.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def as_torchrun_reads(words: list[str]):
    """Return what torchrun makes of its command line."""
    assert words[0] == "torchrun"
    return get_args_parser().parse_args(words[1:])


def test_the_elastic_script_asks_torchrun_for_what_its_header_says(tmp_path):
    environment = programs(tmp_path, torchrun='printf "%s\\n" "$@"; echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT"')
    script = [str(LAUNCH / "torchrun_elastic.sh"), "run", "quickstart", "train.duration=6 steps", "--name", "x"]
    environment |= {"HEAD": "10.0.0.1", "NODES": "1:4", "PROCESSES": "2"}
    *words, seconds = subprocess.run(
        script, env=environment, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    args = as_torchrun_reads(["torchrun", *words])
    assert (args.nnodes, args.nproc_per_node, args.max_restarts) == ("1:4", "2", 10)
    assert (args.rdzv_backend, args.rdzv_endpoint, args.rdzv_id) == ("c10d", "10.0.0.1:29500", "scaletrain")
    assert (args.module, args.training_script) == (True, "scaletrain")
    assert args.training_script_args == ["run", "quickstart", "train.duration=6 steps", "--name", "x"]
    assert seconds == "300"
    del environment["HEAD"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "HEAD: the address" in done.stderr


SLURM = {
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_JOB_ID": "123456",
}
SRUN = """printf '%s\\n' "$@" >"$NOTES/srun"
echo $$ >"$NOTES/step"
trap 'sleep 0.2; exit 1' TERM
[ -e "$NOTES/crash" ] && exit 1
[ -e "$NOTES/wait" ] && while true; do sleep 0.05; done
exit 0"""
SCONTROL = """if [ "$1" = show ]; then echo n1; echo n2; else echo "$@" >"$NOTES/requeued"; fi"""


@pytest.mark.parametrize(("file", "status", "requeued"), [("", 0, False), ("crash", 1, False), ("wait", 1, True)])
def test_the_slurm_job_is_requeued_after_the_signal_alone(file, status, requeued, tmp_path):
    scancel = 'echo "$@" >"$NOTES/cancelled"; kill -TERM "$(cat "$NOTES/step")"'
    environment = programs(tmp_path, srun=SRUN, scontrol=SCONTROL, scancel=scancel)
    if file:
        (tmp_path / file).touch()
    words = ["bash", str(LAUNCH / "slurm.sbatch"), "run", "quickstart", "--name", "x"]
    job = subprocess.Popen(words, env={**environment, **SLURM, "NOTES": str(tmp_path)})
    if file == "wait":
        while not (tmp_path / "step").exists():
            time.sleep(0.02)
        time.sleep(0.1)  # for its trap
        job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == status
    assert (tmp_path / "requeued").exists() is requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 123456\n"
        assert (tmp_path / "cancelled").read_text() == "--signal=TERM 123456\n"
    option, *step = (tmp_path / "srun").read_text().splitlines()
    assert option == "--kill-on-bad-exit=0"
    args = as_torchrun_reads(step)
    assert (args.nnodes, args.nproc_per_node, args.rdzv_backend) == ("2", "8", "c10d")
    assert (args.rdzv_endpoint, args.rdzv_id) == ("n1:23456", "123456")
    assert args.training_script_args == ["run", "quickstart", "--name", "x"]


def test_slurm_is_told_to_signal_the_script_before_the_agents_give_up():
    text = (LAUNCH / "slurm.sbatch").read_text()
    notice = int(re.findall(r"--signal=B:USR1@(\d+)", text)[0])
    assert notice > int(re.findall(r"SHUTDOWN_TIMEOUT=(\d+)", text)[0])
    assert "#SBATCH --requeue" in text


KINDS = {
    "PersistentVolumeClaim": models.IoK8sApiCoreV1PersistentVolumeClaim,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
    "TrainJob": models.TrainerV1alpha1TrainJob,
}
"""The models that Kubeflow Trainer's project makes of its own schema, from which unknown keys are lost."""


def manifests() -> dict[str, dict]:
    return {d["kind"]: d for d in yaml.safe_load_all((LAUNCH / "kubeflow_trainjob.yaml").read_text())}


@pytest.mark.parametrize("kind", KINDS)
def test_the_kubernetes_manifest_is_what_its_schema_says(kind):
    document = manifests()[kind]
    assert KINDS[kind].from_dict(document).to_dict() == document


def test_the_schema_refuses_what_is_wrong():
    job = manifests()["TrainJob"]
    job["spec"]["trainer"]["numNode"] = job["spec"]["trainer"].pop("numNodes")
    assert KINDS["TrainJob"].from_dict(job).to_dict() != job
    job["spec"]["trainer"]["numNodes"] = "two"
    with pytest.raises(ValueError, match="numNodes"):
        KINDS["TrainJob"].from_dict(job)


def test_the_kubernetes_manifests_refer_to_one_another():
    found = manifests()
    runtime, job = found["TrainingRuntime"], found["TrainJob"]["spec"]
    assert set(found) == set(KINDS)
    assert job["runtimeRef"] | {"apiGroup": "trainer.kubeflow.org"} == {
        "apiGroup": "trainer.kubeflow.org",
        "kind": "TrainingRuntime",
        "name": runtime["metadata"]["name"],
    }
    pod = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    claim = volumes["runs"]["persistentVolumeClaim"]["claimName"]
    assert claim == found["PersistentVolumeClaim"]["metadata"]["name"]
    assert {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]} == {
        "runs": "/runs",
        "shm": "/dev/shm",
    }
    (seconds,) = [int(e["value"]) for e in container["env"] if e["name"] == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
    assert seconds < pod["terminationGracePeriodSeconds"]
    args = as_torchrun_reads([*job["trainer"]["command"], *job["trainer"]["args"]])
    assert args.training_script_args[:2] == ["run", "lm/pretrain"]


def test_the_skypilot_task_starts_torchrun(tmp_path):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert set(task) == {"name", "num_nodes", "workdir", "resources", "envs", "setup", "run"}
    assert set(task["resources"]) == {"accelerators", "use_spot", "disk_size", "job_recovery"}
    environment = programs(tmp_path, torchrun='printf "%s\\n" "$@"')
    environment |= {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_RANK": "1"}
    environment |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "RUNS": "s3://b/runs"}
    done = subprocess.run(["bash", "-euc", task["run"]], env=environment, check=True, capture_output=True, text=True)
    args = as_torchrun_reads(["torchrun", *done.stdout.splitlines()])
    assert (args.nnodes, args.nproc_per_node, args.node_rank, args.master_addr) == ("2", "8", 1, "10.0.0.1")
    assert "checkpoint.remote=s3://b/runs" in args.training_script_args


def test_a_launch_file_is_found_by_name_path_and_with_options(tmp_path):
    own = tmp_path / "my cluster.yaml"
    own.write_text("distributed_type: MULTI_GPU\n")
    assert find("cpu_2") == find("cpu_2.yaml") == (LAUNCH / "cpu_2.yaml", [])
    assert find(str(own)) == (own, [])
    assert find("two_nodes --machine_rank 1") == (LAUNCH / "two_nodes.yaml", ["--machine_rank", "1"])


def test_the_files_are_found_by_their_path_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find("launch/cpu_2.yaml") == (LAUNCH / "cpu_2.yaml", [])


@pytest.mark.parametrize(
    ("launch", "told"),
    [
        ("cpu2", "no file cpu2. Did you mean `cpu_2`?"),
        ("skypilot", "no file skypilot"),
        ("nosuch/cpu_2.yaml", "no file nosuch/cpu_2.yaml"),
        ("cpu_2 'x", "No closing quotation"),
        ("", "give a file or a name"),
    ],
)
def test_a_launch_file_that_is_not_there(launch, told):
    with pytest.raises(UserError, match=re.escape(told)):
        find(launch)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{distributed_type: MULTI_CPU, num_processes: 2}", "accelerate starts one process.*gpu_ids: \"-1,-1\""),
        ('{distributed_type: "NO", num_processes: 2}', "accelerate starts one process"),
        ("{distributed_type: MEGATRON_LM, num_processes: 2}", "no engine for distributed_type MEGATRON_LM"),
        ("{distributed_type: MULTI_GPU, processes: 2}", "unknown keys.*processes"),
        ("{num_processes: 2}", "`distributed_type` must be specified"),
        ("[1]", "not a configuration"),
        ("{a: [", "not a configuration"),
    ],
)  # fmt: skip
def test_a_launch_file_that_would_start_something_else(text, told, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=told):
        check(tmp_path / "x.yaml")


def test_options_that_accelerate_does_not_know(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="unrecognized arguments: --nosuch"):
        start("cpu_2 --nosuch 3", ["run", "quickstart"])


def test_a_launch_within_a_launch(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="a launcher has started this process already"):
        start("cpu_2", ["run", "quickstart"])


@pytest.mark.parametrize("given", [["--launch", "cpu_2"], ["--launch=cpu_2"]])
def test_the_command_of_each_process(given):
    assert without_launch(["run", "a", *given, "b=1", "--run", "x"]) == ["run", "a", "b=1", "--run", "x"]


def test_one_process_where_several_were_asked_for_is_refused(monkeypatch):
    """As accelerate's launcher of one process sets them for `distributed_type: MULTI_CPU`."""
    for name in ("RANK", "WORLD_SIZE", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert engine_name() == "data_parallel"
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(UserError, match=r"MULTI_CPU.*MULTI_GPU.*launch/cpu_2\.yaml"):
        engine_name()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert engine_name() == "data_parallel"


@pytest.mark.slow
def test_multi_cpu_under_accelerate_itself(tmp_path):
    (tmp_path / "x.yaml").write_text("{distributed_type: MULTI_CPU, num_processes: 2, use_cpu: true}")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "x.yaml")]
    command += ["-m", "scaletrain", "run", "vision/cnn", "--root", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1  # accelerate's, of our 2
    assert "asks for several processes, and accelerate has started one" in done.stderr
    assert not (tmp_path / "vision-cnn").exists()


def launching(folder: Path, launch: str, *words: str) -> subprocess.Popen[str]:
    """Start a small run with `--launch`, in a process group of its own."""
    command = [sys.executable, "-m", "scaletrain", "run", "vision/cnn", "--launch", launch, "--root", str(folder)]
    command += ["data.train.rows=200", "train.global_batch=8", "log.every=1", "checkpoint.every=100_000 steps"]
    command += ["evaluate.every=100_000 steps", "--run", "r", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, start_new_session=True, **pipes)  # type: ignore[call-overload]


@pytest.mark.slow
@pytest.mark.distributed
def test_launch_gives_the_exit_status_of_its_processes(tmp_path):
    run = launching(tmp_path, "cpu_2", "train.global_batch=7", "train.micro_batch=3")
    printed, _ = run.communicate(timeout=120)
    assert run.returncode == 2, printed
    assert printed.strip().splitlines()[-1].startswith("error: train.global_batch=7 does not divide")
    assert "Traceback" not in printed

    run = launching(tmp_path, "cpu_2", "train.duration=5000 steps")
    while not (tmp_path / "r" / "metrics.jsonl").exists() and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    printed, _ = run.communicate(timeout=120)
    assert run.returncode == 3, printed
    assert "saved; run the same command again" in printed
    assert "Traceback" not in printed

    code = "from scaletrain.objectives.image_classification import Config, Objective\nimport os\n"
    (tmp_path / "broken.py").write_text(f"{code}if os.environ.get('RANK') == '1':\n    os.kill(os.getpid(), 9)\n")
    run = launching(tmp_path, "cpu_2", "train.duration=5000 steps", "--code", str(tmp_path / "broken.py"))
    printed, _ = run.communicate(timeout=120)
    assert run.returncode == 1, printed
    assert "rank 1 was ended by SIGKILL" in printed


@pytest.mark.slow
@pytest.mark.parametrize(("launch", "processes"), [("cpu", 1), ("cpu_2", 2)])
def test_launch_trains_on_as_many_processes_and_takes_the_whole_command(launch, processes, tmp_path):
    run = launching(tmp_path, launch, "train.duration=3 steps")
    printed, _ = run.communicate(timeout=120)
    assert run.returncode == 0, printed
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["status"] == "done"
    assert summary["hardware"]["processes"] == processes


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
