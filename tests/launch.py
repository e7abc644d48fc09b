"""Starting the command line on one or several gloo processes, as launchers do, and killing it.

Processes are forked from a server that has imported the heavy libraries once, so that a test pays for training alone.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload"])


@dataclass(frozen=True)
class Run:
    """The processes of a run, by rank, and the file that they print to."""

    ranks: list[ForkServerProcess]
    output: Path

    def finish(self, timeout: float = 400) -> tuple[list[int | None], str]:
        """Wait for all ranks. Returns exit statuses by rank, and everything that was printed."""
        end = time.monotonic() + timeout
        for rank in self.ranks:
            rank.join(max(0.0, end - time.monotonic()))
        late = [rank for rank in self.ranks if rank.is_alive()]
        for rank in late:
            rank.kill()
            rank.join()
        text = self.output.read_text()
        assert not late, f"{len(late)} ranks did not end in {timeout} seconds\n{text}"
        return [rank.exitcode for rank in self.ranks], text

    def stop_when(self, ready: Callable[[], bool], number: int = signal.SIGKILL) -> tuple[list[int | None], str]:
        """Send a signal to every rank as soon as `ready()`. Fails when the run ends before that."""
        self.wait(ready)
        for rank in self.ranks:
            assert rank.pid is not None
            os.kill(rank.pid, number)
        return self.finish()

    def wait(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready()`. Fails when the run ends before that."""
        end = time.monotonic() + 300
        while not ready():
            if any(rank.exitcode is not None for rank in self.ranks) or time.monotonic() > end:
                for rank in self.ranks:
                    rank.kill()
                raise AssertionError(f"ended before the signal, or too late\n{self.finish()[1]}")
            time.sleep(0.002)


def start(
    arguments: Sequence[object],
    processes: int = 1,
    cwd: Path | None = None,
    own_group: bool = False,
    variables: Mapping[str, str] | None = None,
) -> Run:
    """Start `scaletrain ARGUMENTS` on so many ranks, with the variables that torchrun would set.

    own_group: each rank leads a process group of its own, with its number. variables: more of the environment.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    output = Path(tempfile.mkstemp(suffix=".log")[1])
    ranks = []
    for rank in range(processes):
        environment = {"ACCELERATE_USE_CPU": "true", **(variables or {})}
        if processes > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        cache = {k: v for k, v in os.environ.items() if k.startswith("SCALETRAIN_")}
        words = [str(a) for a in arguments]
        ranks.append(_context.Process(target=_main, args=(words, environment | cache, output, cwd, own_group)))
        ranks[-1].start()
    return Run(ranks, output)


def _main(arguments: list[str], environment: dict[str, str], output: Path, cwd: Path | None, own_group: bool) -> None:
    if own_group:
        os.setpgid(0, 0)
    os.environ.update(environment)
    if cwd:
        os.chdir(cwd)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    sys.argv = ["scaletrain", *arguments]
    from scaletrain.cli import main

    main()


def run(
    arguments: Sequence[object],
    processes: int = 1,
    cwd: Path | None = None,
    expect: int = 0,
    variables: Mapping[str, str] | None = None,
) -> str:
    """Run to the end and check the exit status of every rank. Returns the output."""
    codes, text = start(arguments, processes, cwd, variables=variables).finish()
    assert codes == [expect] * processes, f"exit statuses {codes}\n{text}"
    return text


def metrics(folder: Path) -> list[dict[str, float]]:
    """Return the whole records in metrics.jsonl."""
    path = folder / "metrics.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:  # the last line of a run that was killed
            break
    return records


def steps(folder: Path) -> list[float]:
    """Return the steps of the training records in metrics.jsonl."""
    return [record["step"] for record in metrics(folder) if record["kind"] == "train"]
