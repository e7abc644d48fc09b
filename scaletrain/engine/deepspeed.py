"""ZeRO by DeepSpeed: each process keeps a part of the optimiser's state (stage 1), of gradients (2), of weights (3).

DeepSpeed wraps, reduces and partitions; scaling, clipping, skipping and the position are the trainer's, as everywhere.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from inspect import getclosurevars
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from scaletrain.checkpoint.tensors import Stored
from scaletrain.engine.base import PIECE, Engine, Part
from scaletrain.engine.statistics import Statistics
from scaletrain.engine.world import World
from scaletrain.engine.zero_spec import ZeroSpec
from scaletrain.errors import UserError
from scaletrain.parameters import replace_parameters
from scaletrain.player import Outcome, Player

_ELEMENTWISE = frozenset(("sgd", "rmsprop", "adam", "adamw", "lion"))
_BATCH = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
"""Batches are the trainer's: DeepSpeed only divides by these."""


class Zero(Engine):
    """Rajbhandari et al., 2020, "ZeRO". One DeepSpeed engine for each player, over all networks that it trains.

    Weights and gradients are fp32; under bf16 and fp16 a forward pass runs in autocast, as it does without DeepSpeed.
    """

    sharded = True

    def __init__(self, world: World, precision: str, spec: ZeroSpec):
        super().__init__(world, precision)
        self.name, self.lockstep = f"zero{spec.stage}", spec.stage == 3
        self.reads = spec.stage == 3
        self.differentiates_forward = spec.stage < 3  # of whose linear layers DeepSpeed has its own
        self._spec = spec
        self._held: dict[str, _Held] = {}
        self._frozen: list[Any] = []  # DeepSpeed's engines of networks that are not trained, in parts

    def wrap(
        self,
        networks: Mapping[str, nn.Module],
        parts: Collection[str],
        weights: Mapping[str, Mapping[str, Stored]],
    ) -> None:
        """Under ZeRO-3, hold in parts what comes unread, one weight after the other, and large frozen networks."""
        if not dist.is_initialized():  # one process, started by no launcher, which offloads
            backend = "gloo" if self.world.device.type == "cpu" else "nccl"
            dist.init_process_group(backend, init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
        if self._spec.stage < 3:
            return
        deepspeed = import_deepspeed(self.world.device)
        config = {**_BATCH, **self._spec.config}
        if weights:
            into_parts = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=config)
            for name, entries in weights.items():
                _read(networks[name], entries, self.world, into_parts)
        for name in parts:
            if not any(p.requires_grad for p in networks[name].parameters()):
                engine, *_ = deepspeed.initialize(model=networks[name], config=config)
                self._frozen.append(engine)

    def prepare(self, players: Iterable[Player], networks: Mapping[str, nn.Module]) -> None:
        """Give each player's networks and optimiser to a DeepSpeed engine. Raises UserError."""
        self._players = list(players)
        for player in self._players:
            for name, parameter in player.trainable.items():
                if not len(self.shape(parameter)):
                    raise UserError(
                        f"networks.{name.replace('/', '.', 1)} is a scalar, which ZeRO cannot hold: use DDP."
                    )
        self._networks = dict(networks)
        self._held = {player.name: _Held(player, self._spec, self.world) for player in self._players}
        self._statistics = Statistics(networks, self.world)

    def view(self, player: Player) -> Mapping[str, nn.Module]:
        """Return callers of the engines' modules: ZeRO-3 follows the order of a forward pass from its root."""
        self._let_go()
        seen = dict(self._networks)
        for other in self._players:
            for parameter in other.trainable.values() if len(self._players) > 1 else ():
                parameter.requires_grad_(other is player)
            held = self._held[other.name]
            seen |= {name: _Caller(held, name, trained=other is player) for name in other.networks}
        return seen

    def plain(self) -> Mapping[str, nn.Module]:
        """Return the modules, whose weights are gathered as they are called under ZeRO-3."""
        self._let_go()
        return self._networks

    def _let_go(self) -> None:
        for held in self._held.values():
            held.let_go()
        for engine in self._frozen:
            engine.optimizer.partition_all_parameters()

    @contextmanager
    def changing(self, player: Player) -> Iterator[None]:
        """Gather weights that are held in parts, and have the parts and masters be what was made of them."""
        parameters: list[Any] = list(player.trainable.values())
        if self._spec.stage == 3:
            deepspeed = import_deepspeed(self.world.device)
            with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
                yield
            for parameter in parameters:
                deepspeed.utils.safe_set_local_fp32_param(parameter, parameter.ds_tensor)
            return
        yield
        for linked in (getattr(parameter, "_hp_mapping", None) for parameter in parameters):
            if linked is not None:
                linked.update_hp()

    @contextmanager
    def accumulate(self, player: Player, last: bool) -> Iterator[None]:
        """Have gradients reduced for good at the last micro-batch."""
        self._held[player.name].engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, player: Player, loss: torch.Tensor) -> None:
        """Scale and differentiate."""
        held = self._held[player.name]
        if player.scaler:
            held.optimizer.override_loss_scale(player.scaler.scale)
        held.engine.backward(loss)

    def update(self, player: Player, admit: Callable[[float], bool]) -> Outcome:
        """Step once, or skip on every rank."""
        scale = player.scaler.scale if player.scaler else 1.0
        stepped, finite, norm = self._held[player.name].step(scale, admit)
        if player.scaler:
            player.scaler.advance(overflow=not finite)
        return Outcome(stepped, finite, norm, scale)

    def synchronise_statistics(self, stepped: bool) -> None:
        """Average BatchNorm's running statistics over the processes, or take them back."""
        self._statistics.settle(stepped)

    def refuses(self, optimizer: str) -> str | None:
        """Refuse those that look at whole weights: ZeRO steps pieces of one flat vector."""
        if optimizer in _ELEMENTWISE:
            return None
        return (
            f"{optimizer} cannot step the flat pieces that ZeRO holds; take {', '.join(sorted(_ELEMENTWISE))}, or "
            "launch with DDP."
        )

    def shape(self, parameter: torch.Tensor) -> torch.Size:
        """Return the shape of a parameter when it is whole."""
        return parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this process's part: under ZeRO-3 a flat piece, padded at the end of the last process."""
        return tensor.ds_tensor if hasattr(tensor, "ds_tensor") else tensor.detach()

    def gathered(self, tensor: torch.Tensor, like: Any) -> Part:
        """Gather the flat pieces of all processes, where a tensor is held as a partitioned weight is."""
        if not hasattr(like, "ds_tensor"):
            return Part.whole(tensor)
        begin, end = tensor.numel() * self.world.rank, like.ds_shape.numel()
        own = tensor.detach()[: max(0, end - begin)]
        return summed(like.ds_shape, tensor.dtype, lambda: (own, begin), self.world.device)

    def part(self, tensor: torch.Tensor, like: Any) -> torch.Tensor:
        """Cut this process's flat piece."""
        if not hasattr(like, "ds_tensor") or tensor.shape != like.ds_shape:
            return tensor
        size, flat = like.ds_tensor.numel(), tensor.flatten()
        piece = flat[size * self.world.rank : size * (self.world.rank + 1)]
        return torch.cat([piece, piece.new_zeros(size - piece.numel())])

    def state(self, player: Player) -> tuple[dict[str, Part], dict[str, Any]]:
        """Read the optimiser's state by parameter name."""
        parts, values = self._held[player.name].state()
        if player.ema:
            for name, value in player.ema.shadow.items():
                parts[f"ema/{name}"] = self.gathered(value, player.trainable.get(name, value))
        return parts, values

    def load(self, player: Player, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Write the optimiser's state into the flat partitions."""
        self._held[player.name].load(tensors, values)
        if player.ema:
            player.ema.load_state_dict(
                {k: self.part(tensors[f"ema/{k}"], player.trainable.get(k, v)) for k, v in player.ema.shadow.items()}
            )

    def close(self) -> None:
        """Let DeepSpeed forget the networks: it keeps some of them by names of its own."""
        for held in self._held.values():
            held.close()
        for engine in self._frozen:
            _forget(engine)
        self._held, self._frozen = {}, []


class _Networks(nn.Module):
    """The networks of a player as one module, since a DeepSpeed engine holds one."""

    def __init__(self, networks: Mapping[str, nn.Module]):
        super().__init__()
        self.names = list(networks)
        self.networks = nn.ModuleList(networks.values())

    def forward(self, name: str, autocast: tuple[str, torch.dtype, bool], *args: Any, **kwargs: Any) -> Any:
        """Call one of them, in the autocast of the caller: DeepSpeed ends one that it did not begin."""
        device, dtype, enabled = autocast
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            return self.networks[self.names.index(name)](*args, **kwargs)


class _Caller(nn.Module):
    """Stands for a network in a turn. trained: gradients of its weights are wanted."""

    def __init__(self, held: _Held, name: str, trained: bool):
        super().__init__()
        self._call = held.engine if trained else held.module
        self._name, self._device = name, held.world.device.type

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network through its engine."""
        kind = self._device
        autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        return self._call(self._name, autocast, *args, **kwargs)


class _Held:
    """One player in DeepSpeed's hands: an engine, its ZeRO optimiser, and the player's own optimiser inside that."""

    def __init__(self, player: Player, spec: ZeroSpec, world: World):
        deepspeed = import_deepspeed(world.device)
        self.player, self.world, self.module = player, world, _Networks(player.networks)
        config = {
            **_BATCH,
            "gradient_clipping": player.clip or 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            **spec.config,
        }
        if spec.stage == 3:  # small weights that stay gathered would not follow an average that is swapped in
            config["zero_optimization"] = {"stage3_param_persistence_threshold": 0, **config["zero_optimization"]}
        self.stage = spec.stage
        self.engine, *_ = deepspeed.initialize(model=self.module, optimizer=player.optimizer, config=config)
        self.optimizer = self.engine.optimizer
        self._norm = self._hook_norm()
        self._admit: Callable[[float], bool] = lambda norm: True
        self._scale, self._found = 1.0, (False, False, math.inf)

    def _hook_norm(self) -> Callable[[], Any]:
        """Have ZeRO ask us whether to step, where it knows the norm; an infinite norm makes it skip."""
        zero = self.optimizer
        if self.stage == 3:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            groups = zero._get_norm_groups
            zero._get_norm_groups = lambda: self._decided(groups(), combine_grad_norm_groups)
            return groups
        norm = zero.scaled_global_norm
        zero.scaled_global_norm = lambda norm_type=2: self._decided([norm(norm_type)], lambda found: found[0])[0]
        return norm

    def _decided(self, norms: list[torch.Tensor], combine: Callable[[Any], torch.Tensor]) -> list[torch.Tensor]:
        """Decide on the update by the norm. Returns the norms, or infinite ones."""
        value = float(combine(norms)) / self._scale
        finite = math.isfinite(value) and value >= 0  # DeepSpeed's sign of a norm that is not finite is -1
        stepped = finite and self._admit(value)
        self._found = (stepped, finite, value if finite else math.inf)
        if stepped:
            self.player.set_lr()
            return norms
        return [torch.full_like(norm, math.inf) for norm in norms]

    def step(self, scale: float, admit: Callable[[float], bool]) -> tuple[bool, bool, float]:
        """Unscale, clip and step, or skip. Returns whether it stepped, whether gradients are finite, and their norm."""
        self._scale, self._admit = scale, admit
        self._found = (False, False, math.inf)
        self.engine.step()
        return self._found

    def let_go(self) -> None:
        """Free weights that a forward pass without a backward pass has gathered, which would grow old."""
        if self.stage == 3:
            self.optimizer.empty_partition_cache()

    # --- state by parameter name --------------------------------------------------------------------------------------

    def _flat(self) -> list[torch.Tensor]:
        """Return the flat fp32 partitions that the player's optimiser steps."""
        zero = self.optimizer
        return list(zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups)

    def _place(self, parameter: Any) -> tuple[torch.Tensor, slice, slice] | None:
        """Return the flat partition that a part of a parameter is in here, where in it, and which part, if any."""
        zero = self.optimizer
        if self.stage == 3:
            group, start, size = zero.grad_position[zero.get_param_id(parameter)]
            begin = size * self.world.rank
            number = min(size, parameter.ds_numel - begin)
            flat = zero.fp32_partitioned_groups_flat[group]
            return (flat, slice(start, start + number), slice(begin, begin + number)) if number > 0 else None
        linked = parameter._hp_mapping
        if linked is None:
            return None
        here, there = linked.hp_fragment_address, linked.lp_fragment_address
        flat = zero.single_partition_of_fp32_groups[linked.param_group_index]
        inside = slice(here.start, here.start + here.numel)
        return flat, inside, slice(there.start, there.start + there.numel)

    def _stretch(self, parameter: torch.Tensor, key: str) -> tuple[torch.Tensor, int]:
        """Return what is held here of a parameter's state, flat, and where in the parameter that begins."""
        place = self._place(parameter)
        if place is None:
            return torch.empty(0), 0
        flat, inside, part = place
        return self.player.optimizer.state[flat][key][inside], part.start

    def state(self) -> tuple[dict[str, Part], dict[str, Any]]:
        """Return tensors by `optimizer/KEY/NAME`, and numbers by name and key."""
        states = self.player.optimizer.state
        own: dict[str, Any] = next((states[flat] for flat in self._flat() if flat in states), {})
        parts: dict[str, Part] = {}
        values: dict[str, Any] = {}
        for name, parameter in self.player.trainable.items():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            for key, value in own.items():
                if not isinstance(value, torch.Tensor):
                    values.setdefault(name, {})[key] = value
                elif value.dim():
                    held = partial(self._stretch, parameter, key)
                    parts[f"optimizer/{key}/{name}"] = summed(shape, value.dtype, held, self.world.device)
                else:  # the number of steps, which all have alike
                    parts[f"optimizer/{key}/{name}"] = Part.whole(value.clone())
        return parts, values

    def load(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Make the state of every flat partition, zero where it is padded, and fill it."""
        states, trainable = self.player.optimizer.state, self.player.trainable
        numbers: Mapping[str, Any] = next(iter(values.values()), {})
        first: dict[str, str] = {}  # an entry of each key
        for entry in tensors:
            kind, _, rest = entry.partition("/")
            if kind == "optimizer":
                first.setdefault(rest.partition("/")[0], entry)
        on_device = any(g.get("fused") or g.get("capturable") for g in self.player.optimizer.param_groups)
        for flat in self._flat() if first or numbers else ():
            states[flat] = dict(numbers)
            for key, entry in first.items():
                like = tensors[entry]
                if like.dim():
                    states[flat][key] = torch.zeros_like(flat, dtype=like.dtype)
                else:
                    states[flat][key] = like.to(flat.device) if on_device else like.clone()
        for name, parameter in trainable.items():
            place = self._place(parameter)
            for key in first if place else ():
                whole = tensors.get(f"optimizer/{key}/{name}")  # none of what has never had a gradient
                if place and whole is not None and whole.dim():
                    flat, inside, part = place
                    states[flat][key][inside] = whole.flatten()[part].to(flat.device)

    def close(self) -> None:
        """Take DeepSpeed's hooks off."""
        _forget(self.engine)


def summed(
    shape: torch.Size, dtype: torch.dtype, own: Callable[[], tuple[torch.Tensor, int]], device: torch.device
) -> Part:
    """Gather a tensor of which each process holds a flat stretch, by a sum over processes.

    own: what this one holds, and where it begins.
    """

    def pieces() -> Iterator[torch.Tensor]:
        held, start = own()
        for begin in range(0, shape.numel(), PIECE):
            piece = torch.zeros(min(PIECE, shape.numel() - begin), dtype=dtype, device=device)
            first, last = max(begin, start), min(begin + piece.numel(), start + held.numel())
            if first < last:
                piece[first - begin : last - begin] = held[first - start : last - start].to(device)
            dist.all_reduce(piece)
            yield piece

    return Part(shape, dtype, pieces)


def _forget(engine: Any) -> None:
    """Take an engine's hooks off, and its module out of DeepSpeed's global list of those that are being called."""
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module is not engine.module]
    engine.destroy()
    cached = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    getclosurevars(cached).nonlocals["func"].cache_clear()  # it holds every module that it was asked about


def _read(network: nn.Module, weights: Mapping[str, Stored], world: World, into_parts: Any) -> None:
    """Read weights from their files on rank 0, and leave each process its part before the next is read."""
    names = {id(parameter): key for key, parameter in network.named_parameters()}

    def in_parts(old: nn.Parameter) -> nn.Parameter:
        if not old.is_meta:
            return old
        entry = weights[names[id(old)]]
        whole = entry.whole() if world.main else torch.empty(entry.shape, dtype=entry.dtype)
        new = nn.Parameter(whole.to(world.device, old.dtype), old.requires_grad)
        into_parts._convert_to_zero_parameters([new])
        return new

    replace_parameters(network, in_parts)


def import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for a device, without what it prints."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed

    if device.type == "cpu":  # gloo will do: the other way is compiled at the first use, on each machine
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed
