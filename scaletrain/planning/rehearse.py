"""A step of a stage without values: the run's own engine, players and objective, over networks that hold no weights.

Tensors are torch's fake ones (FakeTensorMode): every operation is done but for the arithmetic, so that what is alive
at a time is exact, whatever the network; collectives go to a process group that answers by itself. DDP and DeepSpeed
do not run on such tensors: what they hold follows from a rehearsal of one process (see `share.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from scaletrain.assemble import check_held
from scaletrain.config import NetworkSpec, Stage
from scaletrain.crew import Progress
from scaletrain.data.dataset import Dataset
from scaletrain.data.kept import pretended
from scaletrain.data.stream import WINDOW, Stream
from scaletrain.engine.choice import build_engine
from scaletrain.engine.precision import autocast
from scaletrain.engine.world import World
from scaletrain.networks import heads
from scaletrain.objectives.base import Data, Networks, Objective
from scaletrain.planning.ledger import AVERAGE, GRADIENTS, OPTIMISER, WEIGHTS, Ledger
from scaletrain.player import Player, Turn
from scaletrain.shelf import Shelf
from scaletrain.snapshot import Snapshot
from scaletrain.trainer import Trainer

Batch = Mapping[str, torch.Tensor]

_LOOKED_AT = 256
"""Examples among which the largest is looked for."""


@dataclass(frozen=True)
class Part:
    """One stage as `runs.foresee` gives it."""

    stage: Stage
    objective: Objective[Any]
    data: Data
    specs: Mapping[str, NetworkSpec]
    shelf: Shelf


@dataclass(frozen=True)
class Peak:
    """The most that one process holds at a time, in bytes.

    total, kinds: all, and by kind at that time. largest: the largest tensor that is no weight, as (bytes, shape, type).
    moments: see Ledger.
    """

    total: int
    kinds: dict[str, int]
    largest: tuple[int, tuple[int, ...], str]
    moments: set[tuple[int, int]]


class Unknown(Exception):
    """An operation that depends on values, so that it cannot be rehearsed; its name."""


class Imagined(World):
    """This process among others that there are not."""

    def __init__(self, size: int):
        self.device, self.rank, self.size, self._host = torch.device("cpu"), 0, size, None


def worst_example(data: Data) -> tuple[Dataset, int]:
    """Return the examples, and the number of one that makes the largest batch: the longest text, say."""
    dataset = data.train
    if isinstance(dataset, Stream):
        source = dataset.sources[0]
        dataset = source.expand(source.rows.sample(WINDOW))
    some = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), _LOOKED_AT)).astype(int)).tolist()
    sizes = [sum(t.numel() for t in batch_of(dataset, i, 1).values()) for i in some]
    return dataset, some[int(np.argmax(sizes))]


def batch_of(dataset: Dataset, example: int, count: int) -> Batch:
    """Return a batch that has one example so many times."""
    with pretended():
        return dataset.batch([example] * count, np.zeros(count, np.uint64))


class Rehearsal:
    """One process of a stage, built as the trainer builds it, with an engine of the environment (see `launched`).

    stage: its recipe may differ from the part's. cuda: for a GPU, or else for a CPU and gloo. held: bytes by kind
    between steps. trained: bytes of the trained weights that this process holds. turned: of the player with most of
    them. owned: bytes of all weights of the networks that it trains. saved: what a checkpoint writes, of all processes.
    longest: the largest trained weight, whole. Raises UserError.
    """

    def __init__(self, part: Part, stage: Stage, world: Imagined, cuda: bool):
        self._objective, self._stage, self._cuda = part.objective, stage, cuda
        self._fake, self._ledger = FakeTensorMode(allow_non_fake_inputs=True), Ledger(gloo=not cuda)
        engine = build_engine(world, stage.recipe.train.precision)
        check_held(part.specs, engine)
        networks = {
            name: _faked(part.shelf.outline(name, spec), self._fake).train(not spec.frozen)
            for name, spec in part.specs.items()
        }
        snapshot = Snapshot(Path(), (stage.name,), part.specs, world, stage.recipe.checkpoint)
        trainer = Trainer.build(stage, part.objective, part.data, networks, {}, engine, Progress(), snapshot, [])
        self.crew, players = trainer.crew, trainer.crew.players.values()
        for player in players:
            _first_update(player)
            for parameter in player.trainable.values():
                if not isinstance(parameter, DTensor):
                    parameter.register_post_accumulate_grad_hook(lambda p: self._ledger.note([p.grad], GRADIENTS))
        for module in networks.values():
            self._ledger.note((*module.parameters(), *module.buffers()), WEIGHTS)
        for player in players:
            self._ledger.note(_state(player), OPTIMISER)
            self._ledger.note(player.ema.shadow.values() if player.ema else (), AVERAGE)
        unseen = sum(map(_unseen, players))
        self.held = dict(self._ledger.totals)
        self.held[OPTIMISER] += unseen
        self.trained = sum(_size(p) for player in players for p in player.trainable.values())
        self.turned = max(sum(_size(p) for p in player.trainable.values()) for player in players)
        self.owned = sum(_size(p) for player in players for m in player.networks.values() for p in m.parameters())
        changing = [(m, spec.adapter is None) for name, m in networks.items() if not (spec := part.specs[name]).frozen]
        self.longest = max(_whole(p) for player in players for p in player.trainable.values())
        self.saved = unseen
        self.saved += sum(_whole(p) for m, whole in changing for p in m.parameters() if whole or p.requires_grad)
        self.saved += sum(_whole(t) for m, _ in changing for t in m.buffers())
        self.saved += sum(_whole(t) for player in players for t in _state(player))
        self.saved += sum(_whole(p) for player in players if player.ema for p in player.trainable.values())

    def step(self, batch: Batch, accumulate: int) -> Peak:
        """Take every turn of a step, on a micro-batch, as the trainer does. Raises Unknown."""
        engine = self.crew.engine
        self._ledger.begin()
        for turn in self._objective.turns:
            player = self.crew.players[turn.player]
            counts = self._objective.counts(turn, batch)
            with self._watched():
                networks = engine.view(player)
                for number in range(min(accumulate, 2), 0, -1):
                    inputs: Batch = {name: self._fake.from_tensor(tensor) for name, tensor in batch.items()}
                    with engine.accumulate(player, last=number == 1):
                        with self._autocast():
                            known = self._surveyed(turn, networks, inputs, counts)
                            terms = self._objective.loss(turn, networks, {**inputs, **known})
                        loss: Any = sum(t.weight / counts[t.per] * t.sum.float() for t in terms.values() if t.weight)
                        engine.backward(player, loss)
                    del terms, loss, inputs
                    self._ledger.settle(GRADIENTS)
                if not _unseen(player):
                    player.optimizer.step()
                player.optimizer.zero_grad(set_to_none=True)
                if player.ema:
                    player.ema.update(1)
                self._objective.after_update(player, engine.plain())
        return self._peak()

    def evaluate(self, batch: Batch) -> Peak:
        """Evaluate a batch with averaged weights. Raises Unknown."""
        networks = self.crew.engine.plain()
        training = {name: module.training for name, module in networks.items()}
        self._ledger.begin()
        with self._watched(), ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for player in self.crew.players.values():
                if player.ema:
                    stack.enter_context(player.ema.swapped())
            for module in networks.values():
                module.eval()
            inputs = {name: self._fake.from_tensor(tensor) for name, tensor in batch.items()}
            with self._autocast():
                self._objective.evaluate(networks, inputs)
        for name, module in networks.items():
            module.train(training[name])
        return self._peak()

    def _surveyed(
        self, turn: Turn, networks: Networks, inputs: Batch, counts: Mapping[str, int]
    ) -> dict[str, torch.Tensor]:
        if not self._objective.surveys:
            return {}
        with torch.no_grad():
            found = self._objective.survey(turn, networks, inputs)
        return {name: term.sum / counts[term.per] for name, term in found.items()}

    def _peak(self) -> Peak:
        ledger, unseen = self._ledger, sum(map(_unseen, self.crew.players.values()))
        kinds = ledger.at_peak | {OPTIMISER: ledger.at_peak[OPTIMISER] + unseen}
        moments = {(rest + unseen, gradients) for rest, gradients in ledger.moments}
        return Peak(ledger.peak + unseen, kinds, ledger.largest, moments)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            with heads.on("cuda" if self._cuda else "cpu"), self._fake, self._ledger.watching():
                yield
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
            raise Unknown(str(error.func)) from error

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        precision = self._stage.recipe.train.precision
        with autocast(self.crew.engine.world.device, precision):
            if self._cuda and precision != "fp32":
                with _AsOnCuda():
                    yield
            else:
                yield


_FP32_ON_CUDA = frozenset((
    "acos", "asin", "binary_cross_entropy_with_logits", "cdist", "cosh", "cosine_similarity", "cross_entropy",
    "cumprod", "cumsum", "dist", "erfinv", "exp", "expm1", "group_norm", "huber_loss", "kl_div", "l1_loss",
    "layer_norm", "log", "log10", "log1p", "log2", "log_softmax", "logsumexp", "mse_loss", "nll_loss", "norm",
    "pdist", "pow", "prod", "reciprocal", "renorm", "rsqrt", "sinh", "smooth_l1_loss", "softmax", "softplus", "sum",
    "tan",
))  # fmt: skip
"""What autocast runs in fp32 on CUDA and in half precision on a CPU (PyTorch's list of autocast's operations)."""


class _AsOnCuda(TorchFunctionMode):
    """Have autocast on fake tensors of the CPU choose types as it does on CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _FP32_ON_CUDA:
            args, kwargs = tree_map_only(torch.Tensor, _single, (args, kwargs))
        return func(*args, **kwargs)


