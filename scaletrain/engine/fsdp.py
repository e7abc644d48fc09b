"""FSDP2: each process holds a part of every parameter of what is trained, and gathers a block when it computes it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from traceback import walk_tb
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from scaletrain.checkpoint.tensors import Stored
from scaletrain.engine.base import PIECE, Part
from scaletrain.engine.blocks import alone, blocks
from scaletrain.engine.native import Native
from scaletrain.engine.precision import DTYPES
from scaletrain.engine.world import World
from scaletrain.errors import UserError, did_you_mean
from scaletrain.player import Player


@dataclass(frozen=True)
class Sharding:
    """What accelerate was launched with, by its variables.

    reshard: let a block's weights go after its forward pass and gather them again for the backward pass (as ZeRO-3
    does), or keep them until then. offload: parts, their gradients and their optimiser stay in host memory. replicas:
    groups of processes that each hold all parts (HSDP). classes: of modules that are gathered at a time, if not those
    that are found.
    """

    reshard: bool = True
    offload: bool = False
    replicas: int = 1
    classes: tuple[str, ...] = ()

    @classmethod
    def read(cls, variables: Mapping[str, str]) -> Sharding:
        """Read it from the environment. Raises UserError for what would be ignored, or does not fit the processes."""
        for name, (harmless, advice) in _REFUSED.items():
            value = variables.get(f"FSDP_{name.upper()}")
            if value is not None and value.lower() not in harmless:
                raise UserError(f"fsdp_config.fsdp_{name}: {value} is not for FSDP2 here: {advice}.")
        classes = [c.strip() for c in variables.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(",") if c.strip()]
        reshard, offload = _flag(variables, "reshard_after_forward", True), _flag(variables, "offload_params", False)
        return cls(reshard, offload, _replicas(variables), tuple(classes))


_BLOCKS = "blocks are found by themselves, or named by fsdp_transformer_layer_cls_to_wrap; leave it out"
_REFUSED = {
    "sharding_strategy": (("full_shard", "1"), "leave it out, and set fsdp_reshard_after_forward to true or false"),
    "auto_wrap_policy": (("transformer_based_wrap",), _BLOCKS),
    "backward_prefetch": (("backward_pre", "1", "none"), "it always gathers the next block ahead; leave it out"),
    "forward_prefetch": (("false",), "it always gathers the next block ahead; leave it out"),
    "activation_checkpointing": (("false",), "say train.recompute=full, or selective, in the recipe"),
    "activation_checkpointing_offload": (("false",), "say train.offload_activations=true in the recipe"),
    "ignored_modules": ((), "leave it out"),
}
"""Options of accelerate's for FSDP: values that change nothing, and what to write in place of others."""


def _flag(variables: Mapping[str, str], name: str, default: bool) -> bool:
    value = variables.get(f"FSDP_{name.upper()}", str(default)).lower()
    if value not in ("true", "false"):
        raise UserError(f"fsdp_config.fsdp_{name}: {value} is not for FSDP2: write true or false.")
    return value == "true"


