"""Weights that are rounded while they are trained: against rounding by hand, and against what is then quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from scaletrain.config import NetworkSpec, QATSpec
from scaletrain.errors import UserError
from scaletrain.networks._post_training import reloaded
from scaletrain.networks._qat import prepare, revert
from scaletrain.networks.build import build, outline, save

LLAMA = {"model_type": "llama", "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True}
IDS = torch.arange(24).view(2, 12)


def spec(qat: dict[str, Any] | None) -> NetworkSpec:
    return NetworkSpec.model_validate({"type": "causal_lm", "config": LLAMA, "qat": qat})


def new(qat: dict[str, Any] | None) -> Any:
    torch.manual_seed(0)
    return build("model", spec(qat)).eval()


def logits(module: Any) -> torch.Tensor:
    with torch.no_grad():
        return module(input_ids=IDS).logits


@pytest.mark.parametrize(("qat", "bits", "group"), [({"type": "int4", "group": 16}, 4, 16), ({"type": "int8"}, 8, 32)])
def test_a_layer_computes_with_its_rounded_weights_and_learns_past_the_rounding(
    qat: dict[str, Any], bits: int, group: int
) -> None:
    layer = new(qat).model.layers[0].self_attn.q_proj
    weight = layer.weight.detach().double().view(-1, group)
    used = layer(torch.eye(32)).T.detach().double().reshape(-1, group)
    # The nearest of 2^bits whole numbers of steps, of which the largest magnitude of a group takes the half.
    step = weight.abs().amax(1, keepdim=True) / ((2**bits - 1) / 2)
    whole = used / step
    torch.testing.assert_close(whole, whole.round(), rtol=0, atol=1e-3)
    assert whole.round().min() >= -(2 ** (bits - 1))
    assert whole.round().max() <= 2 ** (bits - 1) - 1
    assert (used - weight).abs().le(0.5001 * step).all()
    x = torch.randn(5, 32)
    layer(x).sum().backward()
    passed = torch.isclose(layer.weight.grad, x.sum(0).expand(32, 32), atol=1e-5).view(-1, group)
    assert layer.weight.grad.view(-1, group)[~passed].eq(0).all()
    assert weight.abs().eq(weight.abs().amax(1, keepdim=True))[~passed].all()  # clipped: at most one in a group


def test_names_weights_and_ties_are_those_of_the_plain_network() -> None:
    plain, fake = new(None), new({"type": "int4"} | {"group": 16})
    assert plain.state_dict().keys() == fake.state_dict().keys()
    assert {n: p.shape for n, p in plain.named_parameters()} == {n: p.shape for n, p in fake.named_parameters()}
    assert fake.lm_head.weight is fake.model.embed_tokens.weight
    hollow = outline("model", spec({"type": "int4", "group": 16}))
    assert {n: p.shape for n, p in hollow.named_parameters()} == {n: p.shape for n, p in fake.named_parameters()}
    assert all(p.is_meta and p.requires_grad for p in hollow.parameters())


def test_what_goes_on_from_it_is_plain_again_unless_it_asks() -> None:
    torch.manual_seed(0)
    plain = logits(new(None))
    fake = new({"type": "int4", "group": 16})
    fake.load_state_dict(new(None).state_dict())
    assert not torch.allclose(logits(fake), plain, atol=1e-5)
    assert torch.equal(logits(build("model", spec(None), fake).eval()), plain)


def test_an_adapter_goes_over_the_plain_network(tmp_path: Path) -> None:
    qat, onward = {"type": "int4", "group": 16}, NetworkSpec.model_validate({**spec(None).model_dump(), "adapter": {}})
    plain = logits(new(None))
    found = build("model", onward, new(qat)).eval()
    torch.testing.assert_close(logits(found), plain)  # a LoRA begins with nothing
    save(found, onward, tmp_path)
    torch.testing.assert_close(logits(build("model", onward, new(qat), tmp_path).eval()), plain)
    hollow = outline("model", onward, outline("model", spec(qat)))
    assert [type(m) for m in hollow.modules()] == [type(m) for m in found.modules()]


@pytest.mark.parametrize("qat", [{"type": "int4", "group": 16}, {"type": "int8"}])
def test_quantised_it_gives_what_it_gave_in_training(qat: dict[str, Any], tmp_path: Path) -> None:
    fake = new(qat)
    with torch.no_grad():
        for p in fake.parameters():
            p.add_(0.05 * torch.randn_like(p))
    save(fake, spec(qat), tmp_path)
    expected = logits(fake)
    plain = logits(revert(fake))
    real = logits(reloaded(fake, tmp_path, None, qat["type"], qat.get("group")))
    drift = (real - expected).abs().max()
    assert drift <= 1e-5 * expected.abs().max()
    assert (real - plain).abs().max() > 100 * drift


def test_messages() -> None:
    with pytest.raises(
        UserError, match=r"networks.model.qat: groups of 32 do not divide the 48 inputs of `model.layers.0"
    ):
        new({"type": "int4"})
    with pytest.raises(UserError, match="has no linear layers"):
        prepare(nn.Conv2d(1, 1, 1), QATSpec(), "networks.model.qat")
    with pytest.raises(ValidationError, match="leave `group` out"):
        QATSpec(type="int8", group=32)
    for other in ({"adapter": {}}, {"frozen": True}):
        with pytest.raises(ValidationError, match="take one of the two"):
            NetworkSpec.model_validate({"type": "causal_lm", "qat": {}, **other})
