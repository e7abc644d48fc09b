"""Classifiers without padding against the library's own, over padded batches, in double precision."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scaletrain.config import AdapterSpec, TrainSpec
from scaletrain.engine import savers
from scaletrain.networks import _unpadded, text_classifier
from scaletrain.networks._unpadded import FAMILIES, Unpadded, dropped, unpadded
from scaletrain.networks.adapters import add_adapter

SIZES = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "max_position_embeddings": 40, "num_labels": 3,
}  # fmt: skip
TYPES = ["bert", "camembert", "electra", "roberta", "xlm-roberta"]
LENGTHS = [5, 12, 2, 9, 9, 1, 3, 12, 7, 4, 11]


@pytest.fixture(autouse=True)
def small_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grids of 4 texts: the last has fewer."""
    monkeypatch.setattr(_unpadded, "TEXTS", 4)


def padded(model_type: str = "bert") -> Any:
    """The library's network, with large weights."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    settings = text_classifier.new_config(text_classifier.Config(model_type=model_type, **SIZES))
    module = AutoModelForSequenceClassification.from_config(settings).double()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, 0.3)
    return module.eval()


def batch(lengths: list[int] = LENGTHS, fill: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(1)
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, 50, real.shape).where(real, fill)
    return {"input_ids": ids, "attention_mask": real.long()}


def loss_of(module: Any, **inputs: Tensor) -> Tensor:
    logits = module(**inputs).logits
    return F.cross_entropy(logits, torch.arange(len(logits)) % 3, reduction="sum")


def gradients(module: Any, **inputs: Tensor) -> dict[str, Tensor]:
    loss_of(module, **inputs).backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], error: float = 1e-11) -> None:
    assert ours.keys() == theirs.keys()
    scale = max(float(t.abs().max()) for t in theirs.values())
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=error * scale, msg=name)


def layer_rows(module: Any) -> list[int]:
    """Count the rows that the feed-forward part of each layer is given in a call."""
    seen: list[int] = []
    for layer in module.base_model.encoder.layer:
        layer.intermediate.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[:-1].numel()))
    return seen


@pytest.mark.parametrize("model_type", TYPES)
def test_logits_and_gradients_are_those_of_the_padded_network(model_type: str) -> None:
    theirs = padded(model_type)
    ours = unpadded(copy.deepcopy(theirs))
    assert type(theirs).__name__ in FAMILIES
    assert issubclass(type(ours), Unpadded)
    assert type(ours).__name__ == type(theirs).__name__
    inputs = batch()
    ours(**inputs)  # compares
    rows = layer_rows(ours)
    torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, rtol=0, atol=1e-11)
    assert rows == [sum(LENGTHS), sum(LENGTHS), len(LENGTHS)]
    assert_same(gradients(ours, **inputs), gradients(theirs, **inputs))


def test_every_family_is_tried() -> None:
    assert {type(padded(name)).__name__ for name in TYPES} == FAMILIES


@pytest.mark.parametrize("lengths", [[6, 6, 6], [7], [3, 8]])
def test_batches_without_padding_and_of_one_grid(lengths: list[int]) -> None:
    theirs, inputs = padded(), batch(lengths)
    ours = unpadded(copy.deepcopy(theirs))
    assert_same(gradients(ours, **inputs), gradients(theirs, **inputs))


def test_grids_with_dropout_attend_as_those_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_unpadded, "dropped", lambda x, p: x)
    theirs, inputs = padded(), batch()
    ours = unpadded(copy.deepcopy(theirs)).train()
    assert_same(gradients(ours, **inputs), gradients(theirs, **inputs))


def test_a_network_that_computes_otherwise_stays_padded(caplog: pytest.LogCaptureFixture) -> None:
    theirs, inputs = padded(), batch()
    ours = unpadded(copy.deepcopy(theirs))
    for module in (ours, theirs):  # a layer that is not as ours has it
        module.bert.encoder.layer[0].attention.register_forward_hook(lambda m, args, out: (out[0] * 2, out[1]))
    ours.train()
    ours(**inputs)
    assert ours.packs is False
    assert all(module.training for module in ours.modules())
    assert "stay padded" in caplog.text
    assert_same(gradients(ours.eval(), **inputs), gradients(theirs, **inputs))


def test_a_text_does_not_see_another() -> None:
    module, inputs = unpadded(padded()), batch()
    before = module(**inputs).logits
    other = inputs["input_ids"].clone()
    other[1, 0] += 1
    after = module(**{**inputs, "input_ids": other}).logits
    same = (before == after).all(-1)
    assert same.tolist() == [i != 1 for i in range(len(LENGTHS))]


def test_states_that_are_asked_for_are_the_librarys() -> None:
    theirs, inputs = padded(), batch()
    ours = unpadded(copy.deepcopy(theirs))
    found, wanted = (module(**inputs, output_hidden_states=True).hidden_states for module in (ours, theirs))
    assert len(found) == len(wanted) == 4
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


def test_an_adapter_learns_the_same() -> None:
    theirs, inputs = padded(), batch()
    both = []
    for module in (unpadded(copy.deepcopy(theirs)), theirs):
        torch.manual_seed(3)
        adapted = add_adapter(module, AdapterSpec(type="lora", r=4)).double().eval()
        with torch.no_grad():
            for p in adapted.parameters():
                if p.requires_grad:
                    p.normal_(0, 0.3)
        torch.manual_seed(4)
        both.append(gradients(adapted, **inputs))
    assert len(both[0]) > 20
    assert_same(both[0], both[1])


def test_half_precision_stays_near() -> None:
    theirs, inputs = padded().float(), batch()
    ours = unpadded(copy.deepcopy(theirs))
    for training in (False, True):
        for module in (ours.train(training), theirs):
            for part in module.modules():
                if isinstance(part, torch.nn.Dropout):
                    part.p = 1e-9 if training else 0.1
        with torch.autocast("cpu", torch.bfloat16):
            found = ours(**inputs).logits
        torch.testing.assert_close(found.float(), theirs(**inputs).logits, rtol=0, atol=0.1)


def test_recomputed_layers_draw_the_same_dropout() -> None:
    inputs, found = batch(), []
    for recompute in ("off", "full", "selective"):
        module = unpadded(padded()).train()
        savers.save(TrainSpec.model_validate({"recompute": recompute}), {"model": module}, torch.device("cpu"))
        torch.manual_seed(7)
        found.append(gradients(module, **inputs))
    for other in found[1:]:
        assert_same(other, found[0], 0.0)
    torch.manual_seed(8)
    module = unpadded(padded()).train()
    assert not torch.equal(gradients(module, **inputs)["classifier.bias"], found[0]["classifier.bias"])


def test_what_is_compiled_keeps_its_shapes() -> None:
    for way, packs in (("off", None), ("network", False)):
        module = unpadded(padded())
        savers.save(TrainSpec.model_validate({"compile": way}), {"model": module}, torch.device("cpu"))
        assert module.packs is packs
    rows = layer_rows(module)
    module.forward(**batch())
    assert rows == [len(LENGTHS) * max(LENGTHS)] * 3


@pytest.mark.parametrize("p", [0.1, 0.5, 0.003])
def test_dropout_drops_its_share_and_keeps_the_mean(p: float) -> None:
    torch.manual_seed(0)
    x = torch.full((700, 701), 2.0, requires_grad=True)
    found = dropped(x, p)
    share = float((found == 0).float().mean())
    assert share == pytest.approx(p, abs=5 * (p * (1 - p) / x.numel()) ** 0.5)
    assert set(found.detach().unique().tolist()) == {0.0, float(torch.tensor(2.0) * (1 / (1 - p)))}
    found.backward(x.detach())
    assert x.grad is not None
    assert torch.equal(x.grad, found.detach())
    bits = (found.detach() == 0).float()
    for shift in (1, 2, 3, 4):  # neighbours come from one draw of 64 bits
        both = float((bits[:, shift:] * bits[:, :-shift]).mean())
        assert both == pytest.approx(p * p, abs=6 * p / x.numel() ** 0.5)
