"""Some layers of a pretrained network against the network itself, with its other layers taken out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from scaletrain.config import NetworkSpec
from scaletrain.errors import UserError
from scaletrain.networks.build import build, outline
from scaletrain.networks.unread import unread

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
KINDS: dict[str, Any] = {
    "bert": {"model_type": "bert", **SIZES},
    "distilbert": {"model_type": "distilbert", "dim": 16, "hidden_dim": 32, "n_layers": 4, "n_heads": 2},
    "llama": {"model_type": "llama", **SIZES},
}
LISTS = {"bert": "bert.encoder.layer", "distilbert": "distilbert.transformer.layer", "llama": "model.layers"}
IDS = torch.arange(2, 12)[None]


def pretrained(kind: str, folder: Path) -> Any:
    torch.manual_seed(0)
    spec = NetworkSpec(type="text_classifier", config={**KINDS[kind], "vocab_size": 32, "pad_token_id": 0})
    module: Any = build("model", spec).eval()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, 0.3)
    module.save_pretrained(folder)
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_those_of_the_network(kind: str, tmp_path: Path) -> None:
    whole = pretrained(kind, tmp_path / "whole")
    spec = NetworkSpec(type="text_classifier", path=str(tmp_path / "whole"), config={"layers": [1, 3]})
    module: Any = build("student", spec).eval()
    owner, _, name = LISTS[kind].rpartition(".")
    layers = getattr(whole.get_submodule(owner), name)
    setattr(whole.get_submodule(owner), name, nn.ModuleList([layers[1], layers[3]]))
    with torch.no_grad():
        assert torch.equal(module(IDS, use_cache=False).logits if kind == "llama" else module(IDS).logits,
                           whole(IDS, use_cache=False).logits if kind == "llama" else whole(IDS).logits)  # fmt: skip
    assert module.config.num_hidden_layers == 2
    # A student that was saved is read as it is, by the same description and by the library.
    module.save_pretrained(tmp_path / "student")
    again = build("student", spec, saved=tmp_path / "student").eval()
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    for other in (again, plain):
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), module.parameters(), strict=True))
    empty = outline("student", spec)
    assert {k: p.shape for k, p in empty.named_parameters()} == {k: p.shape for k, p in module.named_parameters()}
    # In the files of the whole network, other layers have these names: each process cannot read its part.
    assert unread("student", spec) is None
    assert unread("student", spec, tmp_path / "student") is not None


def test_layers_that_are_not_there_are_refused(tmp_path: Path) -> None:
    pretrained("bert", tmp_path)
    for layers, message in (([1, 4], "has 4 layers, 0 to 3; there is no 4"), ([1, 1], "each larger"), ([], "each")):
        spec = NetworkSpec(type="text_classifier", path=str(tmp_path), config={"layers": layers})
        with pytest.raises(UserError, match=message):
            build("student", spec)
    with pytest.raises(UserError, match="none to choose from in a new network"):
        build("student", NetworkSpec(type="text_classifier", config={**KINDS["bert"], "layers": [0]}))
