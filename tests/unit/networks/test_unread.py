"""A network that comes without its weights is, once they are read, the one that `build` gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from scaletrain.config import AdapterSpec, NetworkSpec
from scaletrain.networks.build import build, save
from scaletrain.networks.unread import Unread, unread
from tests.recipes.tiny import make_networks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("networks")
    make_networks(path)
    return path


def read(left: Unread) -> nn.Module:
    """Read all weights, as an engine reads parts of them."""
    state = {key: entry.whole() for key, entry in left.weights.items()}
    assert all(left.module.get_parameter(key).is_meta for key in state)
    names = {id(p): key for key, p in left.module.named_parameters()}
    tied = {key: state[names[id(p)]] for key, p in left.module.named_parameters(remove_duplicate=False) if p.is_meta}
    left.module.load_state_dict(tied, strict=False, assign=True)
    return left.module


def same(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    assert {k: p.requires_grad for k, p in a.named_parameters()} == {
        k: p.requires_grad for k, p in b.named_parameters()
    }
    for (key, value), (_, other) in zip(a.named_buffers(), b.named_buffers(), strict=True):
        assert torch.equal(value, other), key


def lora(**options: object) -> AdapterSpec:
    return AdapterSpec.model_validate({"r": 2, **options})


@pytest.mark.parametrize(
    ("kind", "adapter"),
    [
        ("causal_lm", None),
        ("causal_lm", lora()),
        ("causal_lm", lora(type="rslora", dropout=0.1)),
        ("causal_lm", lora(targets=["q_proj", "embed_tokens"])),
        ("causal_lm", lora(targets=["q_proj"], train_also=["lm_head"])),
        ("causal_lm", lora(type="vera", dropout=0.1)),
        ("causal_lm", lora(type="ia3", r=None, train_also=["lm_head"])),
    ],
)
def test_as_built(kind: str, adapter: AdapterSpec | None, folder: Path, tmp_path: Path) -> None:
    spec = NetworkSpec(type=kind, path=str(folder / "llama"), adapter=adapter)
    torch.manual_seed(3)
    built = build("model", spec)
    torch.manual_seed(3)
    left = unread("model", spec)
    assert left is not None
    module = read(left)
    same(module, built)
    if kind == "causal_lm":
        inner, other = (m.get_base_model() if adapter else m for m in (module, built))  # type: ignore[operator]
        assert inner.generation_config.to_dict() == other.generation_config.to_dict()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    save(built, spec, tmp_path)
    again = unread("model", spec, tmp_path)
    assert again is not None
    same(read(again), build("model", spec, None, tmp_path))


def test_networks_of_our_own_and_their_buffers(tmp_path: Path) -> None:
    spec = NetworkSpec(type="dcgan_critic", config={"features": 8})
    built = build("critic", spec)
    for buffer in built.buffers():
        buffer.add_(1)
    save(built, spec, tmp_path)
    left = unread("critic", spec, tmp_path)
    assert left is not None
    same(read(left), built)


@pytest.mark.parametrize(
    "spec",
    [
        NetworkSpec(type="dcgan_critic", config={"features": 8}),  # new
        NetworkSpec.model_validate({"type": "causal_lm", "from": "stage:a/model"}),  # perhaps an average
    ],
)
def test_what_cannot_be_read_as_it_is(spec: NetworkSpec) -> None:
    assert unread("model", spec) is None


@pytest.mark.parametrize(
    "options", [{"type": "dora"}, {"type": "pissa"}, {"type": "prompt", "r": None}, {"merge": ["a"]}]
)
def test_adapters_that_look_at_the_weights(options: dict[str, object], folder: Path) -> None:
    assert unread("model", NetworkSpec(type="causal_lm", path=str(folder / "llama"), adapter=lora(**options))) is None


def test_more_tokens_than_the_file_has(folder: Path) -> None:
    spec = NetworkSpec(type="causal_lm", path=str(folder / "llama"), config={"vocab_size": 40}, adapter=lora())
    assert unread("model", spec) is None


def test_a_head_that_is_not_there(folder: Path) -> None:
    bert = NetworkSpec(type="text_classifier", path=str(folder / "bert"), config={"num_labels": 2})
    assert unread("model", bert) is None
