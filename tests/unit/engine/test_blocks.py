"""Blocks are found by themselves in transformers, diffusers and our networks. Networks are on the meta device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scaletrain.engine.blocks import alone, blocks


def names(network: nn.Module, *classes: str) -> list[str]:
    return list(blocks(network, classes))


def numbered(prefix: str, count: int) -> list[str]:
    return [f"{prefix}.{number}" for number in range(count)]


def test_layers_of_transformers() -> None:
    import transformers as library

    with torch.device("meta"):
        llama = library.LlamaForCausalLM(library.LlamaConfig(num_hidden_layers=5))
        t5 = library.T5ForConditionalGeneration(library.T5Config())
        mixtral = library.MixtralForCausalLM(library.MixtralConfig(num_hidden_layers=2))
    assert names(llama) == numbered("model.layers", 5)
    assert names(t5) == [*numbered("encoder.block", 6), *numbered("decoder.block", 6)]
    assert names(mixtral) == numbered("model.layers", 2)  # each is most of the network, and its experts stay in it


def test_an_adapter_changes_no_block() -> None:
    import transformers as library
    from peft import LoraConfig, get_peft_model

    with torch.device("meta"):
        llama = library.LlamaForCausalLM(library.LlamaConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=64))
        adapted = get_peft_model(llama, LoraConfig(target_modules="all-linear"))
    assert names(adapted) == numbered("base_model.model.model.layers", 2)


def test_levels_of_diffusers_give_way_to_their_parts_where_they_are_large() -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(  # SDXL's
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
        )
    found = blocks(unet)
    assert [n for n in found if n.startswith("down")] == [
        "down_blocks.0",
        "down_blocks.1",
        *numbered("down_blocks.2.attentions", 2),
        *numbered("down_blocks.2.resnets", 2),
    ]
    total = sum(p.numel() for p in unet.parameters())
    sizes = [sum(p.numel() for p in block.parameters()) for block in found.values()]
    assert max(sizes) < 0.25 * total
    assert sum(sizes) > 0.98 * total


def test_our_networks() -> None:
    from scaletrain.networks import cnn, unet

    assert names(cnn.ResNet18(cnn.Config())) == numbered("blocks", 8)
    found = names(unet.UNet(unet.Config(features=[8, 16, 32])))
    assert found[:5] == ["halve.0", "halve.1", "down.0", "down.1", "down.2"]
    assert {"middle.blocks.0", "up.0", "up.1"} <= set(found)
    assert names(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == []


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 2)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))


def test_experts_belong_to_their_block() -> None:
    assert names(nn.ModuleDict({"layers": nn.ModuleList(Experts() for _ in range(2))})) == numbered("layers", 2)


def test_what_shares_weights_is_left_out() -> None:
    network = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(4, 4) for _ in range(8)), "head": nn.Linear(4, 4)})
    network["layers"][1].weight = network["layers"][3].weight
    network["head"].weight = network["layers"][0].weight
    assert names(network) == ["layers.2", *numbered("layers", 8)[4:]]
    network["layers"][5] = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    network["layers"][5]["a"].weight = network["layers"][5]["b"].weight
    assert alone(network["layers"][5], network)  # among its own parts it may


def test_blocks_of_a_class() -> None:
    network = nn.ModuleDict({"layers": nn.ModuleList(Experts() for _ in range(2)), "head": nn.Linear(4, 4)})
    assert names(network, "Linear") == [
        "layers.0.gate", "layers.0.experts.0", "layers.0.experts.1",
        "layers.1.gate", "layers.1.experts.0", "layers.1.experts.1", "head",
    ]  # fmt: skip
    assert names(network, "Experts", "Linear") == ["layers.0", "layers.1", "head"]
