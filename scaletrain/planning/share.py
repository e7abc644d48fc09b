"""What one of several processes holds under each engine, from a rehearsal.

One process and FSDP2 are rehearsed as they are. DDP and ZeRO do not run on fake tensors: their parts follow from a
rehearsal of one process. P: bytes of the trained weights, W: of all weights of the networks that are trained, N:
processes. DDP keeps P of gradients in its buckets, always. DeepSpeed (fp32 weights, fp32 partitions for the optimiser):

| | weights | gradients | optimiser | beside |
|---|---|---|---|---|
| ZeRO-1 | W + P/N | P + P/N, flat for the update | /N | a bucket to reduce |
| ZeRO-2 | W + P/N | P/N, twice at the update | /N | a bucket to reduce |
| ZeRO-3 | W/N + P/N | P/N | /N | a bucket to reduce, weights that are gathered |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from scaletrain.errors import UserError, did_you_mean
from scaletrain.planning.ledger import ACTIVATIONS, AVERAGE, COMMUNICATION, GRADIENTS, OPTIMISER, WEIGHTS
from scaletrain.planning.rehearse import Peak, Rehearsal

ENGINES = ("ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")
IN_PARTS = ("fsdp2", "hsdp", "zero3")
_BUCKET = 4 * 500_000_000
"""Bytes of DeepSpeed's reduce_bucket_size in fp32."""
_LIVE = 4 * 1_000_000_000
"""Bytes of DeepSpeed's stage3_max_live_parameters in fp32: what it lets stay gathered."""
NODE = 8
"""Processes that hold the parts under HSDP: a node's GPUs."""


@dataclass(frozen=True)
class Way:
    """How a run is launched.

    offload: with fsdp2, hsdp and zero3 weights, gradients and optimiser are in host memory; with zero1 and zero2 the
    optimiser. cuda: on GPUs. Raises UserError for an engine that there is not.
    """

    engine: str
    processes: int
    offload: bool
    cuda: bool

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise UserError(f"--engine: there is no engine `{self.engine}`.{did_you_mean(self.engine, ENGINES)}")
        if self.offload and self.engine == "ddp":
            raise UserError("--offload: ddp keeps everything on the device; take fsdp2, zero1, zero2 or zero3.")
        if self.engine == "hsdp" and (self.processes % NODE or self.processes == NODE):
            raise UserError(f"--engine hsdp: {self.processes} processes are not 2 or more nodes of {NODE}; take fsdp2.")

    @property
    def rehearsed(self) -> int:
        """Processes of the rehearsal."""
        return self.processes if self.engine in ("fsdp2", "hsdp") else 1

    @property
    def variables(self) -> Mapping[str, str]:
        """What accelerate sets for the rehearsal's engine."""
        if self.rehearsed == 1:
            return {}
        found = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        if self.engine == "hsdp":
            found["PARALLELISM_CONFIG_DP_REPLICATE_SIZE"] = str(self.processes // NODE)
            found["PARALLELISM_CONFIG_DP_SHARD_SIZE"] = str(NODE)
        return found


@dataclass(frozen=True)
class Memory:
    """Bytes of one process. kinds: at the peak of a step. step, save, evaluation: peaks on the device.

    host: what is kept in host memory beside it: a copy of what this process writes at a save, and what is offloaded.
    On a CPU all of it is one memory, and in the peaks. largest: see Peak.
    """

    kinds: dict[str, int]
    step: int
    save: int
    evaluation: int
    host: int
    largest: tuple[int, tuple[int, ...], str]

    @property
    def peak(self) -> int:
        """The most at any time."""
        return max(self.step, self.save, self.evaluation)


def share(way: Way, rehearsal: Rehearsal, step: Peak | None, evaluation: Peak | None, copied: bool) -> Memory:
    """Return what a process holds. Without a step or an evaluation, that peak is what is held between steps.

    copied: saves are asynchronous, from a copy in host memory.
    """
    others = rehearsal.held[WEIGHTS] - rehearsal.owned  # frozen networks and buffers
    if (way.processes == 1 and not way.offload) or way.rehearsed > 1:
        held = dict(rehearsal.held)
        kinds = dict(step.kinds) if step else held
        peak = step.total if step else sum(held.values())
    else:
        held, kinds, peak = _followed(way, rehearsal, step)
    host = 0
    if way.offload:
        away = {OPTIMISER: held[OPTIMISER], WEIGHTS: rehearsal.trained // way.processes}
        if way.engine in IN_PARTS:
            away = {**held, GRADIENTS: kinds[GRADIENTS], WEIGHTS: held[WEIGHTS] - others}
        host = sum(away.values())
        for kind, size in away.items():
            held[kind], kinds[kind], peak = max(0, held[kind] - size), kinds[kind] - size, peak - size
    base = sum(held.values())
    judged = base
    if evaluation:
        judged += evaluation.total - sum(rehearsal.held.values())
        judged += kinds[COMMUNICATION] if way.engine == "zero3" and way.processes > 1 else 0
    # What is held in parts is gathered a tensor at a time, and each process writes its share.
    parts = way.processes if way.engine != "ddp" else 1
    save = base + (rehearsal.longest if parts > 1 else 0)
    host += rehearsal.saved // parts if copied else 0
    more = 0 if way.cuda else host
    return Memory(kinds, peak + more, save + more, judged + more, host, step.largest if step else (0, (), ""))


def _followed(way: Way, rehearsal: Rehearsal, step: Peak | None) -> tuple[dict[str, int], dict[str, int], int]:
    """Return, for engines that are not rehearsed, bytes by kind between steps and in a step, and the peak of a step."""
    n, trained, owned = way.processes, rehearsal.trained, rehearsal.owned
    held = dict(rehearsal.held)
    stage = 0 if way.engine == "ddp" else int(way.engine[-1])
    turned = rehearsal.turned
    bucket = _BUCKET if way.cuda else min(_BUCKET, turned)  # on a CPU, only what is written to is there
    beside = (0, bucket, bucket, bucket + min(_LIVE, owned))[stage]
    growing = (0.0, 1.0, 1 / n, 0.0)[stage]
    if stage:
        held[WEIGHTS] += trained // n + (owned // n - owned if stage == 3 else 0)
        held[OPTIMISER] //= n
        held[AVERAGE] //= n if stage == 3 else 1
    held[GRADIENTS] = (trained, 0, 0, trained // n)[stage]
    before = sum(rehearsal.held.values())
    passing = max((int(rest + growing * g) for rest, g in step.moments), default=before) - before if step else 0
    update = (0, turned + turned // n, 2 * turned // n, 0)[stage]
    gradients = max(held[GRADIENTS], int(growing * turned))
    most = max(passing, update)
    kinds = held | {GRADIENTS: gradients, COMMUNICATION: beside}
    kinds[ACTIVATIONS] = most - (gradients - held[GRADIENTS])
    return held, kinds, sum(held.values()) + beside + most
