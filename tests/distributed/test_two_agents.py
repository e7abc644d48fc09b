"""Two rendezvous agents on the loopback, as on two nodes: a killed worker and a lost node, and the run goes on."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from scaletrain.launching import LAUNCH
from tests.launch import metrics, run, steps
from tests.recipes.test_recipes import final_weights
from tests.recipes.tiny import make_data, overrides

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def words(folder: Path, name: str, length: int) -> list[str]:
    """Return a small run. torchrun takes `--run` for an option of its own, so it is `--name`."""
    change = [f"train.duration={length} steps", "evaluate.every=1000 steps", "checkpoint.every=5 steps"]
    return ["run", "lm/pretrain", *overrides("lm/pretrain", folder), *change, "--root", str(folder), "--name", name]


def listening(port: int) -> bool:
    """Return whether someone answers at a port of this machine."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def agents(folder: Path, command: list[str], port: int, **variables: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start two agents with one worker each. All of them are gone at the end."""
    scripts = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": scripts, "ACCELERATE_USE_CPU": "true", **variables}
    started = []
    try:
        for number in range(2):
            with (folder / f"agent-{number}.log").open("wb") as output:
                started.append(subprocess.Popen(command, stdout=output, stderr=output, env=environment))
            while not listening(port):  # the first keeps what the agents know
                assert started[0].poll() is None
                time.sleep(0.05)
        yield started
    finally:
        for agent in started:
            for process in [*workers([agent]), agent]:
                process.kill()
            agent.wait()


def workers(started: list[subprocess.Popen[bytes]]) -> list[psutil.Process]:
    """Return the living workers of the agents, by rank."""
    found = [child for agent in started if agent.poll() is None for child in psutil.Process(agent.pid).children()]
    return sorted(found, key=lambda process: int(process.environ()["RANK"]))


def wait_for(folder: Path, step: int, logs: Path) -> None:
    """Wait until a step has been taken."""
    end = time.monotonic() + 300
    while max(steps(folder), default=0) < step:
        assert time.monotonic() < end, "\n".join(path.read_text() for path in logs.glob("agent-*.log"))
        time.sleep(0.01)


def ends(started: list[subprocess.Popen[bytes]], logs: Path) -> list[int]:
    """Return the agents' exit statuses."""
    try:
        return [agent.wait(240) for agent in started]
    except subprocess.TimeoutExpired:
        raise AssertionError("\n".join(path.read_text() for path in logs.glob("agent-*.log"))) from None


def test_a_killed_worker_comes_back_and_changes_nothing(tmp_path: Path) -> None:
    make_data(tmp_path)
    run(words(tmp_path, "whole", 40), 2)
    port = free_port()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    torchrun += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--max_restarts", "3"]
    with agents(tmp_path, [*torchrun, "-m", "scaletrain", *words(tmp_path, "parts", 40)], port) as started:
        wait_for(tmp_path / "parts", 17, tmp_path)
        workers(started)[0].send_signal(signal.SIGKILL)  # rank 0 holds the folder's lock, and may be writing
        assert ends(started, tmp_path) == [0, 0]
    assert final_weights(tmp_path / "parts") == final_weights(tmp_path / "whole")
    assert steps(tmp_path / "parts") == list(range(1, 41))
    losses = [[r["loss"] for r in metrics(tmp_path / n) if r["kind"] == "train"] for n in ("parts", "whole")]
    assert losses[0] == losses[1]


def test_a_lost_node_leaves_the_other_to_go_on(tmp_path: Path) -> None:
    make_data(tmp_path)
    run(words(tmp_path, "whole", 90), 2)
    port = free_port()
    script = [str(LAUNCH / "torchrun_elastic.sh"), *words(tmp_path, "parts", 90)]
    variables = {"HEAD": "127.0.0.1", "PORT": str(port), "NODES": "1:2", "PROCESSES": "1"}
    with agents(tmp_path, script, port, **variables, PET_RDZV_CONF="last_call_timeout=8") as started:
        wait_for(tmp_path / "parts", 17, tmp_path)
        assert len(workers(started)) == 2
        for process in [*workers(started[1:]), started[1]]:
            process.send_signal(signal.SIGKILL)
        assert ends(started, tmp_path) == [0, -signal.SIGKILL]
    losses = [[r["loss"] for r in metrics(tmp_path / n) if r["kind"] == "train"] for n in ("parts", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert json.loads((tmp_path / "parts" / "summary.json").read_text())["hardware"]["processes"] == 1
