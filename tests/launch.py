"""Starting the command line as users do, on one or several gloo processes, and killing it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "TOKENIZERS_PARALLELISM": "false"}


def start(arguments: Sequence[object], processes: int = 1, cwd: Path | None = None) -> list[subprocess.Popen[str]]:
    """Start `python -m scaletrain ARGUMENTS` on so many ranks, as torchrun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        environment = {**os.environ, **ENVIRONMENT}
        if processes > 1:
            environment |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "scaletrain", *map(str, arguments)],
                env=environment,
                cwd=cwd,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    return started


def finish(started: list[subprocess.Popen[str]], timeout: float = 300) -> tuple[list[int], str]:
    """Wait for all ranks. Returns exit statuses by rank, and everything that was printed."""
    texts = [p.communicate(timeout=timeout)[0] for p in started]
    return [p.returncode for p in started], "\n".join(texts)


def run(arguments: Sequence[object], processes: int = 1, cwd: Path | None = None, expect: int = 0) -> str:
    """Run to the end and check the exit status of every rank. Returns the output."""
    codes, text = finish(start(arguments, processes, cwd))
    assert codes == [expect] * processes, f"exit statuses {codes}\n{text}"
    return text


def stop_when(
    started: list[subprocess.Popen[str]], ready: Callable[[], bool], number: int = signal.SIGKILL, timeout: float = 240
) -> tuple[list[int], str]:
    """Send a signal to every rank as soon as `ready()`. Fails when the run ends before that."""
    end = time.monotonic() + timeout
    while not ready():
        codes = [p.poll() for p in started]
        if any(code is not None for code in codes) or time.monotonic() > end:
            for p in started:
                p.kill()
            raise AssertionError(f"ended before the signal, or too late: {codes}\n{finish(started)[1]}")
        time.sleep(0.005)
    for p in started:
        p.send_signal(number)
    return finish(started)


def steps_logged(folder: Path) -> list[int]:
    """Return the steps of the training records in metrics.jsonl."""
    return [r["step"] for r in metrics(folder) if r["kind"] == "train"]


def metrics(folder: Path) -> list[dict[str, float]]:
    """Return the whole records in metrics.jsonl."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:  # the last line of a run that was killed
            break
    return records
