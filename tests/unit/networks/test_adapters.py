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
from scaletrain.networks.adapters import add_adapter, load_adapter, merge_adapter
from scaletrain.networks.build import build, own_base, save

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


TYPES = [
    {"type": "lora", "r": 4}, {"type": "rslora", "r": 4}, {"type": "dora", "r": 4}, {"type": "pissa", "r": 4},
    {"type": "pissa", "r": 4, "niter": 4}, {"type": "olora", "r": 4}, {"type": "vera", "r": 8}, {"type": "ia3"},
    {"type": "prompt", "virtual_tokens": 3},
]  # fmt: skip
IN_PARTS = ("pissa", "olora")


@pytest.mark.parametrize("config", [LLAMA, {**LLAMA, "tie_word_embeddings": True}, GPT2, BERT], ids=str)
@pytest.mark.parametrize("options", TYPES, ids=str)
def test_plain_peft_loads_what_is_saved(config: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    spec, prompt = AdapterSpec(**options), options["type"] == "prompt"
    if config is GPT2 and spec.type == "olora":
        with pytest.raises(UserError, match=r"olora cannot take a part of `transformer.h.0.attn.c_attn`, a Conv1D"):
            add_adapter(new(config), spec)
        return
    before = logits(new(config))
    if not prompt:
        torch.testing.assert_close(logits(add_adapter(new(config), spec).eval()), before, rtol=1e-5, atol=1e-6)
    adapted = stirred(new(config), spec)
    expected = logits(adapted)
    assert expected.shape == before.shape
    assert not torch.allclose(expected, before, atol=1e-4)
    for _ in range(2):  # the first leaves it as it is
        save(adapted, NetworkSpec(), tmp_path)
    torch.manual_seed(7)
    plain = logits(PeftModel.from_pretrained(new(config), str(tmp_path)).eval())
    if spec.type in IN_PARTS:  # B A - B0 A0 over W, in place of B A over W - B0 A0
        torch.testing.assert_close(plain, expected, rtol=1e-5, atol=5e-6)
    else:  # where logits are a text's, those of virtual tokens come before
        assert torch.equal(plain[:, -expected.shape[1] :] if prompt else plain, expected)
    again = load_adapter(new(config), tmp_path, spec).eval()
    assert torch.equal(logits(again), expected)
    first, second = adapted.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())  # the base, too, bit for bit
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in adapted.named_parameters() if p.requires_grad
    }


def test_pissa_begins_with_the_largest_singular_vectors() -> None:
    whole = new(LLAMA).get_submodule("model.layers.0.mlp.up_proj").weight.detach()
    spec = AdapterSpec(type="pissa", r=4, alpha=2, targets=["up_proj"])
    layer: Any = add_adapter(new(LLAMA), spec).get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    u, s, v = torch.linalg.svd(whole)
    main = u[:, :4] * s[:4] @ v[:4]
    product = 2 / 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(product, main, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.base_layer.weight, whole - main, rtol=1e-5, atol=1e-6)


def test_pissa_that_goes_on_is_read_over_what_is_left_of_the_weights(tmp_path: Path) -> None:
    """A second stage goes on from the first one's network; its own checkpoint is read into that."""
    spec = NetworkSpec(type="causal_lm", adapter=AdapterSpec(type="pissa", r=4))
    assert spec.adapter
    first = stirred(new(LLAMA), spec.adapter)
    second = build("model", spec, first)
    with torch.no_grad():
        for parameter in second.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    save(second, spec, tmp_path)
    expected = logits(second)
    resumed = build("model", spec, stirred(new(LLAMA), spec.adapter), tmp_path).eval()
    assert torch.equal(logits(resumed), expected)


@pytest.mark.parametrize("options", [{"type": "lora", "r": 4}, {"type": "ia3"}, {"type": "pissa", "r": 4}], ids=str)
def test_adapters_are_gone_on_with_and_merged(options: dict[str, Any], tmp_path: Path) -> None:
    adapted = stirred(new(LLAMA), AdapterSpec(**options))
    save(adapted, NetworkSpec(), tmp_path / "adapter")
    gone_on = add_adapter(new(LLAMA), AdapterSpec(path=str(tmp_path / "adapter"))).eval()
    torch.testing.assert_close(logits(gone_on), logits(adapted), rtol=1e-5, atol=5e-6)
    assert any(p.requires_grad for p in gone_on.parameters())
    merged = merge_adapter(new(LLAMA), tmp_path / "adapter").eval()
    assert isinstance(merged, LlamaForCausalLM)
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-5, atol=5e-6)

    new(LLAMA).save_pretrained(tmp_path / "base")
    spec = NetworkSpec(
        type="causal_lm",
        path=str(tmp_path / "base"),
        adapter=AdapterSpec(r=2, merge=[str(tmp_path / "adapter")]),
    )
    torch.testing.assert_close(logits(build("model", spec).eval()), logits(merged))
    assert own_base("model", spec)


