"""Autoencoders: their latents have a variance of 1, diffusers reads them, and they are told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scaletrain.config import NetworkSpec
from scaletrain.errors import UserError
from scaletrain.networks import autoencoder_kl
from scaletrain.networks.autoencoder_kl import STATISTICS, Config
from scaletrain.networks.build import build, outline, save

diffusers = pytest.importorskip("diffusers")

SMALL: dict[str, Any] = {"channels": 1, "features": [8, 8], "groups": 4, "latent_channels": 2}
SPEC = NetworkSpec(type="autoencoder_kl", config=SMALL)


def made(seed: int = 0) -> Any:
    """Return a new one, whose latents are neither centred nor of a variance of 1."""
    torch.manual_seed(seed)
    module: Any = build("autoencoder", SPEC)
    with torch.no_grad():
        module.quant_conv.bias[:2] = torch.tensor([3.0, -1.0])
        module.quant_conv.weight[:2] *= 4
    return module


def pictures(count: int = 64) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def counted(module: Any) -> Any:
    """Train on one batch, whose statistics are taken for all."""
    module.statistics.momentum = 1.0
    with torch.no_grad():
        module(pictures())
    return module.eval()


def test_scaled_latents_have_a_mean_of_0_and_a_variance_of_1() -> None:
    module = made()
    with torch.no_grad():
        before = module(pictures(), "encode")
        after = counted(module)(pictures(), "encode")
        assert abs(float(before.mean())) > 0.5
        assert float(after.mean()) == pytest.approx(0, abs=0.02)
        assert float(after.std()) == pytest.approx(1, abs=0.03)
        expected, mean, log_variance = module(pictures(), "reconstruct")
        torch.testing.assert_close(module(after, "decode"), expected, rtol=0, atol=1e-5)
        drawn, same, _ = module(pictures())
    assert torch.equal(mean, same)
    assert after.shape == (64, *module.latent_shape((1, 8, 8))) == (64, 2, 4, 4)
    assert log_variance.shape == mean.shape
    assert not torch.allclose(drawn, expected, atol=1e-3)


def test_diffusers_reads_its_folder_and_scales_as_it_does(tmp_path: Path) -> None:
    module = counted(made())
    save(module, SPEC, tmp_path)
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path).eval()
    assert theirs.state_dict().keys() == {k for k in module.state_dict() if not k.startswith("statistics.")}
    with torch.no_grad():
        mean = theirs.encode(pictures()).latent_dist.mean
        expected = (mean - theirs.config.shift_factor) * theirs.config.scaling_factor
        torch.testing.assert_close(module(pictures(), "encode"), expected, rtol=1e-5, atol=1e-5)


def test_what_is_read_back_is_the_same_one(tmp_path: Path) -> None:
    module = counted(made())
    save(module, SPEC, tmp_path)
    state = module.state_dict()
    for spec, folder in ((SPEC, tmp_path), (NetworkSpec(type="autoencoder_kl", path=str(tmp_path)), None)):
        again: Any = build("autoencoder", spec, None, folder)
        assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
        assert again.latents("there").autoencoder == module.latents("here").autoencoder
    (tmp_path / STATISTICS).unlink()  # as another library leaves it: the factors alone
    again = build("autoencoder", NetworkSpec(type="autoencoder_kl", path=str(tmp_path)))
    assert again.latents("").autoencoder == module.latents("").autoencoder
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "AutoencoderKL"


def test_other_weights_or_factors_are_another_one() -> None:
    first, other = made(), made()
    assert first.latents("").autoencoder == other.latents("").autoencoder
    with torch.no_grad():
        other.decoder.conv_out.bias[0] += 1e-4
    assert first.latents("").autoencoder != other.latents("").autoencoder
    assert counted(made()).latents("").autoencoder != first.latents("").autoencoder


def test_a_pipeline_s_own_is_found_in_its_folder(tmp_path: Path) -> None:
    from tests.unit.diffusers_pipelines import saved

    pipe = saved("dit", tmp_path)
    module: Any = build("autoencoder", NetworkSpec(type="autoencoder_kl", path=str(tmp_path))).eval()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = (pipe.vae.encode(images).latent_dist.mean - 0.1) * 0.5
        torch.testing.assert_close(module(images, "encode"), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(module(expected, "decode"), pipe.vae.decode(expected / 0.5 + 0.1).sample)
    empty: Any = outline("autoencoder", NetworkSpec(type="autoencoder_kl", path=str(tmp_path)))
    assert next(empty.parameters()).is_meta
    assert empty.latent_shape((3, 16, 24)) == (4, 8, 12)


def test_what_cannot_be_is_told(tmp_path: Path) -> None:
    save(made(), SPEC, tmp_path)
    read = NetworkSpec(type="autoencoder_kl", path=str(tmp_path))
    for config, words in (({"channels": 3}, "config.channels is 3"), ({"features": [8]}, "config.features is")):
        with pytest.raises(UserError, match=words):
            build("autoencoder", read.model_copy(update={"config": config}))
    with pytest.raises(UserError, match="holds no autoencoder"):
        autoencoder_kl.load(str(tmp_path / "elsewhere"), Config(), torch.float32)
    with pytest.raises(UserError, match=r"no multiple of config\.groups"):
        autoencoder_kl.build(Config(features=[12]))
    for shape, words in (((3, 8, 8), "3 channels"), ((1, 9, 8), "2 times smaller")):
        with pytest.raises(UserError, match=words):
            made().latent_shape(shape)
