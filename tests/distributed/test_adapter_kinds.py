"""Every kind of adapter, begun by ZeRO-3 and gone on with by FSDP2, is that of one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from scaletrain.shelf import Shelf
from tests.distributed.engines import ENGINES, assert_close, tensors
from tests.launch import run
from tests.recipes.tiny import make_data, overrides

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RANK = {"r": 4, "alpha": 8}
KINDS = {
    "pissa": {"type": "pissa", **RANK},
    "vera": {"type": "vera", "r": 8},
    "prompt": {"type": "prompt", "virtual_tokens": 3},
    "tokens": RANK,
}
FIXED = ("vera_A", "vera_B")
"""Random matrices, which VeRA does not train."""
OLD, ALL = 16, 20
"""Tokens that the network for new ones embeds, and those of the tokenizer."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    make_data(folder)
    shutil.copytree(folder / "llama", folder / "tokens")
    config = LlamaConfig.from_pretrained(folder / "llama", vocab_size=OLD, tie_word_embeddings=True)
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder / "tokens")
    return folder


def adapter(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "networks" / "model" / "adapter_model.safetensors")


def cut(folder: Path) -> None:
    """Have a run folder be as it was after two steps."""
    (folder / "latest").unlink()
    shutil.rmtree(folder / "step-00000004")


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_each_kind_as_one(kind: str, data: Path) -> None:
    path = data / ("tokens" if kind == "tokens" else "llama")
    words = ["run", "lm/lora", *overrides("lm/lora", data), f"networks.model.path={path}"]
    words += [f"networks.model.adapter={json.dumps(KINDS[kind])}", "data.holdout=0"]
    words += ["objective.sampling={max_new_tokens: 4}", f"evaluate.samples={int(kind == 'prompt')}"]
    words += ["players.model.optimizer.lr=0.01", "train.duration=4 steps"]
    words += ["checkpoint.every=2 steps", "data.packing=false", "--root", data]
    words += [f"networks.model.config.vocab_size={ALL}"] if kind == "tokens" else []
    one, two = data / f"{kind}-one", data / f"{kind}-two"
    run([*words, "--run", one.name])
    run([*words, "--run", two.name], 2, variables=ENGINES["zero3"])
    assert_close(two / "latest", one / "latest", rtol=1e-5, atol=1e-5)
    cut(two)
    run([*words, "--run", two.name], 2, variables=ENGINES["fsdp2"])
    assert_close(two / "latest", one / "latest", rtol=1e-5, atol=1e-5)

    ids = torch.arange(2, 18)[None]
    base = AutoModelForCausalLM.from_pretrained(path)
    if kind == "tokens":
        base.resize_token_embeddings(ALL, mean_resizing=False)
    loaded = PeftModel.from_pretrained(base, two / "latest" / "networks" / "model").eval()
    ours = Shelf(two).open(two / "latest", "model").eval()
    with torch.no_grad():
        expected = ours(input_ids=ids).logits
        found = loaded(input_ids=ids).logits[:, -ids.shape[1] :]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    engines = [json.loads(p.read_text())["engine"] for p in sorted(two.glob("step-*/manifest.json"))]
    assert engines == ["zero3", "fsdp2"]
    begun, trained = (adapter(one / name) for name in ("step-00000002", "step-00000004"))
    assert all(
        not torch.equal(begun[name], tensor) for name, tensor in trained.items() if name.rpartition(".")[2] not in FIXED
    )


def test_a_quantised_base_under_ddp(data: Path) -> None:
    words = ["run", "lm/qlora", *overrides("lm/qlora", data), "train.duration=4 steps", "checkpoint.every=2 steps"]
    words += ["players.model.optimizer.lr=0.01", "evaluate.samples=0", "--root", data]
    one, two = data / "qlora-one", data / "qlora-two"
    run([*words, "--run", one.name])
    run([*words, "--run", two.name], 2)
    assert_close(two / "latest", one / "latest", rtol=1e-5, atol=1e-5)
    before = tensors(two / "latest")
    cut(two)
    run([*words, "--run", two.name], 2)
    after = tensors(two / "latest")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_quantised_base_is_refused_before_the_start(data: Path) -> None:
    words = ["run", "lm/qlora", *overrides("lm/qlora", data), "networks.model.adapter={type: loftq, r: 4, alpha: 8}"]
    words += ["--root", data / "refused"]
    printed = run(words, 2, expect=2, variables=ENGINES["fsdp2"])
    assert "networks.model: fsdp2 holds what is trained, or its state, in parts, and weights in nf4" in printed
    assert "Traceback" not in printed
    assert not (data / "refused").exists()
