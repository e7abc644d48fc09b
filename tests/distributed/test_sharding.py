"""FSDP2 over networks of many shapes: the same gradients as of the whole network, and messages for what cannot be."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from scaletrain.engine.fsdp import FullyShard, Sharding
from scaletrain.engine.world import World
from scaletrain.errors import UserError
from scaletrain.player import Player
from tests.launch import _context

pytestmark = pytest.mark.distributed

IDS = torch.arange(12).view(2, 6)
Loss = Callable[[nn.Module], Tensor]


def _t5() -> tuple[nn.Module, Loss]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=32, d_model=16, d_ff=32, d_kv=8, num_layers=3, num_heads=2, dropout_rate=0.0)
    network = T5ForConditionalGeneration(config)
    return network, lambda m: m(IDS, decoder_input_ids=IDS, use_cache=False).logits.square().mean()


def _transformer(kind: str, **options: object) -> tuple[nn.Module, Loss]:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    size = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3}
    network = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**size, **options, pad_token_id=0))
    return network, lambda m: m(IDS, use_cache=False).logits.square().mean()


def _albert() -> tuple[nn.Module, Loss]:
    from transformers import AlbertConfig, AlbertModel

    size = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3, "embedding_size": 8}
    config = AlbertConfig(**size, intermediate_size=32, attention_probs_dropout_prob=0, hidden_dropout_prob=0)
    return AlbertModel(config, add_pooling_layer=False), lambda m: m(IDS).last_hidden_state.square().mean()


def _unet() -> tuple[nn.Module, Loss]:
    from scaletrain.networks.unet import Config, UNet

    pictures, t = torch.linspace(-1, 1, 2 * 64).view(2, 1, 8, 8), torch.tensor([0.2, 0.7])
    network = UNet(Config(height=8, width=8, features=[8, 16], blocks=2))
    for parameter in network.parameters():  # its last layers begin at zero
        nn.init.normal_(parameter, std=0.1)
    return network, lambda m: m(pictures, t).square().mean()


class Tied(nn.Module):
    """Blocks that share a weight with one another, and one that shares none."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.layers[2].weight = self.layers[0].weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def _tied() -> tuple[nn.Module, Loss]:
    return Tied(), lambda m: m(IDS.float().view(-1, 1).expand(-1, 16)).square().mean()


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Loss]]] = {
    "t5": _t5,
    "llama": lambda: _transformer("llama", intermediate_size=32),
    "gpt2": lambda: _transformer("gpt2"),
    "mixtral": lambda: _transformer("mixtral", intermediate_size=32, num_local_experts=4, num_key_value_heads=2),
    "albert": _albert,
    "unet": _unet,
    "tied": _tied,
}


def _gradients(network: nn.Module, loss: Loss, whole: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    loss(network).backward()
    return {name: whole(p.grad) for name, p in network.named_parameters() if p.grad is not None}


def _built(name: str) -> tuple[nn.Module, Loss]:
    torch.manual_seed(0)
    network, loss = NETWORKS[name]()
    return network.train(), loss


def _sharded(names: tuple[str, ...]) -> None:
    """Compare, on each rank, with the whole network."""
    world = World.start()
    try:
        for name in names:
            whole, loss = _built(name)
            expected = _gradients(whole, loss, Tensor.detach)
            network, _ = _built(name)
            engine = FullyShard(world, "fp32", Sharding())
            engine.wrap({name: network}, [name], {})
            assert max(p._local_tensor.numel() / p.numel() for p in network.parameters() if p.shape[0] % 2 == 0) == 0.5
            found = _gradients(network, loss, DTensor.full_tensor)
            torch.testing.assert_close(
                found, expected, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
    finally:
        world.close()


class Borrowing(nn.Module):
    """Uses the weight of a block that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](x) @ self.layers[0].weight


def _refused(_: tuple[str, ...]) -> None:
    world = World.start()
    try:
        engine = FullyShard(world, "fp32", Sharding())
        borrowing = Borrowing()
        engine.wrap({"model": borrowing}, ["model"], {})
        player = Player("model", {"model": borrowing}, {}, torch.optim.SGD(borrowing.parameters()), None)  # type: ignore[arg-type]
        with (
            pytest.raises(UserError, match=r"networks\.model uses weights of a module"),
            engine.accumulate(player, True),
        ):
            borrowing(torch.ones(1, 4))
        scalar = nn.Linear(2, 2)
        scalar.register_parameter("scale", nn.Parameter(torch.tensor(1.0)))
        with pytest.raises(UserError, match=r"networks\.critic: FSDP2 cannot hold `scale` in parts, which is a scalar"):
            engine.wrap({"critic": scalar}, ["critic"], {})
        with pytest.raises(UserError, match=r"no module is a `Linaer`\. Did you mean `Linear`"):
            FullyShard(world, "fp32", Sharding(classes=("Linaer",))).wrap({"model": nn.Linear(2, 2)}, ["model"], {})
    finally:
        world.close()


def _main(work: Callable[[tuple[str, ...]], None], names: tuple[str, ...], rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    work(names)


def on_two(work: Callable[[tuple[str, ...]], None], *names: str) -> None:
    """Do work on two gloo ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [_context.Process(target=_main, args=(work, names, rank, port)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    assert codes == [0, 0], "see what they printed"


def test_gradients_are_those_of_the_whole_network() -> None:
    on_two(_sharded, *NETWORKS)


def test_what_cannot_be_sharded_is_named() -> None:
    on_two(_refused)
