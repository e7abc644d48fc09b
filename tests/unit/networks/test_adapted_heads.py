"""Adapters over networks with other heads than a causal one: read back by peft alone, with the same logits."""

from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForTokenClassification, PeftModel
from transformers import AutoModelForSeq2SeqLM

from scaletrain.config import AdapterSpec, NetworkSpec
from scaletrain.networks.build import build, save

LORA = AdapterSpec(r=2)
BERT = {
    "model_type": "bert", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 32, "num_labels": 3,
}  # fmt: skip
T5 = {"model_type": "t5", "vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
IDS = torch.arange(1, 9)[None]


def adapted(kind: str, config: dict[str, Any], folder: Path) -> tuple[Any, NetworkSpec]:
    """Write a base network; return an adapter over it whose B is not 0."""
    torch.manual_seed(0)
    build("model", NetworkSpec(type=kind, config=config)).save_pretrained(folder)  # type: ignore[operator]
    spec = NetworkSpec(type=kind, path=str(folder), config={}, adapter=LORA)
    module: Any = build("model", spec).eval()
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return module, spec


def test_a_tagger_trains_its_head_whole(tmp_path: Path) -> None:
    module, spec = adapted("token_classifier", BERT, tmp_path / "base")
    assert module.peft_config["default"].task_type == "TOKEN_CLS"
    trained = [name for name, p in module.named_parameters() if p.requires_grad and "lora_" not in name]
    assert {name.split(".modules_to_save")[0] for name in trained} == {"base_model.model.classifier"}
    save(module, spec, tmp_path / "adapter")
    plain = AutoPeftModelForTokenClassification.from_pretrained(tmp_path / "adapter", num_labels=3).eval()
    again = build("model", spec, saved=tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = module(IDS).logits
        assert torch.equal(plain(IDS).logits, expected)
        assert torch.equal(again(IDS).logits, expected)


def test_an_encoder_decoder(tmp_path: Path) -> None:
    module, spec = adapted("seq2seq", T5, tmp_path / "base")
    assert module.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    save(module, spec, tmp_path / "adapter")
    plain = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    with torch.no_grad():
        expected = module(input_ids=IDS, decoder_input_ids=IDS[:, :3]).logits
        assert torch.equal(plain.eval()(input_ids=IDS, decoder_input_ids=IDS[:, :3]).logits, expected)
        ids = [m.generate(input_ids=IDS, max_new_tokens=4) for m in (module, plain)]
    assert torch.equal(*ids)
