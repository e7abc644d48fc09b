"""The module that something not finite comes from is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from scaletrain.networks.point_denoiser import Config, PointDenoiser
from scaletrain.nonfinite import watched
from tests.launch import start
from tests.recipes.tiny import overrides


class Root(nn.Module):
    """Whose slope at 0 is not finite."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sqrt()


def test_the_first_module_that_overflows_in_half_precision_is_named() -> None:
    network = PointDenoiser(Config(hidden=[8, 8, 8]))
    nn.init.constant_(network.layers[0].weight, 3e4)
    z, t = torch.full((4, 2), 100.0), torch.rand(4)
    with watched({"student": network, "teacher": nn.Linear(2, 2)}) as found:
        network(z, t)
        assert found == []
        with torch.autocast("cpu", torch.float16):
            network(z, t)
    assert found[0] == "`student.layers.0`"
    with torch.autocast("cpu", torch.float16):
        network(z, t)
    assert found[-1] == "`student`"  # and it looks no more


def test_a_tangent_is_looked_at_too() -> None:
    network = nn.Sequential(nn.ReLU(), Root())
    with watched({"student": network}) as found, forward_ad.dual_level():
        network(forward_ad.make_dual(torch.zeros(3), torch.ones(3)))
    assert found == ["the tangent of `student.1`", "the tangent of `student`"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["scm", "meanflow"])
def test_a_run_whose_slopes_overflow_in_half_precision_names_the_layer(method: str, tmp_path: Path) -> None:
    """What it is told of the time changes faster than fp16 can say, though it is itself between -1 and 1."""
    name = f"distill/{method}_gmm"
    own = ["train.precision=fp16", "players.student.scaler.initial=2", "networks.student.config.fastest=1.0e+6"]
    codes, printed = start(["run", name, *overrides(name, tmp_path), *own, "--root", tmp_path]).finish()
    assert codes == [2], printed
    assert "the loss is not finite" in printed
    assert "The first that is not: the tangent of `student.times`." in printed
    assert "Traceback" not in printed
