"""Adapters trained by engines that hold them in parts: saved whole, as peft wants them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.distributed.engines import ENGINES
from tests.launch import run
from tests.recipes.tiny import make_data, overrides

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

GATHERING = '''
"""A causal language model that writes, when samples are drawn, its adapter and some logits by means of its own."""

import os

import torch
from safetensors.torch import save_file

from scaletrain.objectives import causal_lm

Config = causal_lm.Config


class Objective(causal_lm.Objective):
    def sample(self, networks, request):
        found, model = {}, networks["model"]
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if hasattr(parameter, "ds_tensor"):
                import deepspeed

                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None):
                    found[name] = parameter.detach().clone()
            else:
                whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
                found[name] = whole.detach().clone()
        with torch.no_grad():
            found["logits"] = model(input_ids=torch.arange(2, 18)[None]).logits
        if os.environ.get("RANK", "0") == "0":
            save_file({k: v.contiguous() for k, v in found.items()}, os.environ["GATHERED"])
        return super().sample(networks, request)
'''


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    make_data(folder)
    (folder / "gathering.py").write_text(GATHERING)
    return folder


def train(data: Path, engine: str) -> Path:
    words = ["run", "lm/lora", *overrides("lm/lora", data), "objective.type=gathering", "data.holdout=0"]
    words += ["players.model.optimizer.lr=0.01", "train.duration=4 steps", "checkpoint.every=4 steps"]
    words += ["--code", data / "gathering.py", "--root", data, "--run", engine]
    run(words, 2, variables={**ENGINES[engine], "GATHERED": str(data / f"{engine}.safetensors")})
    return data / engine


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def expected(data: Path) -> dict[str, torch.Tensor]:
    """The adapter under DDP."""
    return tensors(train(data, "ddp") / "latest" / "networks" / "model")


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_every_tensor_is_saved_whole(engine: str, data: Path, expected: dict[str, torch.Tensor]) -> None:
    saved = train(data, engine) / "latest" / "networks" / "model"
    ours = tensors(saved)
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in expected.items()}
    assert all(tensor.numel() for tensor in ours.values())
    assert any(tensor.abs().max() > 1e-3 for name, tensor in ours.items() if "lora_B" in name)

    gathered = load_file(data / f"{engine}.safetensors")
    logits = gathered.pop("logits")
    assert {name.replace(".default", ""): t for name, t in gathered.items()}.keys() == ours.keys()
    for name, tensor in gathered.items():
        assert torch.equal(ours[name.replace(".default", "")], tensor), name

    base = AutoModelForCausalLM.from_pretrained(data / "llama")
    ids = torch.arange(2, 18)[None]
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        assert not torch.allclose(plain, logits, rtol=1e-2)
        loaded = PeftModel.from_pretrained(base, saved).eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, logits, rtol=1e-5, atol=1e-6)

    run(["export", data / engine, data / f"{engine}-exported", "--code", data / "gathering.py"])
    exported = tensors(data / f"{engine}-exported" / "model")
    assert exported.keys() == ours.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in ours.items())
