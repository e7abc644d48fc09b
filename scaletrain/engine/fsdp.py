"""FSDP2: each process holds a part of every parameter of what is trained, and gathers a block when it computes it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from scaletrain.engine.native import Native
from scaletrain.engine.precision import DTYPES
from scaletrain.errors import UserError
from scaletrain.player import Player


class FullyShard(Native):
    """Parameters, gradients and optimiser state in parts (Zhao et al., 2023). Networks that are not trained stay whole.

    Blocks are the entries of a network's lists, which is how transformers, diffusers and our networks keep them.
    Masters are fp32; under bf16 and fp16 a block is gathered in that type, and gradients are reduced in fp32.
    """

    name = "fsdp2"
    lockstep = True

    def wrap(self, networks: Mapping[str, nn.Module], trained: Collection[str]) -> None:
        """Shard the trained networks in place, before optimisers and averages are made of their parameters."""
        mesh = init_device_mesh(self.world.device.type, (self.world.size,))
        half = None if self.precision == "fp32" else DTYPES[self.precision]
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for name in trained:
            kinds = {p.dtype for p in networks[name].parameters()}
            if len(kinds) > 1:
                raise UserError(f"networks.{name}: FSDP2 gathers weights of one type; set its dtype to float32.")
            for block in _blocks(networks[name]):
                fully_shard(block, mesh=mesh, mp_policy=policy)
            fully_shard(networks[name], mesh=mesh, mp_policy=policy)
        self._sharded = [m for name in trained for m in networks[name].modules() if isinstance(m, FSDPModule)]

    def _let_go(self) -> None:
        """Free what a forward pass without a backward pass has gathered, which would not follow the parts from then."""
        for module in self._sharded:
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
        """Hold gradients back, whole, on all but the last micro-batch."""
        for module in player.networks.values():
            assert isinstance(module, FSDPModule)
            module.set_requires_gradient_sync(last)
        yield

    def norm(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the norm over the parts of all processes."""
        squares = torch.stack(torch._foreach_norm(list(gradients))).square().sum()
        dist.all_reduce(squares)
        return squares.sqrt()

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this process's part."""
        return tensor._local_tensor if isinstance(tensor, DTensor) else tensor

    def whole(self, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Gather a tensor, of which each process may hold a part, as it does of `like`."""
        if isinstance(like, DTensor) and not isinstance(tensor, DTensor) and tensor.dim():
            placed = (like.device_mesh, like.placements)
            tensor = DTensor.from_local(tensor, *placed, run_check=False, shape=like.shape, stride=like.stride())
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def part(self, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return a whole tensor sharded as `like` is, where it has that shape."""
        if not isinstance(like, DTensor) or tensor.shape != like.shape:
            return tensor
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def _blocks(network: nn.Module) -> list[nn.Module]:
    """Return the entries of a network's lists that have parameters, the inner ones first."""
    found = [
        block
        for part in network.modules()
        if isinstance(part, nn.ModuleList)
        for block in part
        if not isinstance(block, (nn.ModuleList, nn.ModuleDict)) and any(True for _ in block.parameters())
    ]
    return found[::-1]
