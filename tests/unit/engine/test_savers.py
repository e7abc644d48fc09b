"""Recomputation, offloading and compilation change what a step keeps, not what it computes."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from scaletrain.config import TrainSpec
from scaletrain.engine import savers
from scaletrain.errors import UserError
from scaletrain.networks.cnn import Config, ResNet18

CPU = torch.device("cpu")


class Block(nn.Module):
    """Attention with dropout, then an MLP with dropout."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.mix = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x).view(len(x), -1, 3, 4, x.shape[-1] // 4).permute(2, 0, 3, 1, 4)
        h = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, is_causal=True)
        x = x + self.out(h.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Network(nn.Module):
    def __init__(self, dropout: float = 0.0, width: int = 32):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def build(dropout: float = 0.0, width: int = 32, **options: object) -> Network:
    torch.manual_seed(0)
    network = Network(dropout, width)
    savers.save(TrainSpec.model_validate(options), {"model": network}, CPU)
    return network


def step(network: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and the gradients, from the same random numbers each time."""
    torch.manual_seed(1)
    loss = network(x).square().mean()
    loss.backward()
    return loss.detach(), [p.grad for p in network.parameters() if p.grad is not None]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_is_exact_with_the_same_dropout(recompute: str, dropout: float) -> None:
    x = torch.randn(2, 16, 32)
    expected = step(build(dropout), x)
    torch.testing.assert_close(step(build(dropout, recompute=recompute), x), expected, rtol=0, atol=0)
    other = step(build(0.1, recompute=recompute), x)
    assert not torch.equal(other[0], expected[0])  # dropout does something here


def live(work: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Return the bytes that are allocated and not freed when it ends, and what it returned."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = work()
    return sum(event.self_cpu_memory_usage for event in profiled.key_averages()), result


def test_recomputation_keeps_less() -> None:
    x = torch.randn(4, 64, 64)
    kept = {}
    for how in ("off", "selective", "full"):
        network = build(0.1, 64, recompute=how)
        step(network, x)
        kept[how], loss = live(lambda network=network: network(x).square().mean())
        loss.backward()
    assert kept["full"] < 0.5 * kept["selective"] < 0.5 * 0.7 * kept["off"], kept
    inputs = 3 * x.nbytes + x.nbytes  # of each block, and the result
    assert kept["full"] == pytest.approx(inputs, rel=0.3)


class Count(TorchDispatchMode):
    """Counts what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("how", "products", "attention"), [("off", 12, 3), ("selective", 15, 3), ("full", 21, 6)])
def test_selective_recomputation_repeats_every_second_product_and_no_attention(
    how: str, products: int, attention: int
) -> None:
    """What comes last in a block is not repeated: nothing waits for it."""
    with Count() as count:
        step(build(recompute=how), torch.randn(2, 16, 32))
    assert count.calls["addmm"] == products
    assert count.calls["_scaled_dot_product_flash_attention_for_cpu"] == attention


@pytest.mark.parametrize(
    "operation",
    [
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    ],
)
def test_attention_that_draws_dropout_is_told(operation: Any) -> None:
    inputs = [a for a in operation._schema.arguments if not a.kwarg_only and not a.has_default_value()]
    needed = tuple(None for _ in inputs)
    place = [a.name for a in operation._schema.arguments].index("dropout_p")
    drawn = (*needed, *[None] * (place - len(needed)))[:place]
    assert savers._dropout(operation, (*drawn, 0.1), {}) == 0.1
    assert savers._dropout(operation, needed, {}) == 0.0
    assert savers._dropout(operation, needed, {"dropout_p": 0.2}) == 0.2


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_statistics_of_batches_move_once(recompute: str) -> None:
    def trained(how: str) -> dict[str, Tensor]:
        torch.manual_seed(0)
        network = ResNet18(Config(features=8, height=8, width=8))
        savers.save(TrainSpec(recompute=how), {"model": network}, CPU)
        step(network, torch.randn(4, 1, 8, 8))
        return dict(network.state_dict())

    torch.testing.assert_close(trained(recompute), trained("off"), rtol=0, atol=0)


def test_nothing_is_repeated_without_gradients_and_caches_are_left_alone() -> None:
    seen: list[object] = []

    def forward(x: Tensor, past_key_values: object = None) -> Tensor:
        seen.append(past_key_values)
        return x * 2

    called = savers.recomputed(nn.Identity(), forward, selective=False)
    cache = object()
    with torch.no_grad():
        called(torch.ones(1), past_key_values=cache)
    called(torch.ones(1, requires_grad=True), past_key_values=cache).sum().backward()
    assert seen[0] is cache  # generation goes on with it
    assert seen[1:] in ([None, None], [None])  # training would write to it twice


def test_a_network_without_blocks_cannot_be_recomputed() -> None:
    with pytest.raises(UserError, match=r"train\.recompute: network `critic` has no list of blocks"):
        savers.save(TrainSpec(recompute="full"), {"critic": nn.Linear(2, 2)}, CPU)


def test_activations_are_moved_once_and_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(savers, "_WORTH_MOVING", 5 * 16 * 32 * 4)
    x = torch.randn(5, 16, 32)
    expected = step(build(0.3), x)
    copies: list[tuple[int, ...]] = []
    empty_like = torch.empty_like

    def counted(tensor: Tensor, **options: object) -> Tensor:
        if options.get("device") == "cpu":
            copies.append(tuple(tensor.shape))
        return empty_like(tensor, **options)

    monkeypatch.setattr(torch, "empty_like", counted)
    network = build(0.3)
    for block in network.blocks:
        block.forward = savers.offloaded(block, block.forward)
    torch.testing.assert_close(step(network, x), expected, rtol=0, atol=0)
    assert copies
    assert not {(p.numel(),) for p in network.parameters()} & set(copies)
    full = build(0.3, recompute="full")
    copies.clear()
    for block in full.blocks:
        block.forward = savers.offloaded(block, block.forward)
    torch.testing.assert_close(step(full, x), expected, rtol=0, atol=0)
    assert copies == [(5 * 16 * 32,)] * 3  # the inputs of the blocks are all that is kept


def test_what_several_operations_keep_is_moved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(savers, "_WORTH_MOVING", 1)
    copies: list[int] = []
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x, **options: (copies.append(1), empty_like(x, **options))[1])
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    x = torch.randn(2, 4)
    savers.offloaded(layers, lambda x: torch.stack([layer(x) for layer in layers]).sum())(x).backward()
    assert len(copies) == 1
    for layer in layers:
        torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(4, 4))


