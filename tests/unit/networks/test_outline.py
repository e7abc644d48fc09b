"""A network without its weights has everything else that the built one has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scaletrain.config import AdapterSpec, NetworkSpec
from scaletrain.networks.build import build, outline
from scaletrain.recipe import load
from scaletrain.runs import foresee
from tests.recipes.tiny import make_data, overrides

LLAMA = {"model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 2}
RECIPES = (
    "quickstart", "lm/pretrain", "lm/lora", "lm/dpo", "lm/kto", "text/classify", "text/regress", "text/tag",
    "text/distill", "encoder/roberta", "seq2seq/transformer", "vision/cnn", "vision/resnet18", "gan/dcgan",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


def described(module: nn.Module) -> dict[str, Any]:
    """What two networks must have in common: every name, in order, with shape, type and whether it is trained."""
    parameters = list(module.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    return {
        "class": type(module).__name__,
        "parameters": {n: (p.shape, p.dtype, p.requires_grad, first.setdefault(id(p), n)) for n, p in parameters},
        "order": [name for name, _ in module.named_parameters()],
        "buffers": {name: (b.shape, b.dtype) for name, b in module.named_buffers()},
        "state": list(module.state_dict()),
    }


def assert_alike(made: nn.Module, built: nn.Module) -> None:
    assert described(made) == described(built)
    assert {p.device.type for p in made.parameters()} == {"meta"}
    for (name, a), (_, b) in zip(made.named_buffers(), built.named_buffers(), strict=True):
        if "running" not in name and "batches" not in name:
            torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("recipe", RECIPES)
def test_networks_of_shipped_recipes(recipe: str, data: Path, tmp_path: Path) -> None:
    for _, _, _, specs, shelf in foresee(load(recipe, overrides(recipe, data)), tmp_path):
        for name, spec in specs.items():
            origin = spec
            while origin.source:
                origin = shelf.spec(origin.source)
            plain = spec.model_copy(update={"source": None, "type": origin.type, "config": origin.config})
            assert_alike(shelf.outline(name, spec), build(name, plain))


@pytest.mark.parametrize(
    "spec",
    [
        NetworkSpec(type="causal_lm", config={**LLAMA, "tie_word_embeddings": True}),
        NetworkSpec(type="causal_lm", config={**LLAMA, "tie_word_embeddings": True}, adapter=AdapterSpec(r=2)),
        NetworkSpec(type="causal_lm", config=LLAMA, adapter=AdapterSpec(type="dora", r=2, train_also=["lm_head"])),
        NetworkSpec(type="causal_lm", config=LLAMA, dtype="bfloat16", adapter=AdapterSpec(r=2)),
        NetworkSpec(type="causal_lm", config=LLAMA, dtype="bfloat16", frozen=True),
        NetworkSpec(type="causal_lm", config={**LLAMA, "model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 16}),
    ],
    ids=["tied", "tied lora", "dora", "bf16 lora", "frozen", "gpt2"],
)
def test_new(spec: NetworkSpec) -> None:
    if spec.config["model_type"] == "gpt2":
        own = {k: v for k, v in spec.config.items() if k.startswith("n_") or k in ("model_type", "vocab_size")}
        spec = spec.model_copy(update={"config": own})
    assert_alike(outline("model", spec), build("model", spec))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", [None, AdapterSpec(r=2)])
@pytest.mark.parametrize("kind", ["causal_lm", "text_classifier"])
def test_pretrained(kind: str, adapter: AdapterSpec | None, dtype: str, data: Path) -> None:
    path = str(data / ("llama" if kind == "causal_lm" else "bert"))
    config = {"num_labels": 3} if kind == "text_classifier" else {}
    spec = NetworkSpec(type=kind, path=path, config=config, adapter=adapter, dtype=dtype)
    assert_alike(outline("model", spec), build("model", spec))


def test_pretrained_with_tied_embeddings(tmp_path: Path) -> None:
    spec = NetworkSpec(type="causal_lm", config={**LLAMA, "tie_word_embeddings": True})
    build("model", spec).save_pretrained(tmp_path)
    there = NetworkSpec(type="causal_lm", path=str(tmp_path))
    made = outline("model", there)
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert_alike(made, build("model", there))


def test_no_weights_are_read(data: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((data / "llama" / "config.json").read_text())
    made = outline("model", NetworkSpec(type="causal_lm", path=str(tmp_path)))
    assert all(parameter.is_meta for parameter in made.parameters())


def test_continued_with_the_adapter_folded_in() -> None:
    spec = NetworkSpec(type="causal_lm", config=LLAMA, adapter=AdapterSpec(r=2))
    whole = NetworkSpec(type="causal_lm", config=LLAMA, source="stage:a/model")
    assert_alike(outline("model", whole, outline("model", spec)), build("model", whole, build("model", spec)))
    again = spec.model_copy(update={"source": "stage:a/model"})
    assert_alike(outline("model", again, outline("model", spec)), build("model", again, build("model", spec)))
