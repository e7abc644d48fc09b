"""The preference objective against answers that are scored one by one, its references, and what it refuses."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from scaletrain.config import Recipe, SourceSpec
from scaletrain.data.preferences import MISMATCHED
from scaletrain.data.sources import open_rows
from scaletrain.errors import UserError
from scaletrain.explain import decode
from scaletrain.inspection import say
from scaletrain.networks import heads
from scaletrain.networks.build import build
from scaletrain.objectives.base import Data
from scaletrain.objectives.preference import Config, Objective
from tests.recipes.tiny import make_data
from tests.unit.objectives.prepared import prepared

LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.5, "label_smoothing": 0.1, "sft_weight": 0.3},
    "ipo": {"beta": 0.5},
    "orpo": {"beta": 0.5},
    "simpo": {"beta": 2.0, "gamma": 0.5},
    "kto": {"beta": 0.5},
}
LORA = {"type": "lora", "r": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preferences")
    make_data(folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    with torch.no_grad():  # weights that prefer something
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder / "llama")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALETRAIN_CACHE", str(tmp_path / "cache"))


def objective(data: Path, name: str, packing: bool = False, networks: Any = None, **options: Any) -> Objective:
    recipe = Recipe.model_validate(
        {
            "objective": {"type": "preference"},
            "networks": networks or {"model": {"path": str(data / "llama")}},
            "data": {"train": "unused", "seq_len": 24, "packing": packing},
        }
    )
    loss = {"type": name, **LOSSES[name], **options}
    return Objective(decode(Config, {"loss": loss}, "objective"), recipe)


def examples(own: Objective, data: Path, rows: int = 12, name: str | None = None) -> Data:
    file = name or ("judged.jsonl" if own.surveys else "pairs.jsonl")
    return prepared(own, open_rows([SourceSpec(path=str(data / file), rows=rows)]), None)


def batch_of(found: Data, count: int | None = None) -> dict[str, torch.Tensor]:
    dataset: Any = found.train
    number = len(dataset) if count is None else count
    batch: dict[str, torch.Tensor] = dataset.batch(range(number), np.zeros(number, np.uint64))
    return batch


def networks_of(own: Objective, dropout: float = 0.0) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    found = {name: build(name, spec) for name, spec in own.networks().items()}
    for network in found.values():
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
    return {name: network.train(not own.networks()[name].frozen) for name, network in found.items()}


def disturb(network: nn.Module) -> None:
    """Have trained weights be others."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))


