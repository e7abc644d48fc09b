"""Packs in the architectures that people train: each sample's logits are those that it has alone, and nothing leaks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from scaletrain.errors import UserError
from scaletrain.networks import causal_lm
from scaletrain.objectives.causal_lm import check_attention, forward

SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {"model_type": "llama", "intermediate_size": 32, "max_position_embeddings": 64, **SIZES}
GROUPED = {**LLAMA, "num_key_value_heads": 1}
WINDOWED = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA = {**GROUPED, **WINDOWED, "head_dim": 16}
NETWORKS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen2": {**GROUPED, "model_type": "qwen2", **WINDOWED, "use_sliding_window": True},
    "qwen3": {**GROUPED, "model_type": "qwen3", "head_dim": 16},
    "mistral": {**GROUPED, "model_type": "mistral", "sliding_window": 4, "head_dim": 16},
    "gpt2": {"model_type": "gpt2", "n_positions": 64, "bos_token_id": 0, "eos_token_id": 1, **SIZES},
    "gemma2": {**GEMMA, "model_type": "gemma2", "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0},
    "gemma3": {**GEMMA, "model_type": "gemma3_text"},
}
ATTENTION = ("sdpa", "eager", "flex_attention")
WITHOUT = {
    ("gemma2", "sdpa"): "torch's attention has no cap on the scores; by default gemma2 is given eager attention",
    ("gpt2", "flex_attention"): "transformers' GPT-2 does not take it",
}
LENGTHS = ((7, 5, 9), (12, 6, 2))
"""Samples of each pack: longer than a window, and shorter. The first pack has a place more than the second."""


@contextmanager
def unfused() -> Iterator[None]:
    """Have flex attention, which torch compiles for GPUs, run operation by operation."""
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without")
        yield


def network(name: str, attention: str) -> Any:
    torch.manual_seed(0)
    options = {**NETWORKS[name], "attn_implementation": attention}
    module = causal_lm.build(causal_lm.Config(**options))
    assert module.config._attn_implementation == attention
    with torch.no_grad():  # large weights, so that a leak would be seen
        for p in module.parameters():
            p.normal_(0, 0.3)
    return module.eval()


def packs() -> tuple[Tensor, Tensor, list[tuple[int, slice]]]:
    """Return ids (B, T), positions (B, T), and the pack and the places of each sample."""
    torch.manual_seed(1)
    width = max(map(sum, LENGTHS))
    ids, positions, samples = torch.randint(0, 300, (len(LENGTHS), width)), torch.zeros(len(LENGTHS), width), []
    for pack, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            samples.append((pack, slice(start, start + length)))
            positions[pack, start : start + length] = torch.arange(length)
            start += length
    return ids, positions.long(), samples


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", NETWORKS)
def test_packed_is_as_alone_and_nothing_leaks(name: str, attention: str) -> None:
    if (name, attention) in WITHOUT:
        pytest.skip(WITHOUT[name, attention])
    module = network(name, attention)
    ids, positions, samples = packs()
    with unfused() if attention == "flex_attention" else nullcontext(), torch.no_grad():
        check_attention(module, {"input_ids": ids}, packed=True)
        together = forward(module, ids, positions)
        for pack, places in samples:
            alone = forward(module, ids[pack : pack + 1, places], None)[0]
            torch.testing.assert_close(together[pack, places], alone, rtol=1e-5, atol=1e-5)
        for pack, places in samples:
            changed = ids.clone()
            changed[pack, places] = (changed[pack, places] + 1) % 300
            again = forward(module, changed, positions)
            for other, at in samples:
                same = torch.equal(again[other, at], together[other, at])
                assert same == ((other, at) != (pack, places))


def test_a_window_and_a_cap_are_seen() -> None:
    """What the comparison above is worth: both change the logits of its samples."""
    ids, _, _ = packs()
    for name, changes in {
        "mistral": {"sliding_window": 64},
        "gemma2": {"attn_logit_softcapping": 100.0},
        "gemma3": {"sliding_window": 64},
        "qwen2": {"sliding_window": 64},
    }.items():
        usual = network(name, "eager")
        other = causal_lm.build(
            causal_lm.Config(**{**NETWORKS[name], **changes, "attn_implementation": "eager"})
        ).eval()
        other.load_state_dict(usual.state_dict())
        with torch.no_grad():
            assert not torch.allclose(forward(usual, ids, None), forward(other, ids, None), atol=1e-3)


def test_gemma2_is_given_attention_with_its_cap() -> None:
    config = causal_lm.Config(**NETWORKS["gemma2"])
    assert causal_lm.build(config).config._attn_implementation == "eager"
    assert causal_lm.build(causal_lm.Config(**GROUPED)).config._attn_implementation == "sdpa"


def test_attention_that_an_architecture_does_not_take() -> None:
    with pytest.raises(UserError, match=r"GPT2LMHeadModel does not support .* flex_attention"):
        network("gpt2", "flex_attention")


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mamba", "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
        {"model_type": "bloom", "vocab_size": 300, "hidden_size": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0},
    ],
    ids=["mamba", "bloom"],
)
def test_refused(config: dict[str, Any]) -> None:
    """State-space layers, and positions that are distances within the sequence (ALiBi)."""
    torch.manual_seed(0)
    module = causal_lm.build(causal_lm.Config(**config)).eval()
    ids, _, _ = packs()
    check_attention(module, {"input_ids": ids}, packed=False)
    with pytest.raises(UserError, match=r"data.packing: the samples of a pack would see each other"):
        check_attention(module, {"input_ids": ids}, packed=True)
