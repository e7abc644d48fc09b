"""A network written from a copy of its weights, while it is trained on: the same files in every library's layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from scaletrain.checkpoint.background import HostCopies
from scaletrain.config import AdapterSpec, NetworkSpec
from scaletrain.engine.data_parallel import DataParallel
from scaletrain.engine.world import World
from scaletrain.networks.build import build, save
from scaletrain.snapshot import _parts

LLAMA = {"model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 2}


def diffusers(spec: NetworkSpec) -> nn.Module:
    library = pytest.importorskip("diffusers")
    return library.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), norm_num_groups=4,
    )  # fmt: skip


def ours(spec: NetworkSpec) -> nn.Module:
    return build("model", spec)


CASES: dict[str, tuple[NetworkSpec, Callable[[NetworkSpec], nn.Module]]] = {
    "own": (NetworkSpec(type="cnn", config={"architecture": "resnet18", "features": 8}), ours),
    "transformers": (NetworkSpec(type="causal_lm", config=LLAMA), ours),
    "tied": (NetworkSpec(type="causal_lm", config={**LLAMA, "tie_word_embeddings": True}), ours),
    "peft": (NetworkSpec(type="causal_lm", config=LLAMA, adapter=AdapterSpec(r=2, train_also=["lm_head"])), ours),
    "diffusers": (NetworkSpec(), diffusers),
}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("case", CASES)
def test_written_from_a_copy_while_it_is_trained_on(case: str, tmp_path: Path) -> None:
    spec, make = CASES[case]
    torch.manual_seed(0)
    module = make(spec)
    save(module, spec, tmp_path / "live")
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    engine = DataParallel(World(torch.device("cpu")), "fp32")
    changing, fixed = _parts(module, spec, {id(p) for p in trained.values()}, engine)
    if spec.adapter:
        assert changing.keys() == trained.keys()  # and nothing of the base
    copies = HostCopies().take({"a": {name: part.gather() for name, part in changing.items()}})["a"]
    with torch.no_grad():
        for tensor in (*trained.values(), *module.buffers()):
            tensor.add_(1)
    save(module, spec, tmp_path / "copy", {**fixed, **copies})
    assert files(tmp_path / "copy") == files(tmp_path / "live")
    save(module, spec, tmp_path / "later")
    assert files(tmp_path / "later") != files(tmp_path / "live")