@pytest.mark.gpu
def test_activations_leave_the_gpu() -> None:
    x = torch.randn(8, 512, 256, device="cuda")
    held = {}
    for offload in (False, True):
        torch.manual_seed(0)
        network = Network(0.0, 256).cuda()
        savers.save(TrainSpec(offload_activations=offload), {"model": network}, torch.device("cuda"))
        before = torch.cuda.memory_allocated()
        loss = network(x).square().mean()
        held[offload] = torch.cuda.memory_allocated() - before
        loss.backward()
        held[offload, "gradients"] = sum(p.grad.double().square().sum() for p in network.parameters())
    assert held[True] < 0.2 * held[False]
    assert held[True, "gradients"] == held[False, "gradients"]


def test_on_a_cpu_offloading_does_nothing() -> None:
    network = build(offload_activations=True)
    assert all("forward" not in vars(block) for block in network.blocks)


@pytest.mark.slow
def test_blocks_are_compiled_once_for_all_and_are_exact_within_rounding() -> None:
    from torch._dynamo.utils import counters

    x = torch.randn(2, 16, 32, requires_grad=True)
    expected = step(build(), x)
    for options in ({"compile": "blocks"}, {"compile": True, "recompute": "selective"}):
        torch._dynamo.reset()
        counters.clear()
        torch.testing.assert_close(step(build(**options), x), expected, rtol=1e-5, atol=1e-6)
        assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({}, ("off", "off")),
        ({"recompute": True, "compile": True}, ("full", "blocks")),
        ({"recompute": False, "compile": False}, ("off", "off")),
        ({"recompute": "selective", "compile": "network"}, ("selective", "network")),
    ],
)
def test_true_and_false_stand_for_words(given: dict[str, object], meant: tuple[str, str]) -> None:
    spec = TrainSpec.model_validate(given)
    assert (spec.recompute, spec.compile) == meant
