from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

from scaletrain.config import OptimizerSpec
from scaletrain.errors import UserError
from scaletrain.optim.optimizers import build_optimizer

ALL = ["sgd", "adagrad", "rmsprop", "adam", "adamw", "adafactor", "lion", "muon"]
BITSANDBYTES = ["adam8bit", "adamw8bit", "lion8bit", "paged_adamw8bit"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 6)
        self.hidden = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 7)
        self.scale = nn.Parameter(torch.tensor(1.3))

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.hidden(self.embed(x))))) * self.scale

    def get_output_embeddings(self):
        return self.head


def named(net):
    return {f"model/{name}": p for name, p in net.named_parameters()}


def train(net, optimizers, steps=5):
    x = torch.arange(7)
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), x.flip(0)).backward()
        for optimizer in optimizers:
            optimizer.step()
    return net


def groups(net, weight_decay):
    """The split that is expected, by name rather than by number of dimensions."""
    vectors = [p for n, p in net.named_parameters() if n.endswith("bias") or n in ("norm.weight", "scale")]
    matrices = [net.embed.weight, net.hidden.weight, net.head.weight]
    assert len(vectors) + len(matrices) == len(list(net.parameters()))
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def assert_same(a, b, **tolerance):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


@pytest.mark.parametrize(
    ("spec", "reference"),
    [
        ({"type": "sgd"}, lambda g: torch.optim.SGD(g, lr=0.05)),
        (
            {"type": "sgd", "momentum": 0.8, "nesterov": True},
            lambda g: torch.optim.SGD(g, lr=0.05, momentum=0.8, nesterov=True),
        ),
        ({"type": "adagrad", "eps": 1e-6}, lambda g: torch.optim.Adagrad(g, lr=0.05, eps=1e-6)),
        (
            {"type": "rmsprop", "alpha": 0.9, "momentum": 0.5},
            lambda g: torch.optim.RMSprop(g, lr=0.05, alpha=0.9, momentum=0.5),
        ),
        ({"type": "adam", "betas": (0.5, 0.9)}, lambda g: torch.optim.Adam(g, lr=0.05, betas=(0.5, 0.9))),
        ({"type": "adamw", "eps": 1e-5}, lambda g: torch.optim.AdamW(g, lr=0.05, eps=1e-5)),
        ({"type": "adafactor", "eps": 1e-8}, lambda g: torch.optim.Adafactor(g, lr=0.05, eps=(1e-8, 1e-3))),
    ],
)
def test_types_are_torchs_own_with_decay_on_matrices_only(spec, reference):
    net, other = Net(), Net()
    ours = build_optimizer(OptimizerSpec(lr=0.05, weight_decay=0.1, **spec), named(net))
    train(net, [ours])
    train(other, [reference(groups(other, 0.1))])
    assert_same(net, other, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(net.hidden.weight, Net().hidden.weight)


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd"])
def test_fused_kernels_are_deterministic(kind):
    spec = OptimizerSpec(type=kind, lr=0.05, **({"momentum": 0.9} if kind == "sgd" else {}))
    nets = [Net(), Net()]
    for net in nets:
        optimizer = build_optimizer(spec, named(net))
        assert optimizer.defaults["fused"] is True
        train(net, [optimizer], steps=20)
    assert_same(*nets, rtol=0, atol=0)


def test_lion_is_the_papers_algorithm():
    net, other = Net(), Net()
    lr, decay, beta1, beta2 = 0.01, 0.1, 0.8, 0.95
    spec = OptimizerSpec(type="lion", lr=lr, weight_decay=decay, betas=(beta1, beta2))
    train(net, [build_optimizer(spec, named(net))], steps=6)
    moments = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in other.named_parameters()}
    x = torch.arange(7)
    for _ in range(6):
        other.zero_grad()
        nn.functional.cross_entropy(other(x), x.flip(0)).backward()
        for name, p in other.named_parameters():
            g, m = p.grad.double(), moments[name]
            step = torch.sign(beta1 * m + (1 - beta1) * g)
            p.data = (p.double() - lr * (step + (decay if p.ndim == 2 else 0.0) * p.double())).float()
            moments[name] = beta2 * m + (1 - beta2) * g
    assert_same(net, other, rtol=1e-6, atol=1e-6)


def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    net, other = Net(), Net()
    spec = OptimizerSpec(type="muon", lr=0.02, weight_decay=0.1, momentum=0.9, betas=(0.8, 0.9))
    train(net, [build_optimizer(spec, named(net), [net])])
    hidden = other.hidden.weight
    rest = [{**g, "params": [p for p in g["params"] if p is not hidden]} for g in groups(other, 0.1)]
    reference = [
        torch.optim.Muon([hidden], lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.02, betas=(0.8, 0.9)),
    ]
    train(other, reference)
    assert_same(net, other, rtol=1e-5, atol=1e-6)


def test_muon_without_a_matrix_is_refused():
    net = nn.LayerNorm(4)
    with pytest.raises(UserError, match=r"players\.a\.optimizer\.type.*use adamw"):
        build_optimizer(OptimizerSpec(type="muon"), named(net), [net], key="players.a.optimizer")


@pytest.mark.parametrize("kind", ALL)
def test_continues_bit_for_bit_from_state_by_parameter(kind):
    """The way of checkpoints: tensors and numbers by parameter name, put into a fresh optimiser."""
    spec = OptimizerSpec(type=kind, lr=0.01)
    whole = Net()
    train(whole, [build_optimizer(spec, named(whole), [whole])], steps=6)

    part = Net()
    first = build_optimizer(spec, named(part), [part])
    train(part, [first], steps=3)
    stored = {n: copy.deepcopy(first.state[p]) for n, p in named(part).items()}
    assert all(isinstance(v, (torch.Tensor, int, float)) or v is None for s in stored.values() for v in s.values())
    second = build_optimizer(spec, named(part), [part])
    for name, p in named(part).items():
        second.state[p].update(stored[name])
    train(part, [second], steps=3)
    assert_same(whole, part, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ALL)