def test_adapters_of_other_networks_are_refused(tmp_path: Path) -> None:
    new(GPT2).save_pretrained(tmp_path / "gpt2")
    base = causal_lm.load(str(tmp_path / "gpt2"), causal_lm.Config(), torch.float32)
    save(add_adapter(base, AdapterSpec(r=4)), NetworkSpec(), tmp_path / "of-gpt2")
    for key in ("path", "merge"):
        spec = AdapterSpec(**{key: str(tmp_path / "of-gpt2") if key == "path" else [str(tmp_path / "of-gpt2")]})
        new(LLAMA).save_pretrained(tmp_path / "llama")
        with pytest.raises(UserError, match=r"was made for a gpt2 .*; this network is a llama"):
            build("model", NetworkSpec(type="causal_lm", path=str(tmp_path / "llama"), adapter=spec))
    with pytest.raises(UserError, match=r"holds no adapter_config.json"):
        add_adapter(new(LLAMA), AdapterSpec(path=str(tmp_path)))
    from peft import LoraConfig, get_peft_model

    other = get_peft_model(new(LLAMA), LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"))
    other.save_pretrained(tmp_path / "pissa")
    with pytest.raises(UserError, match=r"began with parts of the weights \(pissa\).*path_initial_model"):
        add_adapter(new(LLAMA), AdapterSpec(path=str(tmp_path / "pissa")))


# --- new tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_new_tokens_are_the_mean_and_are_trained(tied: bool, tmp_path: Path) -> None:
    config = {**LLAMA, "tie_word_embeddings": tied}
    new(config).save_pretrained(tmp_path / "base")
    before = new(config)
    spec = NetworkSpec(type="causal_lm", path=str(tmp_path / "base"), config={"vocab_size": 43})
    whole: Any = build("model", spec).eval()
    assert whole.config.vocab_size == 43
    for matrix, old in (
        (whole.get_input_embeddings().weight, before.get_input_embeddings().weight),
        (whole.get_output_embeddings().weight, before.get_output_embeddings().weight),
    ):
        assert matrix.shape == (43, 16)
        assert torch.equal(matrix[:40], old)
        torch.testing.assert_close(matrix[40:], old.mean(0).expand(3, -1))
    assert (whole.get_input_embeddings().weight is whole.get_output_embeddings().weight) == tied
    assert torch.equal(logits(whole)[..., :40], logits(before))

    adapter = spec.model_copy(update={"adapter": AdapterSpec(r=4)})
    adapted: Any = build("model", adapter).eval()
    ids = torch.arange(36, 43)[None]
    adapted(input_ids=ids).logits.square().sum().backward()
    rows = [p for n, p in adapted.named_parameters() if "trainable_tokens" in n and p.requires_grad]
    assert len(rows) == (1 if tied else 2)
    assert all(p.shape == (3, 16) and p.grad.abs().min() > 0 for p in rows)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
        expected = adapted(input_ids=ids).logits
        save(adapted, adapter, tmp_path / "adapter")
        again: Any = build("model", adapter, None, tmp_path / "adapter").eval()
        assert torch.equal(again(input_ids=ids).logits, expected)
        assert own_base("model", adapter)
        save(whole, spec, tmp_path / "larger")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "larger")
        loaded = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
        assert torch.equal(loaded(input_ids=ids).logits, expected)


def test_tokens_cannot_be_taken_away_nor_trained_by_all_types(tmp_path: Path) -> None:
    new(LLAMA).save_pretrained(tmp_path)
    spec = NetworkSpec(type="causal_lm", path=str(tmp_path), config={"vocab_size": 39})
    with pytest.raises(UserError, match=r"config.vocab_size is 39, and .* has 40 tokens: none can be taken away"):
        build("model", spec)
    more = {"config": {"vocab_size": 42}, "adapter": AdapterSpec(type="ia3")}
    with pytest.raises(UserError, match=r"ia3 cannot train the embeddings of new tokens: take lora"):
        build("model", spec.model_copy(update=more))


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
    torch.testing.assert_close(logits(loaded), logits(adapted), rtol=1e-5, atol=1e-6)  # ours is without padding


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
        ({"type": "ia3", "targets": ["k_proj"], "feedforward": ["down"]}, "adapter.feedforward: no module .* `down`"),
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
