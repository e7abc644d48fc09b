"""What denoisers are told: it counts once trained, and a network that grows a part answers as before until then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scaletrain.config import NetworkSpec
from scaletrain.errors import UserError
from scaletrain.networks.build import build, grown, outline

SMALL: dict[str, dict[str, Any]] = {
    "point_denoiser": {"dim": 2, "hidden": [16, 16]},
    "unet": {"channels": 1, "height": 4, "width": 4, "features": [8, 8], "middle": 0, "time_features": 8},
}
MORE = {"classes": 3, "guidance": True, "target": True}
EACH = pytest.mark.parametrize("type_", SMALL)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def made(type_: str, **more: Any) -> nn.Module:
    """Return a network whose weights are random, but for those of what it is told."""
    network = build("model", NetworkSpec(type=type_, config={**SMALL[type_], **more}))
    for name, parameter in network.named_parameters():
        if "conditions" not in name:
            nn.init.normal_(parameter, std=0.3)
    return network


def inputs(type_: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    z = torch.randn(6, 2) if type_ == "point_denoiser" else torch.randn(6, 1, 4, 4)
    return z, torch.rand(6), {"label": torch.arange(6) % 4, "guidance": torch.rand(6) + 1, "target": torch.rand(6)}


@EACH
def test_a_grown_network_answers_as_before_until_its_new_parts_are_trained(type_: str) -> None:
    network = made(type_).to(torch.float64)
    z, t, told = inputs(type_)
    z, t = z.double(), t.double()
    before = network(z, t)
    larger = grown("student", network, NetworkSpec(config=MORE))
    assert next(larger.parameters()).dtype == torch.float64
    torch.testing.assert_close(larger(z, t, **told), before, rtol=0, atol=0)
    torch.testing.assert_close(larger(z, t), before, rtol=0, atol=0)
    larger(z, t, **told).square().sum().backward()
    for name, parameter in larger.named_parameters():
        if "conditions" in name:
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 0, name
            nn.init.normal_(parameter)
    for key in told:
        changed = {**told, key: told[key].flip(0)}
        assert (larger(z, t, **told) - larger(z, t, **changed)).abs().max() > 1e-4, key


@EACH
def test_what_is_not_given_is_none_full_strength_and_the_start(type_: str) -> None:
    network = made(type_, **MORE)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    z, t, _ = inputs(type_)
    none = {"label": torch.full((6,), 3), "guidance": torch.ones(6), "target": torch.zeros(6)}
    torch.testing.assert_close(network(z, t), network(z, t, **none))


@EACH
def test_nothing_new_is_the_same_network(type_: str) -> None:
    network = made(type_)
    assert grown("student", network, NetworkSpec()) is network
    assert grown("student", network, NetworkSpec(config=dict(SMALL[type_]))) is network


@pytest.mark.parametrize(
    ("type_", "config", "words"),
    [
        ("point_denoiser", {"dim": 3}, r"`first.weight` is \(16, 3\), there it is \(16, 2\)"),
        ("point_denoiser", {"hidden": [16, 16, 16]}, r"`layers.1.weight` is \(16, 16\), there it is not there"),
        ("point_denoiser", {"hidden": [16]}, r"`layers.0.weight` is not there, there it is \(16, 16\)"),
        ("unet", {"features": [8, 16]}, r"`halve.0.weight` is \(16, 8, 2, 2\), there it is \(8, 8, 2, 2\)"),
        ("unet", {"blocks": 2}, "not there"),
    ],
)
def test_the_first_tensor_that_does_not_fit_is_named(type_: str, config: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        grown("student", made(type_), NetworkSpec(config=config))


@EACH
def test_an_outline_grows_as_the_network_does(type_: str) -> None:
    base = outline("teacher", NetworkSpec(type=type_, config=SMALL[type_]))
    found = outline("student", NetworkSpec(type=type_, config={**SMALL[type_], **MORE}), base)
    real = made(type_, **MORE)
    assert {n: p.shape for n, p in found.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert all(p.is_meta for p in found.parameters())
    wrong = {**SMALL[type_], **({"dim": 3} if type_ == "point_denoiser" else {"channels": 3})}
    base = outline("teacher", NetworkSpec(type=type_, config=SMALL[type_]))
    with pytest.raises(UserError, match="makes another network"):
        outline("student", NetworkSpec(type=type_, config=wrong), base)