def _single(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _faked(module: nn.Module, fake: FakeTensorMode) -> nn.Module:
    """Give a network fake tensors of the CPU for its parameters and buffers; tied ones stay tied."""
    made: dict[int, Any] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    with fake:
                        empty = torch.empty_like(parameter, device="cpu")
                    made[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
                owner._parameters[name] = made[id(parameter)]
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                if id(buffer) not in made:
                    with fake:
                        made[id(buffer)] = torch.empty_like(buffer, device="cpu")
                owner._buffers[name] = made[id(buffer)]
    return module


def _first_update(player: Player) -> None:
    """Have the optimiser make its state."""
    if _unseen(player):
        return
    for parameter in player.trainable.values():
        parameter.grad = torch.zeros_like(parameter)
    player.optimizer.step()
    player.optimizer.zero_grad(set_to_none=True)


def _unseen(player: Player) -> int:
    """Return the bytes of state of an optimiser of bitsandbytes, whose kernels take no fake tensors; 0 for others."""
    return player.optimizer_bytes if type(player.optimizer).__module__.startswith("bitsandbytes") else 0


def _state(player: Player) -> list[torch.Tensor]:
    states = player.optimizer.state.values()
    return [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]


def _whole(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _size(tensor: torch.Tensor) -> int:
    """Return the bytes that this process holds of a tensor."""
    return _whole(tensor._local_tensor if isinstance(tensor, DTensor) else tensor)


@contextmanager
def launched(variables: Mapping[str, str], processes: int) -> Iterator[None]:
    """Have the environment, and the process group, of one of several processes that accelerate started."""
    before = dict(os.environ)
    for name in [n for n in os.environ if n.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_"))]:
        del os.environ[name]
    os.environ |= {**variables, "WORLD_SIZE": str(processes), "RANK": "0"}
    try:
        if processes > 1:
            from torch.testing._internal.distributed.fake_pg import FakeStore

            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
        yield
    finally:
        if processes > 1 and dist.is_initialized():
            dist.destroy_process_group()
        os.environ.clear()
        os.environ |= before
