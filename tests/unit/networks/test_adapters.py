"""Adapters against peft's own loader and against the arithmetic of LoRA."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from scaletrain.config import AdapterSpec, NetworkSpec
from scaletrain.errors import UserError
from scaletrain.networks import causal_lm, text_classifier
from scaletrain.networks.adapters import add_adapter, load_adapter
from scaletrain.networks.build import build, save

LLAMA = {
    "model_type": "llama", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
BERT = {**LLAMA, "model_type": "bert", "num_labels": 3}
GPT2 = {"model_type": "gpt2", "vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
IDS = torch.arange(12)[None] % 40


def new(config: dict[str, Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    factory = text_classifier if config["model_type"] == "bert" else causal_lm
    return factory.build(factory.Config(**config)).eval()


def stirred(module: Any, spec: AdapterSpec) -> Any:
    """An adapter whose B is not 0, as after training."""
    adapted = add_adapter(module, spec).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return adapted


def logits(module: Any) -> torch.Tensor:
    with torch.no_grad():
        return module(input_ids=IDS).logits


def test_output_is_unchanged_at_first_and_only_the_adapter_is_trained() -> None:
    module = new(LLAMA)
    before = logits(module)
    adapted = add_adapter(module, AdapterSpec(r=4)).eval()
    assert torch.equal(logits(adapted), before)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert len(trained) == 2 * 2 * 7  # A and B, two blocks, q k v o gate up down


@pytest.mark.parametrize(("type_", "scale"), [("lora", 12 / 4), ("rslora", 12 / 2)])
def test_scale(type_: str, scale: float) -> None:
    adapted = stirred(new(LLAMA), AdapterSpec(type=type_, r=4, alpha=12, targets=["q_proj"]))
    layer = adapted.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    x = torch.randn(3, 16)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(layer(x), x @ layer.base_layer.weight.T + scale * x @ a.T @ b.T)


@pytest.mark.parametrize("config", [LLAMA, {**LLAMA, "tie_word_embeddings": True}, GPT2, BERT], ids=str)
@pytest.mark.parametrize("type_", ["lora", "dora"])
def test_plain_peft_loads_what_is_saved(config: dict[str, Any], type_: str, tmp_path: Path) -> None:
    adapted = stirred(new(config), AdapterSpec(type=type_, r=4))
    save(adapted, NetworkSpec(), tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(new(config), str(tmp_path)).eval()), logits(adapted))
    again = load_adapter(new(config), tmp_path).eval()
    assert torch.equal(logits(again), logits(adapted))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in adapted.named_parameters() if p.requires_grad
    }


def test_transformers_loads_the_adapter_over_its_base(tmp_path: Path) -> None:
    new(LLAMA).save_pretrained(tmp_path / "base")
    base = causal_lm.load(str(tmp_path / "base"), causal_lm.Config(), torch.float32).eval()
    adapted = stirred(base, AdapterSpec(r=4))
    save(adapted, NetworkSpec(), tmp_path / "adapter")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()), logits(adapted))
    before = logits(adapted)
    merged = build("model", NetworkSpec(type="causal_lm"), base=adapted).eval()
    assert isinstance(merged, LlamaForCausalLM)
    torch.testing.assert_close(logits(merged), before)


def test_the_head_of_a_classifier_is_trained_and_saved(tmp_path: Path) -> None:
    new(BERT).save_pretrained(tmp_path / "base")
    config = text_classifier.Config(num_labels=3)
    adapted = stirred(text_classifier.load(str(tmp_path / "base"), config, torch.float32).eval(), AdapterSpec(r=4))
    assert any("classifier" in n for n, p in adapted.named_parameters() if p.requires_grad)
    save(adapted, NetworkSpec(), tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3).eval()
    assert torch.equal(logits(loaded), logits(adapted))


def test_train_also_on_tied_embeddings_keeps_the_tie(tmp_path: Path) -> None:
    config = {**LLAMA, "tie_word_embeddings": True}
    adapted = stirred(new(config), AdapterSpec(r=4, train_also=["embed_tokens"]))
    assert torch.equal(adapted.get_input_embeddings().weight, adapted.get_output_embeddings().weight)
    save(adapted, NetworkSpec(), tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(new(config), str(tmp_path)).eval()), logits(adapted))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"targets": ["q_proj", "v_prj"]}, "adapter.targets: no module is called `v_prj`. Did you mean `v_proj`"),
        ({"targets": r".*\.query"}, "There are .*`q_proj`"),
        ({"targets": "(("}, "no regular expression"),
        ({"targets": []}, "empty"),
        ({"train_also": ["score"]}, "adapter.train_also: no module is called `score`"),
    ],
)
def test_names_that_match_nothing(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_adapter(new(LLAMA), AdapterSpec(**spec))


def test_adapter_of_another_network(tmp_path: Path) -> None:
    save(stirred(new(LLAMA), AdapterSpec(r=4)), NetworkSpec(), tmp_path)
    with pytest.raises(UserError, match=r"does not fit"):
        load_adapter(new({**LLAMA, "hidden_size": 32}), tmp_path)
    with pytest.raises(UserError, match=r"does not fit"):
        load_adapter(new({**LLAMA, "num_hidden_layers": 1}), tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_whole_networks_round_trip(tied: bool, tmp_path: Path) -> None:
    module = new({**LLAMA, "tie_word_embeddings": tied})
    save(module, NetworkSpec(type="causal_lm"), tmp_path)
    loaded = causal_lm.load(str(tmp_path), causal_lm.Config(), torch.float32).eval()
    assert torch.equal(logits(loaded), logits(module))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(module))


def test_network_messages(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"llama has no setting `hiden_size`. Did you mean `hidden_size`"):
        causal_lm.Config(model_type="llama", hiden_size=3)
    with pytest.raises(ValueError, match=r"no `lama`. Did you mean `llama`"):
        causal_lm.Config(model_type="lama")
    with pytest.raises(UserError, match=r"not a multiple"):
        causal_lm.build(causal_lm.Config(model_type="llama", hidden_size=10, num_attention_heads=3))
    with pytest.raises(UserError, match=r"there is no folder"):
        causal_lm.load(str(tmp_path / "nothing"), causal_lm.Config(), torch.float32)
    with pytest.raises(UserError, match=r"no config.json"):
        causal_lm.load(str(tmp_path), causal_lm.Config(), torch.float32)
    new(BERT).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"lacks weights of a BertLMHeadModel"):
        causal_lm.load(str(tmp_path), causal_lm.Config(), torch.float32)
    with pytest.raises(UserError, match=r"bert has no setting"):
        text_classifier.load(str(tmp_path), text_classifier.Config(depth=3), torch.float32)


def test_a_head_of_other_classes_is_new_and_a_function_of_the_seed(tmp_path: Path) -> None:
    new(BERT).save_pretrained(tmp_path)
    heads = []
    for _ in range(2):
        torch.manual_seed(5)
        module: Any = text_classifier.load(str(tmp_path), text_classifier.Config(num_labels=5), torch.float32)
        heads.append(module.classifier.weight)
    assert heads[0].shape == (5, 16)
    assert torch.equal(*heads)
    assert torch.equal(
        module.bert.encoder.layer[0].output.dense.weight, new(BERT).bert.encoder.layer[0].output.dense.weight
    )
    same = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    kept: Any = text_classifier.load(str(tmp_path), text_classifier.Config(num_labels=3), torch.float32)
    assert torch.equal(kept.classifier.weight, same.classifier.weight)


def test_dtype_and_attention(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"})).save_pretrained(tmp_path)
    module: Any = causal_lm.load(str(tmp_path), causal_lm.Config(), torch.bfloat16)
    assert module.dtype == torch.bfloat16
    assert module.config._attn_implementation == "sdpa"
    adapted = add_adapter(module, AdapterSpec(r=4))
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