def test_continues_bit_for_bit_from_a_state_dict(kind):
    spec = OptimizerSpec(type=kind, lr=0.01)
    whole = Net()
    train(whole, [build_optimizer(spec, named(whole), [whole])], steps=6)

    part = Net()
    first = build_optimizer(spec, named(part), [part])
    train(part, [first], steps=3)
    stored = copy.deepcopy(first.state_dict())
    second = build_optimizer(spec, named(part), [part])
    second.load_state_dict(stored)
    train(part, [second], steps=3)
    assert_same(whole, part, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ALL)
def test_a_rate_of_zero_in_the_groups_holds_everything_still(kind):
    """Schedules set `group["lr"]`; every part of every type must listen."""
    net = Net()
    optimizer = build_optimizer(OptimizerSpec(type=kind, lr=0.5), named(net), [net])
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(net, [optimizer])
    assert_same(net, Net(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_8_bit_types_follow_their_32_bit_kin(kind):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    start, target = torch.randn(128, 64), torch.randn(128, 64)
    ends = []
    for name in (kind, "adam" if kind == "adam8bit" else "lion" if "lion" in kind else "adamw"):
        p = nn.Parameter(start.clone())
        optimizer = build_optimizer(OptimizerSpec(type=name, lr=0.02), {"model/w": p})
        for _ in range(10):
            optimizer.zero_grad()
            ((p - target) ** 2).sum().backward()
            optimizer.step()
        ends.append(p.detach())
    moved = (ends[1] - start).abs().mean()
    assert (ends[0] - ends[1]).abs().mean() < 0.05 * moved


@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_8_bit_types_without_bitsandbytes_say_what_to_install(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"optimizer\.type.*pip install 'scaletrain\[quant\]'"):
        build_optimizer(OptimizerSpec(type=kind), named(Net()))


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("adamw", "momentum", 0.9),
        ("adamw", "nesterov", True),
        ("sgd", "betas", (0.9, 0.99)),
        ("sgd", "alpha", 0.9),
        ("adagrad", "momentum", 0.9),
        ("rmsprop", "nesterov", True),
        ("adam", "alpha", 0.9),
        ("adafactor", "betas", (0.9, 0.99)),
        ("lion", "eps", 1e-8),
        ("muon", "alpha", 0.9),
    ],
)
def test_a_figure_that_the_type_does_not_take_is_refused(kind, key, value):
    with pytest.raises(UserError, match=rf"`players\.critic\.optimizer\.{key}`: {kind} has no {key}"):
        build_optimizer(OptimizerSpec(type=kind, **{key: value}), named(Net()), key="players.critic.optimizer")


@pytest.mark.parametrize(
    "spec",
    [
        {"type": "sgd", "nesterov": True},
        {"type": "adamw", "betas": (1.5, 0.9)},
        {"type": "lion", "betas": (0.9, 1.0)},
    ],
)
def test_figures_out_of_range_are_the_users_mistake(spec):
    with pytest.raises(UserError, match=r"`optimizer`: "):
        build_optimizer(OptimizerSpec(**spec), named(Net()))


def rates(optimizer, net):
    names = {id(p): name for name, p in net.named_parameters()}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_groups_have_figures_of_their_own_and_the_first_that_matches_wins(kind):
    net = Net()
    groups = [
        {"match": r"model/hidden", "lr_factor": 16},
        {"match": r"weight$", "lr": 0.3, "weight_decay": 0.2},
    ]
    spec = OptimizerSpec(type=kind, lr=0.01, weight_decay=0.1, groups=groups)
    optimizer = build_optimizer(spec, named(net), [net])
    assert rates(optimizer, net) == {
        "hidden.weight": (0.16, 0.1), "hidden.bias": (0.16, 0.0), "embed.weight": (0.3, 0.2),
        "head.weight": (0.3, 0.2), "norm.weight": (0.3, 0.0), "norm.bias": (0.01, 0.0), "head.bias": (0.01, 0.0),
        "scale": (0.01, 0.0),
    }  # fmt: skip


def test_groups_are_torchs_own():
    net, other = Net(), Net()
    spec = OptimizerSpec(lr=0.01, groups=[{"match": "hidden|embed", "lr_factor": 4}])
    fast = [other.embed.weight, other.hidden.weight, other.hidden.bias]
    slow = [p for p in other.parameters() if all(p is not q for q in fast)]
    train(net, [build_optimizer(spec, named(net))])
    train(other, [torch.optim.AdamW([{"params": fast, "lr": 0.04}, {"params": slow}], lr=0.01, weight_decay=0.0)])
    assert_same(net, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            [{"match": "hiden", "lr": 1.0}],
            r"optimizer.groups.0.match`: `hiden` has no parameter.*`embed.weight`, `hidden.weight`",
        ),
        (
            [{"match": "hidden", "lr": 1.0}, {"match": "hidden.bias", "lr": 1.0}],
            r"groups.1.match`: .*all that it matches is in groups before it",
        ),
    ],
)
def test_groups_that_match_nothing(groups, message):
    net = Net()
    with pytest.raises(UserError, match=message):
        build_optimizer(OptimizerSpec(groups=groups), named(net), [net])


@pytest.mark.parametrize(
    "group", [{"match": "(("}, {"match": "a"}, {"match": "a", "lr": 1.0, "lr_factor": 2.0}, {"lr": 1.0}]
)
def test_groups_that_say_nothing_or_too_much(group):
    with pytest.raises(ValueError, match=r"groups"):
        OptimizerSpec(groups=[group])
