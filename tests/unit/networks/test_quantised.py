"""Quantised bases: against their own dequantised weights, and against the arithmetic of their sizes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from scaletrain.config import NetworkSpec
from scaletrain.errors import UserError
from scaletrain.networks.build import build, outline, save
from scaletrain.networks.quantised import check, dequantised
from tests.unit.networks.test_adapters import BERT, GPT2, LLAMA, logits, new

pytest.importorskip("bitsandbytes")

LARGER = {"hidden_size": 64, "intermediate_size": 128}
NETWORKS = {
    "causal_lm": {**LLAMA, **LARGER, "tie_word_embeddings": True},
    "text_classifier": {**BERT, **LARGER},
    "gpt2": {**GPT2, "n_embd": 64},
}
DOUBLE = {"type": "nf4", "double": True, "compute": "bfloat16"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("networks")
    for name, config in NETWORKS.items():
        new(config).save_pretrained(path / name)
    return path


def spec_of(folder: Path, name: str, **keys: Any) -> NetworkSpec:
    kind = "causal_lm" if name == "gpt2" else name
    config = {"num_labels": 3} if kind == "text_classifier" else {}
    return NetworkSpec.model_validate({"type": kind, "path": str(folder / name), "config": config, **keys})


def quantised(module: nn.Module) -> dict[str, Any]:
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    return {name: part for name, part in module.named_modules() if isinstance(part, (Linear4bit, Linear8bitLt))}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("how", ["nf4", "fp4", "int8", DOUBLE], ids=str)
def test_computes_with_the_weights_that_it_stands_for(name: str, how: Any, folder: Path) -> None:
    spec = spec_of(folder, name, quantize=how, frozen=True)
    module = build("model", spec).eval()
    found = quantised(module)
    assert len(found) == {"causal_lm": 14, "text_classifier": 13, "gpt2": 8}[name]  # without head and classifier
    plain = dequantised(build("model", spec)).eval()
    assert not quantised(plain)
    full = build("model", spec_of(folder, name)).eval()
    assert plain.state_dict().keys() == full.state_dict().keys()
    assert all(value.shape == full.state_dict()[key].shape for key, value in plain.state_dict().items())
    exact = logits(full)
    scale = exact.abs().max()
    close = 0.02 if how in ("int8", DOUBLE) else 1e-5  # int8 quantises inputs, too; bf16 rounds
    assert (logits(module) - logits(plain)).abs().max() < close * scale
    assert 1e-4 * scale < (logits(plain) - exact).abs().max() < 0.5 * scale


@pytest.mark.parametrize("type_", ["lora", "dora", "loftq", "vera", "ia3", "prompt"])
@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_adapters_are_trained_over_it_and_saved(type_: str, how: str, folder: Path, tmp_path: Path) -> None:
    if (type_, how) == ("dora", "int8"):
        return
    spec = spec_of(folder, "causal_lm", quantize=how, adapter={"type": type_})
    torch.manual_seed(0)
    module = build("model", spec)
    logits(module.eval())  # an evaluation leaves the weights such that gradients go through them
    ids = torch.arange(8)[None]
    module.train()(input_ids=ids).logits.square().sum().backward()
    trained = [p for p in module.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 and p.grad is not None for p in trained)
    with torch.no_grad():
        for p in trained:
            p.add_(torch.randn_like(p) * 0.1)
    save(module, spec, tmp_path)
    again = build("model", spec, None, tmp_path)
    assert torch.equal(logits(again.eval()), logits(module.eval()))


def test_loftq_makes_up_for_quantisation(folder: Path) -> None:
    exact = new(NETWORKS["causal_lm"]).get_submodule("model.layers.0.mlp.up_proj").weight.detach()
    spec = spec_of(folder, "causal_lm", quantize="nf4", adapter={"type": "loftq", "r": 8, "alpha": 4})
    layer: Any = build("model", spec).get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    held = dequantised(nn.Sequential(layer.base_layer))[0].weight  # type: ignore[index]
    lost = torch.linalg.svdvals(exact - held)
    left = exact - held - 4 / 8 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(left.norm(), lost[8:].norm())  # Eckart and Young: nothing of rank 8 leaves less


def test_the_warning_of_every_product_in_8_bits_is_silent(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        logits(build("model", spec_of(folder, "causal_lm", quantize="int8", frozen=True)))
    assert "inputs will be cast" not in caplog.text


def test_what_is_skipped(folder: Path) -> None:
    how = {"type": "nf4", "skip": ["pooler", "intermediate"]}
    adapter = {"type": "lora", "train_also": ["query"]}
    module = build("model", spec_of(folder, "text_classifier", quantize=how, adapter=adapter))
    assert not any(word in name for name in quantised(module) for word in ("pooler", "intermediate", "query"))
    assert len(quantised(module)) == 13 - 1 - 2 - 2
    with pytest.raises(UserError, match=r"quantize.skip: no linear module is in a `poler`. Did you mean `pooler`"):
        build("model", spec_of(folder, "text_classifier", quantize={"type": "nf4", "skip": ["poler"]}, frozen=True))


@pytest.mark.parametrize("how", ["nf4", "int8", DOUBLE], ids=str)
@pytest.mark.parametrize("type_", ["lora", "dora", "ia3"])
def test_an_outline_takes_the_bytes_of_the_network(how: Any, type_: str, folder: Path) -> None:
    if (type_, how) == ("dora", "int8"):
        return
    spec = spec_of(folder, "causal_lm", quantize=how, adapter={"type": type_})
    real, empty = build("model", spec), outline("model", spec)
    first, second = ({n: (p.shape, p.dtype, p.requires_grad) for n, p in m.named_parameters()} for m in (real, empty))
    assert first == second
    scales = sum(b.numel() * b.element_size() for n, b in empty.named_buffers() if "scales_" in n)
    number = sum(part.in_features * part.out_features for part in quantised(real).values())
    expected = {"nf4": number / 64 * 4, "int8": 4 * sum(p.out_features for p in quantised(real).values())}
    if isinstance(how, str):
        assert scales == expected[how]
    else:
        assert number / 64 <= scales < number / 64 * 1.1  # a matrix here has fewer scales than share one


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, r"weights in nf4 cannot be trained, which full finetuning does"),
        ({"trainable": "lm_head"}, r"cannot be trained"),
        ({"adapter": {"type": "pissa"}}, r"pissa changes weights, which are quantised: take loftq"),
        ({"adapter": {"merge": ["a"]}}, r"cannot be folded into weights in nf4"),
        ({"frozen": True, "dtype": "bfloat16"}, r"say networks.model.quantize.compute=bfloat16"),
        ({"frozen": True, "path": None}, r"is for pretrained weights"),
        ({"frozen": True, "path": None, "from": "run:a/model"}, r"what comes by `from` is held as it was there"),
        ({"from": "stage:a/model", "adapter": {"type": "loftq"}}, r"export that network"),
        ({"frozen": True, "shard": True}, r"are held whole"),
        ({"quantize": None, "adapter": {"type": "loftq"}}, r"loftq makes up for quantisation"),
        ({"quantize": "int8", "adapter": {"type": "dora"}}, r"take nf4"),
    ],
)
def test_what_cannot_be_quantised(keys: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(UserError, match=message):
        check(spec_of(folder, "causal_lm", **{"quantize": "nf4", **keys}), "networks.model")


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr("scaletrain.networks.quantised.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'scaletrain\[quant\]'"):
        check(spec_of(folder, "causal_lm", quantize="nf4", frozen=True), "networks.model")


@pytest.mark.parametrize(
    ("name", "how", "adapter"),
    [
        ("causal_lm", "nf4", {"type": "lora"}),
        ("causal_lm", "nf4", {"type": "dora"}),
        ("gpt2", "int8", {"type": "ia3"}),
        ("text_classifier", DOUBLE, {"type": "lora", "train_also": ["query"]}),
        ("causal_lm", "int8", None),
    ],
    ids=str,
)
def test_what_goes_on_without_the_adapter_is_in_float(
    name: str, how: Any, adapter: Any, folder: Path, tmp_path: Path
) -> None:
    spec = spec_of(folder, name, quantize=how, adapter=adapter, frozen=adapter is None)
    module = build("model", spec)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    save(module, spec, tmp_path / "adapter")
    plain = dequantised(build("model", spec_of(folder, name, quantize=how, frozen=True)))
    if adapter:
        plain = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    expected = logits(plain.eval())
    onward = NetworkSpec.model_validate({"type": spec.type, "config": spec.config, "from": "stage:a/model"})
    hollow = outline("model", onward, outline("model", spec))
    state = torch.get_rng_state()
    found = build("model", onward, module)
    assert torch.equal(torch.get_rng_state(), state)
    shapes = [{n: (p.shape, p.dtype, p.requires_grad) for n, p in m.named_parameters()} for m in (found, hollow)]
    assert shapes[0] == shapes[1]
    assert all(p.requires_grad and p.dtype == torch.float32 for p in found.parameters())
    torch.testing.assert_close(logits(found.eval()), expected, rtol=1e-4, atol=1e-5)
    save(found, onward, tmp_path / "whole")
    assert torch.equal(logits(build("model", onward, None, tmp_path / "whole").eval()), logits(found))
