"""Two processes, which encode pictures in turns, make the latents that one makes, and learn from them as it does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scaletrain.config import NetworkSpec
from scaletrain.networks.build import build, save
from tests.distributed.ahead import assert_same_work
from tests.distributed.engines import ENGINES
from tests.recipes.tiny import overrides

pytest.importorskip("diffusers")
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2"])
def test_two_processes_encode_and_learn_as_one(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"channels": 1, "features": [8, 8], "groups": 4, "latent_channels": 2}
    spec = NetworkSpec(type="autoencoder_kl", config=config)
    torch.manual_seed(0)
    save(build("autoencoder", spec), spec, tmp_path / "vae")
    small = [
        f"networks.autoencoder={{type: autoencoder_kl, path: {tmp_path}/vae, frozen: true}}",
        "players.model.optimizer={type: sgd, lr: 0.01}",  # Adam makes much of the rounding of small gradients
        *("objective.clip=false", "evaluate.batch=4", "checkpoint.every=100 steps", "train.duration=6 steps"),
    ]
    words = ["run", "diffusion/ddpm", *overrides("diffusion/ddpm", tmp_path), *small, "--root", tmp_path]
    assert_same_work(words, "latent", ENGINES[engine], tmp_path, monkeypatch)
