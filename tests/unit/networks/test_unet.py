"""The U-Net: shapes of any picture, its block against the formula written out, what its options must be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from scaletrain.errors import UserError
from scaletrain.networks.unet import Block, Config, build


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return module


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 8, 8), {"features": [8, 16, 24]}),
        ((3, 12, 20), {"features": [16, 8, 8], "blocks": 2, "middle": 0}),
        ((2, 5, 7), {"features": [8]}),
        ((1, 12, 8), {"features": [8, 16], "patch": 2}),
    ],
)
def test_any_shape_in_is_the_shape_out(shape: tuple[int, int, int], options: dict[str, object]) -> None:
    config = Config.model_validate({"channels": shape[0], "height": shape[1], "width": shape[2], **options})
    network = build(config)
    z, t = torch.randn(3, *shape), torch.rand(3)
    assert network(z, t).abs().max() == 0  # at the start
    randomised(network)
    out = network(z, t)
    assert out.shape == z.shape
    torch.testing.assert_close(out[1:2], network(z[1:2], t[1:2]), rtol=1e-4, atol=1e-5)  # samples do not mix
    assert (out - network(z, 1 - t)).abs().max() > 1e-3  # the time counts
    out.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


def test_every_pixel_sees_every_other() -> None:
    network = randomised(build(Config(height=8, width=8, features=[8, 16, 16])))
    z = torch.randn(1, 1, 8, 8, requires_grad=True)
    network(z, torch.tensor([0.5]))[0, 0, 0, 0].backward()
    assert z.grad is not None
    assert (z.grad != 0).all()


@pytest.mark.parametrize("outputs", [16, 24])
def test_block_is_two_convolutions_beside_a_skip(outputs: int) -> None:
    block = Block(16, outputs, 4)
    x, times = torch.randn(2, 16, 5, 6), torch.randn(2, 4)
    torch.testing.assert_close(block(x, times), block.skip(x))  # at the start
    randomised(block)

    def norm(h: torch.Tensor) -> torch.Tensor:
        groups = h.reshape(2, 8, -1)
        return ((groups - groups.mean(2, True)) / (groups.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()).view_as(
            h
        )

    w1, b1 = block.norm1.weight.view(1, -1, 1, 1), block.norm1.bias.view(1, -1, 1, 1)
    h = F.conv2d(F.silu(norm(x) * w1 + b1), block.conv1.weight, block.conv1.bias, padding=1)
    told = times @ block.modulate.weight.T + block.modulate.bias
    h = norm(h) * (1 + told[:, :outputs, None, None]) + told[:, outputs:, None, None]
    h = F.conv2d(F.silu(h), block.conv2.weight, block.conv2.bias, padding=1)
    torch.testing.assert_close(block(x, times), block.skip(x) + h, rtol=1e-4, atol=1e-5)


def test_features_and_sides_that_do_not_fit_are_told() -> None:
    with pytest.raises(UserError, match="multiples of 8"):
        build(Config(features=[12]))
    with pytest.raises(UserError, match="sides that 4 divides, pictures are 8x6"):
        build(Config(height=8, width=6, features=[8, 8, 8]))
