"""LeNet-5 and ResNet-18 against published sizes and another library's block; DCGAN against its paper's shapes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scaletrain.errors import UserError
from scaletrain.networks import cnn, dcgan_critic, dcgan_generator


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_lenet_has_the_published_sizes() -> None:
    # C1 156 and F6 10,164 (LeCun et al., 1998, section II.B); C3 here sees all maps: 16 · (6 · 25 + 1); C5 48,120.
    expected = 156 + 2416 + 48_120 + 10_164 + 850
    assert size(cnn.build(cnn.Config())) == size(cnn.build(cnn.Config(height=32, width=32))) == expected


@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 17, 40), (1, 32, 33), (1, 64, 12)])
def test_lenet_takes_any_shape_from_12_pixels(shape: tuple[int, int, int]) -> None:
    model = cnn.build(cnn.Config(channels=shape[0], height=shape[1], width=shape[2], classes=7))
    assert model(torch.randn(2, *shape)).shape == (2, 7)


def test_lenet_refuses_what_is_too_small() -> None:
    with pytest.raises(UserError, match=r"objective\.size"):
        cnn.build(cnn.Config(height=8, width=8))


def test_resnet_has_the_published_size() -> None:
    # 11,173,962: ResNet-18 with a 3x3 stem on CIFAR-10 (kuangliu/pytorch-cifar).
    config = cnn.Config(architecture="resnet18", channels=3, height=32, width=32)
    assert size(cnn.build(config)) == 11_173_962


@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(8, 8, 1), (8, 16, 2)])
def test_block_computes_what_that_of_transformers_computes(inputs: int, outputs: int, stride: int) -> None:
    resnet = pytest.importorskip("transformers.models.resnet.modeling_resnet")
    block = cnn.Block(cnn.Config(architecture="resnet18"), inputs, outputs, stride)
    other = resnet.ResNetBasicLayer(inputs, outputs, stride)
    with torch.no_grad():
        for p in block.parameters():
            p.uniform_(-0.5, 0.5)
    mine, theirs = block.state_dict(), other.state_dict()
    shortcut = [k for k in mine if "shortcut" in k]
    names = [*(k for k in mine if k not in shortcut), *shortcut]
    there = [*(k for k in theirs if "shortcut" not in k), *(k for k in theirs if "shortcut" in k)]
    other.load_state_dict({b: mine[a] for a, b in zip(names, there, strict=True)})
    x = torch.randn(4, inputs, 6, 6)
    torch.testing.assert_close(block(x), other(x))


def test_resnet_halves_three_times_and_group_norm_sees_one_picture() -> None:
    model = cnn.build(cnn.Config(architecture="resnet18", height=16, width=16, features=8, norm="group"))
    sizes: list[int] = []
    for block in model.blocks:  # type: ignore[union-attr]
        block.register_forward_hook(lambda _, __, y: sizes.append(y.shape[2]))
    x = torch.randn(3, 1, 16, 16)
    whole = model(x)
    assert sizes == [16, 16, 8, 8, 4, 4, 2, 2]
    torch.testing.assert_close(whole[:1], model(x[:1]))


@pytest.mark.parametrize(("side", "start"), [(8, (128, 2, 2)), (28, (128, 7, 7)), (32, (256, 4, 4)), (64, (512, 4, 4))])
def test_dcgan_starts_where_the_paper_does(side: int, start: tuple[int, int, int]) -> None:
    # 64 pixels: 4x4, and four strided layers (Radford et al., 2016, figure 1).
    generator = dcgan_generator.build(dcgan_generator.Config(channels=3, height=side, width=side, latent=5))
    assert generator.start == start
    made = generator(torch.randn(2, 5))
    assert made.shape == (2, 3, side, side)
    assert made.abs().max() <= 1
    critic = dcgan_critic.build(dcgan_critic.Config(channels=3, height=side, width=side))
    assert critic(made).shape == (2,)


def test_dcgan_normalises_as_the_paper_does() -> None:
    generator = dcgan_generator.build(dcgan_generator.Config(height=32, width=32))
    critic = dcgan_critic.build(dcgan_critic.Config(height=32, width=32))
    # All layers but the generator's last, and the critic's first and last (section 3).
    assert sum(isinstance(m, nn.BatchNorm2d) for m in generator.modules()) == 3
    assert sum(isinstance(m, nn.BatchNorm2d) for m in critic.modules()) == 2
    weights = torch.cat([m.weight.flatten() for m in critic.modules() if isinstance(m, nn.Conv2d)])
    assert weights.std().item() == pytest.approx(0.02, rel=0.02)


def test_dcgan_refuses_odd_sides() -> None:
    with pytest.raises(UserError, match=r"objective\.size"):
        dcgan_generator.build(dcgan_generator.Config(height=30, width=30))