def _replicas(variables: Mapping[str, str]) -> int:
    """Return how many groups hold all parts. Raises UserError when the mesh is not that of the processes."""
    sizes = {
        name: int(variables.get(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", "1"))
        for name in ("dp_replicate", "dp_shard", "tp", "cp", "sp")
    }
    for name in ("tp", "cp", "sp"):
        if sizes[name] != 1:
            raise UserError(f"parallelism_config_{name}_size is {sizes[name]}: only the data are parallel here; set 1.")
    replicas, parts, world = sizes["dp_replicate"], sizes["dp_shard"], int(variables.get("WORLD_SIZE", "1"))
    if replicas * parts == 1:  # not given
        return 1
    if parts == 1:
        raise UserError("parallelism_config_dp_shard_size is 1: for replicas alone take distributed_type MULTI_GPU.")
    if replicas * parts != world:
        raise UserError(
            f"parallelism_config_dp_replicate_size x dp_shard_size is {replicas} x {parts} = {replicas * parts}, but "
            f"there are {world} process(es): their product must be num_processes."
        )
    return replicas


class FullyShard(Native):
    """Parameters, gradients and optimiser state in parts (Zhao et al., 2023); with replicas, in parts in each of them.

    Masters are fp32; under bf16 and fp16 a block is gathered in that type, and gradients are reduced in fp32. Networks
    that are not trained stay whole, but for large ones.
    """

    name = "fsdp2"
    lockstep = True
    sharded = True
    reads = True

    def __init__(self, world: World, precision: str, sharding: Sharding):
        super().__init__(world, precision)
        self._sharding = sharding
        shape: tuple[int, ...] = (world.size,)
        names: tuple[str, ...] = ("shard",)
        if sharding.replicas > 1:
            shape, names = (sharding.replicas, world.size // sharding.replicas), ("replicate", "shard")
        self._mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
        self._sharded: dict[str, nn.Module] = {}

    def refuses(self, optimizer: str) -> str | None:
        """Refuse bitsandbytes' optimisers, whose kernels take no DTensor, and Adafactor, which torch steps whole."""
        whole = "adamw" if optimizer == "adafactor" else optimizer.removeprefix("paged_").removesuffix("8bit")
        if whole == optimizer:
            return None
        return f"{optimizer} cannot step weights that are held in parts, as FSDP2 does: take {whole}, or launch DDP."

    def wrap(
        self,
        networks: Mapping[str, nn.Module],
        parts: Collection[str],
        weights: Mapping[str, Mapping[str, Stored]],
    ) -> None:
        """Shard networks in place, before optimisers and averages are made of their parameters. Raises UserError."""
        self._check_classes([networks[name] for name in parts])
        for name in parts:
            _check(name, networks[name])
            self._shard(networks[name])
            if name in weights:
                self._read(networks[name], weights[name])
            self._sharded[name] = networks[name]

    def prepare(self, players: Iterable[Player], networks: Mapping[str, nn.Module]) -> None:
        """Take over the networks, and have FSDP2 settle what it does with the gradients of each.

        It would at the first call, by what requires gradients then: nothing does where another player's turn calls a
        network first, and gradients would be reduced in half precision.
        """
        super().prepare(players, networks)
        for network in self._sharded.values():
            assert isinstance(network, FSDPModule)
            network._get_fsdp_state()._lazy_init()

    def _shard(self, network: nn.Module) -> None:
        half = None if self.precision == "fp32" else DTYPES[self.precision]
        offload = CPUOffloadPolicy(pin_memory=self.world.device.type == "cuda")
        trained = any(p.requires_grad for p in network.parameters())
        options: dict[str, Any] = {
            "mesh": self._mesh,
            "mp_policy": MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False),
            "offload_policy": offload if self._sharding.offload else OffloadPolicy(),
        }
        first, last = _ends(network)
        found = blocks(network, self._sharding.classes) or blocks(network)
        for unit in [*found.values(), *first]:
            fully_shard(unit, reshard_after_forward=self._sharding.reshard or not trained, **options)
        for unit in last:  # needed at once for the backward pass
            fully_shard(unit, reshard_after_forward=not trained, **options)
        fully_shard(network, reshard_after_forward=not trained, **options)
        if hasattr(network, "get_base_model"):  # peft generates by its base's forward, and the root gathers nothing
            register_fsdp_forward_method(network, "generate")

    def _read(self, network: nn.Module, weights: Mapping[str, Stored]) -> None:
        """Read this process's parts of weights from their files."""
        own: dict[int, nn.Parameter] = {}
        for key, parameter in network.named_parameters():
            if parameter.is_meta:
                own[id(parameter)] = nn.Parameter(self._part_of(weights[key], parameter), parameter.requires_grad)
        names = {key: own[id(p)] for key, p in network.named_parameters(remove_duplicate=False) if id(p) in own}
        network.load_state_dict(names, strict=False, assign=True)
        network._apply(lambda tensor: tensor)  # has FSDP2 take the new parameters for its own

    def _part_of(self, entry: Stored, parameter: Any) -> DTensor:
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        row = math.prod(parameter.shape[1:])
        first = offset[0] * row if math.prod(shape) else 0
        local = entry.read(first, first + math.prod(shape)).to(parameter.dtype).view(shape)
        return DTensor.from_local(
            local if self._sharding.offload else local.to(self.world.device),
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    def _check_classes(self, networks: Sequence[nn.Module]) -> None:
        known = {type(module).__name__ for network in networks for module in network.modules()}
        for name in self._sharding.classes:
            if name not in known:
                raise UserError(
                    f"fsdp_config.fsdp_transformer_layer_cls_to_wrap: no module is a `{name}`."
                    f"{did_you_mean(name, known)} It may be left out: blocks are found by themselves."
                )

    def _let_go(self) -> None:
        """Free what a forward pass without a backward pass has gathered, which would not follow the parts from then."""
        for network in self._sharded.values():
            for module in network.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def view(self, player: Player) -> Mapping[str, nn.Module]:
        """Set requires_grad and return the networks."""
        self._let_go()
        return super().view(player)

    def plain(self) -> Mapping[str, nn.Module]:
        """Return the modules, as the parts of their weights are now."""
        self._let_go()
        return super().plain()

    def wrapped(self, module: nn.Module) -> nn.Module:
        """Return the network itself: it is sharded in place."""
        return module

    @contextmanager
    def accumulate(self, player: Player, last: bool) -> Iterator[None]:
        """Reduce gradients to this process's parts at each micro-batch; over replicas, at the last one only."""
        for module in player.networks.values():
            assert isinstance(module, FSDPModule)
            module.set_requires_all_reduce(last)
        with self._told():
            yield

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Have torch's error say which module was used without being called."""
        try:
            yield
        except RuntimeError as error:
            if "mixed torch.Tensor and DTensor" not in str(error):
                raise
            names = {m: f"{n}.{k}" for n, network in self._sharded.items() for k, m in network.named_modules()}
            frames = [frame.f_locals.get("self") for frame, _ in walk_tb(error.__traceback__)]
            found = [names[m] for m in frames if isinstance(m, nn.Module) and m in names] or [*self._sharded]
            raise UserError(
                f"networks.{found[-1].rstrip('.')} uses weights of a module that it does not call, and FSDP2 gathers "
                "them where a module is called: launch with MULTI_GPU."
            ) from error

    def norm(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the norm over the parts of all processes. Replicas have the same, or the largest of theirs."""
        norms = torch._foreach_norm(list(gradients)) if gradients else [torch.zeros(())]
        squares = torch.stack(list(norms)).square().sum().to(self.world.device)
        dist.all_reduce(squares, group=self._mesh.get_group("shard"))
        if self._sharding.replicas > 1:
            squares = squares.nan_to_num(nan=math.inf, posinf=math.inf)  # a maximum over ranks may lose a NaN
            dist.all_reduce(squares, dist.ReduceOp.MAX, self._mesh.get_group("replicate"))
        return squares.sqrt()

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this process's part."""
        return tensor._local_tensor.detach() if isinstance(tensor, DTensor) else tensor.detach()

    def gathered(self, tensor: torch.Tensor, like: torch.Tensor) -> Part:
        """Gather a tensor, of which each process may hold some rows, as it does of `like`."""
        placed = tensor if isinstance(tensor, DTensor) else like
        local = self.local(tensor)
        if not isinstance(placed, DTensor) or not tensor.dim():
            return Part.whole(local)
        group, size = self._mesh.get_group("shard"), self._mesh.get_group("shard").size()
        rows, row = placed.shape[0], math.prod(placed.shape[1:])
        most = -(-rows // size)  # of a process: the last ones may have fewer, or none
        numbers = [max(0, min(most, rows - most * rank)) * row for rank in range(size)]

        def pieces() -> Iterator[torch.Tensor]:
            own = local.reshape(-1).to(self.world.device)  # from where it is held off it
            for rank, number in enumerate(numbers):
                for begin in range(0, number, PIECE):
                    size = min(PIECE, number - begin)
                    mine = rank == group.rank()
                    piece = own[begin : begin + size] if mine else torch.empty(size, dtype=own.dtype, device=own.device)
                    dist.broadcast(piece, group=group, group_src=rank)
                    yield piece

        return Part(placed.shape, tensor.dtype, pieces)

    def part(self, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return a whole tensor sharded as `like` is, where it has that shape."""
        if not isinstance(like, DTensor) or tensor.shape != like.shape:
            return tensor
        whole = tensor.to(self.world.device)
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to(like.device)


def _ends(network: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return the input embedding and the output head of a language model, where they share no weights."""
    ends: list[list[nn.Module]] = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            end = getattr(network, name, lambda: None)()
        except NotImplementedError:
            end = None
        ends.append([end] if isinstance(end, nn.Module) and alone(end, network) else [])
    return ends[0], ends[1]


def _check(name: str, network: nn.Module) -> None:
    """Make weights contiguous, as FSDP2 wants them. Raises UserError for those that it cannot hold in parts."""
    for key, parameter in network.named_parameters():
        fault = "a scalar" if not parameter.dim() else "" if parameter.is_floating_point() else f"{parameter.dtype}"
        if fault:
            raise UserError(
                f"networks.{name}: FSDP2 cannot hold `{key}` in parts, which is {fault}: launch with MULTI_GPU."
            )
        parameter.data = parameter.data.contiguous()
    kinds = {p.dtype for p in network.parameters() if p.requires_grad}
    if len(kinds) > 1:
        raise UserError(f"networks.{name}: FSDP2 trains weights of one type; set its dtype to float32.")
