"""A network written from a copy of its weights, while it is trained on: the same files in every library's layout."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from scaletrain.checkpoint.background import HostCopies
from scaletrain.config import AdapterSpec, NetworkSpec
from scaletrain.engine.data_parallel import DataParallel
from scaletrain.engine.world import World
from scaletrain.errors import UserError
from scaletrain.networks.build import build, outline, save
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


@pytest.mark.parametrize("make", [build, outline])
def test_only_what_is_named_is_trained(make: Callable[..., nn.Module]) -> None:
    config = {"features": 8}
    whole = make("critic", NetworkSpec(type="dcgan_critic", config=config))
    names = [name for name, _ in whole.named_parameters()]
    last = names[-1].rpartition(".")[0]
    spec = NetworkSpec(type="dcgan_critic", config=config, trainable=[rf"^{re.escape(last)}\.", "bias$"])
    trained = {name for name, p in make("critic", spec).named_parameters() if p.requires_grad}
    assert trained == {name for name in names if name.startswith(f"{last}.") or name.endswith("bias")}
    assert 0 < len(trained) < len(names)


@pytest.mark.parametrize(
    ("words", "message"),
    [("hed", r"`hed` is in no parameter's name. There are `.*weight`"), (["weight", "(("], r"`\(\(` is no regular")],
)
def test_names_of_what_is_trained_that_match_nothing(words: str | list[str], message: str) -> None:
    with pytest.raises(UserError, match=rf"networks.critic.trainable: {message}"):
        build("critic", NetworkSpec(type="dcgan_critic", config={"features": 8}, trainable=words))


CODE = """
import pathlib
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pathlib.Path(__file__).parent  # code that runs
open({ran!r}, "w").close()


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_weights_runs_only_when_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, ran = tmp_path / "own", tmp_path / "ran"
    folder.mkdir()
    size = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=2)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE.format(ran=str(ran)))
    spec = NetworkSpec(type="causal_lm", path=str(folder))
    with pytest.raises(UserError, match=r"needs code of its own.*`trust_remote_code: true`"):
        build("model", spec)
    assert not ran.exists()
    module = build("model", spec.model_copy(update={"trust_remote_code": True}))
    assert type(module).__name__ == "OwnModel"
    assert ran.exists()