def known(own: Objective, networks: Mapping[str, nn.Module], batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The batch with what the trainer adds to it."""
    if not own.surveys:
        return dict(batch)
    counts = own.counts(own.turns[0], batch)
    with torch.no_grad():
        terms = own.survey(own.turns[0], networks, batch)
    return {**batch, **{name: term.sum / counts[term.per] for name, term in terms.items()}}


def trained_on(own: Objective, networks: Mapping[str, nn.Module], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    counts = own.counts(own.turns[0], batch)
    terms = own.loss(own.turns[0], networks, known(own, networks, batch))
    assert all(not term.sum.requires_grad for term in terms.values() if not term.weight)
    return torch.stack([t.weight * t.sum / counts[t.per] for t in terms.values() if t.weight]).sum()


def by_hand(data: Path, networks: Mapping[str, nn.Module], file: str, columns: tuple[str, ...], rows: int) -> Any:
    """Log-probabilities (rows, columns, networks) and lengths (rows, columns) of answers, one at a time."""
    tokenizer = AutoTokenizer.from_pretrained(data / "llama")
    lines = [json.loads(line) for line in (data / file).read_text().splitlines()[:rows]]
    sums, lengths = np.zeros((rows, len(columns), len(networks))), np.zeros((rows, len(columns)))
    for (i, row), (j, column) in ((a, b) for a in enumerate(lines) for b in enumerate(columns)):
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row[column])["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([prompt + answer])
        for k, network in enumerate(networks.values()):
            with torch.no_grad():
                log_p = network.eval()(input_ids=ids).logits[0].log_softmax(-1)
            sums[i, j, k] = sum(float(log_p[len(prompt) - 1 + t, token]) for t, token in enumerate(answer))
        lengths[i, j] = len(answer)
    return sums, lengths


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("name", ["dpo", "ipo", "orpo", "simpo"])
def test_pairs_against_answers_scored_one_by_one(name: str, packing: bool, data: Path) -> None:
    own = objective(data, name, packing)
    found = examples(own, data)
    networks = networks_of(own)
    assert set(networks) == ({"model", "reference"} if name in ("dpo", "ipo") else {"model"})
    disturb(networks["model"])
    batch = batch_of(found)
    terms = own.loss(own.turns[0], networks, batch)
    sums, lengths = by_hand(data, networks, "pairs.jsonl", ("chosen", "rejected"), 12)
    reference = torch.tensor(sums[..., 1]) if len(networks) == 2 else None
    losses, rewards = own.config.loss(torch.tensor(sums[..., 0]), torch.tensor(lengths), reference)  # type: ignore[arg-type, call-arg]
    main = terms.get("preference", terms.get("loss"))
    assert main is not None
    assert float(main.sum.detach()) == pytest.approx(float(losses.sum()), rel=1e-4)
    if name in ("dpo", "orpo"):
        assert terms["sft"].weight == {"dpo": 0.3, "orpo": 1.0}[name]
        assert float(terms["sft"].sum.detach()) == pytest.approx(-sums[:, 0, 0].sum(), rel=1e-5)
    assert float(terms["logp/rejected"].sum) == pytest.approx(sums[:, 1, 0].sum(), rel=1e-5)
    assert float(terms["margin"].sum) == pytest.approx(float((rewards[:, 0] - rewards[:, 1]).sum()), rel=1e-3)
    assert float(terms["accuracy"].sum) == float((rewards[:, 0] > rewards[:, 1]).sum())
    counts = own.counts(own.turns[0], batch)
    assert counts["pairs"] == 12
    assert counts["targets"] == lengths[:, 0].sum()
    evaluated = own.evaluate(networks, batch)
    assert float(evaluated["margin"].sum) == pytest.approx(float(terms["margin"].sum), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunked", [False, True])
def test_packed_is_padded(name: str, chunked: bool, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same loss and the same gradient; and so where few logits exist at a time."""
    found: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
    for packing in (False, True):
        own = objective(data, name, packing)
        batch = batch_of(examples(own, data))
        networks = networks_of(own)
        disturb(networks["model"])
        if chunked and packing:
            monkeypatch.setitem(heads.ELEMENTS, "cpu", 64)
            assert all(map(heads.takes_reduction, map(heads.reducing, networks.values())))
        loss = trained_on(own, networks, batch)
        loss.backward()
        found.append((loss.detach(), [p.grad for p in networks["model"].parameters() if p.grad is not None]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-6)
    for packed, padded in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-6)


def test_kto_against_answers_scored_one_by_one(data: Path) -> None:
    own = objective(data, "kto", undesirable_weight=1.3)
    batch, networks = batch_of(examples(own, data)), networks_of(own)
    disturb(networks["model"])
    terms = own.loss(own.turns[0], networks, known(own, networks, batch))
    sums, _ = by_hand(data, networks, "judged.jsonl", ("completion",), 12)
    ratios = torch.tensor(sums[:, 0, 0] - sums[:, 0, 1])
    with torch.no_grad():
        others = own._ratios(networks, batch, MISMATCHED)
    expected = own.config.loss(ratios, batch["labels"], others.mean().double())  # type: ignore[arg-type, call-arg]
    assert float(terms["loss"].sum.detach()) == pytest.approx(float(expected.sum().detach()), rel=1e-4)
    assert float(terms["divergence"].sum) == pytest.approx(12 * max(0.0, float(others.mean())), rel=1e-4)
    signs = np.where(batch["labels"].numpy(), 0.5, -0.5)
    assert float(terms["margin"].sum) == pytest.approx(float((signs * ratios.numpy()).sum()), rel=1e-3)
    assert own.counts(own.turns[0], batch)["rows"] == 12
    with torch.no_grad():
        assert float(own.evaluate(networks, batch)["loss"].sum) == pytest.approx(float(terms["loss"].sum), rel=1e-5)


# --- references -------------------------------------------------------------------------------------------------------


def test_without_its_adapter_the_model_is_the_reference(data: Path) -> None:
    networks_spec = {"model": {"path": str(data / "llama"), "adapter": {**LORA, "dropout": 0.1}}}
    own = objective(data, "dpo", networks=networks_spec, sft_weight=0.0)
    batch = batch_of(examples(own, data))
    networks = networks_of(own, dropout=0.3)
    assert set(networks) == {"model"}
    model = networks["model"]
    frozen = networks_of(objective(data, "dpo"))["reference"]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = own._reference({"model": model, "reference": frozen}, batch)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(4):
        assert torch.equal(own._reference(networks, batch), expected)
        assert model.training
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
        torch.manual_seed(step)
        terms = own.loss(own.turns[0], networks, batch)
        if step == 0:
            model.eval()
            zero = own.loss(own.turns[0], networks, batch)["margin"]
            assert float(zero.sum) == pytest.approx(0.0, abs=1e-4)
            model.train()
        optimizer.zero_grad()
        terms["loss"].sum.backward()
        optimizer.step()
    assert not torch.allclose(own._ratios(networks, batch), torch.zeros(24), atol=0.1)


@pytest.mark.parametrize(
    ("model", "reference", "expected"),
    [
        ({}, None, {"frozen": True}),
        ({"adapter": LORA}, None, None),
        ({"adapter": LORA}, {"frozen": True, "dtype": "bfloat16"}, {"dtype": "bfloat16", "frozen": True}),
        (
            {"adapter": LORA, "path": None, "from": "stage:sft/model"},
            None,
            {"source": "stage:sft/model", "adapter": None},
        ),
        ({"path": None, "from": "run:sft/model"}, None, {"source": "run:sft/model", "frozen": True}),
    ],
)
def test_which_network_is_the_reference(model: Any, reference: Any, expected: Any, data: Path) -> None:
    networks = {"model": {"path": str(data / "llama"), **model}}
    own = objective(data, "dpo", networks=networks | ({"reference": reference} if reference else {}))
    found = own.networks().get("reference")
    if expected is None:
        assert found is None
        return
    assert found is not None
    assert found.type == "causal_lm"
    assert {key: getattr(found, key) for key in expected} == expected
    assert (found.path, found.source) == (own.networks()["model"].path, own.networks()["model"].source)


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_margins_grow(name: str, data: Path) -> None:
    """Chosen answers end with another word than rejected ones: that is soon learned, of rows not seen too."""
    own = objective(data, name, packing=True)
    batch = batch_of(examples(own, data, rows=40))
    networks = networks_of(own)
    optimizer = torch.optim.Adam([p for p in networks["model"].parameters() if p.requires_grad], lr=3e-3)
    margins, losses = [], []
    for _ in range(15):
        loss = trained_on(own, networks, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            found = own.evaluate(networks, batch)
        margins.append(float(found["margin"].sum))
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert margins[-1] > margins[0]
    count = next(iter(own.counts(own.turns[0], batch).values()))
    assert float(found["accuracy"].sum) >= 0.9 * count


def test_prompts_of_the_data_are_answered(data: Path) -> None:
    from scaletrain.objectives.base import Request

    own = objective(data, "dpo")
    examples(own, data)
    networks = networks_of(own)
    networks["model"].eval()
    found = own.sample(networks, Request(3, torch.Generator().manual_seed(0)))
    row = json.loads((data / "pairs.jsonl").read_text().splitlines()[0])
    assert len(found.texts or []) == 3
    assert (found.texts or [""])[0].startswith(row["prompt"])


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_bad_recipes(data: Path) -> None:
    path = {"path": str(data / "llama")}
    with pytest.raises(UserError, match=r"networks.reference: orpo has no reference"):
        objective(data, "orpo", networks={"model": path, "reference": {"frozen": True}})
    with pytest.raises(UserError, match=r"networks.reference must have `frozen: true`"):
        objective(data, "dpo", networks={"model": path, "reference": path})
    with pytest.raises(UserError, match=r"give the `path` of a trained network"):
        objective(data, "dpo", networks={"model": {"config": {"model_type": "llama"}}})
    with pytest.raises(UserError, match=r"`objective.loss.beta` is missing"):
        decode(Config, {"loss": {"type": "dpo"}}, "objective")
    with pytest.raises(UserError, match=r"`objective.loss.gamma`: there is no such key"):
        decode(Config, {"loss": {"type": "dpo", "beta": 0.1, "gamma": 1.0}}, "objective")
    with pytest.raises(UserError, match=r"dpo.*ipo.*orpo.*simpo.*kto"):
        decode(Config, {"loss": {"type": "ppo", "beta": 0.1}}, "objective")
    with pytest.raises(UserError, match=r"kto learns from answers that were judged one by one"):
        examples(objective(data, "kto"), data, name="pairs.jsonl")
    with pytest.raises(UserError, match=r"dpo learns from pairs"):
        examples(objective(data, "dpo"), data, name="judged.jsonl")
    with pytest.raises(UserError, match=r"no column `chosen`"):
        examples(objective(data, "dpo"), data, name="prompts.jsonl")


def test_a_reference_with_other_tokens_is_refused(data: Path) -> None:
    networks = {
        "model": {"path": str(data / "llama")},
        "reference": {"path": str(data / "other"), "frozen": True},
    }
    other = copy.deepcopy(AutoTokenizer.from_pretrained(data / "llama"))
    other.add_tokens(["new"])
    other.save_pretrained(data / "other")
    with pytest.raises(UserError, match=r"networks.reference.path: the tokens of .*other.* are not those of the model"):
        examples(objective(data, "dpo", networks=networks), data)


def test_texts_need_a_prompt(tmp_path: Path, data: Path) -> None:
    (tmp_path / "bare.jsonl").write_text(json.dumps({"chosen": "the cat", "rejected": "the dog"}) + "\n")
    own = objective(data, "dpo")
    with pytest.raises(UserError, match=r"no column `prompt`"):
        prepared(own, open_rows([SourceSpec(path=str(tmp_path / "bare.jsonl"))]), None)


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_window_of_a_stream_gives_the_same_examples(name: str, data: Path) -> None:
    own = objective(data, name, packing=True)
    whole = batch_of(examples(own, data))
    file = "judged.jsonl" if own.surveys else "pairs.jsonl"
    rows = open_rows([SourceSpec(path=str(data / file), rows=12, stream=True)])
    assert rows.streaming
    dataset = own.examples(rows, training=True, window=True)
    window = dataset.batch(range(len(dataset)), np.zeros(len(dataset), np.uint64))
    assert window.keys() == whole.keys()
    assert all(torch.equal(window[key], tensor) for key, tensor in whole.items())


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_rows_that_would_be_left_out_stop_the_start(name: str, tmp_path: Path, data: Path) -> None:
    own = objective(data, name)
    file, column = ("judged.jsonl", "completion") if own.surveys else ("pairs.jsonl", "chosen")
    rows = [json.loads(line) for line in (data / file).read_text().splitlines()[:20]]
    say(own, examples(own, data))
    for row in rows[:18]:
        row[column] = "a cat " * 30
    (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = examples(own, tmp_path, 20)
    with pytest.raises(UserError, match=r"90.0% of the rows are left out, more than objective.max_lost=0.05 allows"):
        say(own, found)
    own.config = own.config.model_copy(update={"max_lost": 0.95})
    say(own, found)
