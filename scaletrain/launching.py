"""`--launch`: starting the same command on many processes, as accelerate's configuration says."""

from __future__ import annotations

import importlib
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from scaletrain.errors import Interrupted, UserError, did_you_mean

_HERE = Path(__file__).parent
LAUNCH = next((d for d in (_HERE / "launch", _HERE.parent / "launch") if d.is_dir()), _HERE / "launch")
"""In a wheel inside the package, in a checkout beside it."""

_ENGINES = ("NO", "MULTI_GPU", "FSDP", "DEEPSPEED")


def names() -> list[str]:
    """Return the names of accelerate's configurations that come with the package; other files are for clusters."""
    files = sorted(LAUNCH.glob("*.yaml"))
    return [file.stem for file in files if "\ndistributed_type:" in file.read_text(encoding="utf-8")]


def find(launch: str) -> tuple[Path, list[str]]:
    """Return the configuration and the further options of `accelerate launch`, such as `two_nodes --machine_rank 1`.

    The first word is a path, or a name of ours. Raises UserError that suggests a name.
    """
    if Path(launch).is_file():
        return Path(launch), []
    try:
        file, *options = shlex.split(launch)
    except ValueError as error:
        raise UserError(f"--launch {launch!r}: give a file or a name, then options ({error}).") from None
    if Path(file).is_file():
        return Path(file), options
    name = Path(file).stem if file in (f"{Path(file).stem}.yaml", f"launch/{Path(file).stem}.yaml") else file
    if name in names():
        return LAUNCH / f"{name}.yaml", options
    raise UserError(f"--launch: there is no file {file}.{did_you_mean(name, names())}")


def check(file: Path) -> None:
    """Raise UserError for a configuration that accelerate does not read, or that would start something else."""
    import yaml
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    try:
        config: Any = load_config_from_file(str(file))
    except (ValueError, TypeError, AttributeError, KeyError, yaml.YAMLError) as error:
        raise UserError(f"{file} is not a configuration of accelerate: {error}") from None
    if not isinstance(config, ClusterConfig):
        raise UserError(f"{file}: compute_environment must be LOCAL_MACHINE.")
    kind = config.distributed_type.value
    if kind == "MULTI_CPU" or (kind == "NO" and config.num_processes > 1):
        raise UserError(
            f"{file}: with `distributed_type: {kind}` accelerate starts one process, whatever num_processes says. "
            'Write `distributed_type: MULTI_GPU`, and for the CPU `gpu_ids: "-1,-1"`, as in launch/cpu_2.yaml.'
        )
    if kind not in _ENGINES:
        raise UserError(f"{file}: there is no engine for distributed_type {kind}; take one of {', '.join(_ENGINES)}.")


def start(launch: str, words: Sequence[str], verbose: bool = False) -> int:
    """Run `scaletrain WORDS` under `accelerate launch`, and return the exit status that its processes agree on.

    verbose: let the launcher's own error through. Raises UserError for what cannot be started, and Interrupted when a
    signal stopped the processes. A single process takes the place of this one.
    """
    if "WORLD_SIZE" in os.environ:
        raise UserError("--launch: a launcher has started this process already (WORLD_SIZE is set); leave it out.")
    file, options = find(launch)
    check(file)
    from accelerate.commands import launch as accelerate
    from accelerate.utils import prepare_simple_launcher_cmd_env

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")  # seconds to save in after a signal; 30 by default
    parser = accelerate.launch_command_parser()
    parser.error = _refuse
    command = ["--config_file", str(file), *options, "-m", "scaletrain", *words]
    try:
        args, *_ = accelerate._validate_launch_command(parser.parse_args(command))
        if not (args.use_deepspeed or args.use_fsdp or args.multi_gpu):
            program, environment = prepare_simple_launcher_cmd_env(args)
            os.execvpe(program[0], program, environment)
        return _start_many(accelerate.launch_command, parser.parse_args(command), verbose)
    except (ImportError, ConnectionError, ValueError) as error:
        raise UserError(f"--launch {file}: {error}") from None


def _refuse(message: str) -> NoReturn:
    raise UserError(f"--launch: {message}; `accelerate launch --help` tells the options.")


def _start_many(launcher: Callable[[Any], None], args: Any, verbose: bool) -> int:
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if not verbose:  # what it tells is told below, or by the ranks
        importlib.import_module("torch.distributed.launcher.api")  # makes the loggers
        for name in logging.root.manager.loggerDict:
            if name.startswith("torch.distributed.elastic"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        launcher(args)
    except ChildFailedError as error:
        if verbose:
            raise
        ended = {rank: failure.exitcode for rank, failure in error.failures.items()}
        status = next((status for status in (2, 3) if status in ended.values()), 1)
        if status == 1:
            print(f"error: {', '.join(_told(*end) for end in ended.items())}.", file=sys.stderr)
        return status
    except SignalException as error:
        name = signal.Signals(error.sigval).name
        raise Interrupted(f"{name} stopped the processes; run the same command again.") from None
    return 0


def _told(rank: int, code: int) -> str:
    """Return how a rank ended."""
    return f"rank {rank} was ended by {signal.Signals(-code).name}" if code < 0 else f"rank {rank} ended with {code}"


def without_launch(words: Sequence[str]) -> list[str]:
    """Return a command line without its --launch and what belongs to it, which is what each process is started with."""
    kept = list(words)
    at = next(i for i, word in enumerate(kept) if word.partition("=")[0] == "--launch")
    del kept[at : at + (1 if "=" in kept[at] else 2)]
    return kept
