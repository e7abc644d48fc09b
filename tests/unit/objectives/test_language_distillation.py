"""Distillation of language models: losses against plain logits, the cache against the teacher, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scaletrain.checkpoint.layout import FORMAT
from scaletrain.config import NetworkSpec, Recipe, SourceSpec
from scaletrain.data.sources import open_rows
from scaletrain.data.text import IGNORE
from scaletrain.errors import UserError
from scaletrain.export import gate
from scaletrain.finished import FinishedStage, evaluate
from scaletrain.networks import causal_lm, heads, projection
from scaletrain.objectives._divergence import divergence
from scaletrain.objectives._identity import identity
from scaletrain.objectives._on_policy import batch_of, continued, prompts_of
from scaletrain.objectives.base import Data
from scaletrain.objectives.language_distillation import Config, Objective
from scaletrain.player import Term
from scaletrain.runs import train
from tests.unit.objectives.prepared import prepared

WORDS = ("the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree")
SIZES = {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
ROWS = [{"prompt": f"the {a}", "completion": f"{b} on the mat"} for a in WORDS[2:6] for b in WORDS[4:7]]


def write_network(folder: Path, words: tuple[str, ...] = WORDS, padded: int = 16, **sizes: Any) -> Path:
    """Write a pretrained network with random weights and a tokenizer of a word each."""
    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "</s>", *words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(len(folder.name))
    config = LlamaConfig(vocab_size=padded, **{"hidden_size": 16, "num_hidden_layers": 2, **SIZES, **sizes})
    network = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.3)
    network.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALETRAIN_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose embeddings are padded more than the student's, and rows."""
    root = tmp_path_factory.mktemp("networks")
    write_network(root / "teacher", padded=24)
    write_network(root / "student", num_hidden_layers=1)
    write_network(root / "narrow", num_hidden_layers=1, hidden_size=8)
    write_network(root / "other", words=(*WORDS[:-1], "bush"))
    write_network(root / "eager", num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4)
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return root


def recipe_of(folders: Path, options: dict[str, Any], **changes: Any) -> dict[str, Any]:
    networks = {
        "student": {"path": str(folders / "student")},
        "teacher": {"path": str(folders / "teacher"), "frozen": True},
    }
    return {
        "objective": {"type": "language_distillation", **options},
        "networks": networks | changes.pop("networks", {}),
        "players": changes.pop("players", {}),
        "data": {"train": str(folders / "rows.jsonl"), "seq_len": 16, **changes.pop("data", {})},
        "train": {"duration": "2 steps", "global_batch": 4, **changes},
        "evaluate": {"samples": 0},
        "log": {"every": 1},
    }


def objective(folders: Path, options: dict[str, Any], **changes: Any) -> Objective:
    return Objective(Config.model_validate(options), Recipe.model_validate(recipe_of(folders, options, **changes)))


def rows_of(folders: Path) -> Any:
    return open_rows([SourceSpec(path=str(folders / "rows.jsonl"))])


def networks_of(own: Objective, reducing: bool = False) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, spec in own.networks().items():
        if spec.type == "projection":
            torch.manual_seed(0)
            found[name] = projection.build(projection.Config(**spec.config)).double()
            continue
        module = causal_lm.load(str(spec.path), causal_lm.Config(**spec.config), torch.float64)
        found[name] = (heads.reducing(module) if reducing else module).eval()
    if "teacher" in found:
        found["teacher"].requires_grad_(False)
    return found


def batch_from(data: Data) -> dict[str, torch.Tensor]:
    train: Any = data.train
    return train.batch(range(len(train)), np.zeros(len(train), np.uint64))


def value(term: Term) -> float:
    return float(term.sum.detach())


def plain(networks: dict[str, Any], batch: dict[str, torch.Tensor], temperature: float) -> tuple[Any, Any, Any]:
    """Return log-probabilities of both networks at the learned places, and the cross-entropy, the plain way."""
    inputs = {k: batch[k] for k in ("input_ids", "position_ids") if k in batch}
    learned = batch["labels"] != IGNORE
    student, teacher = (networks[n](**inputs, use_cache=False).logits[learned] for n in ("student", "teacher"))
    shared = len(WORDS) + 3
    p, q = ((z[:, :shared] / temperature).log_softmax(-1) for z in (teacher, student))
    return p, q, F.cross_entropy(student, batch["labels"][learned], reduction="sum")


@pytest.mark.parametrize("reducing", [False, True])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"divergence": "reverse_kl", "temperature": 2.0}, {"divergence": "jsd", "beta": 0.2, "hard": 0.3}],
)
def test_loss_and_gradients_are_those_of_whole_logits(
    options: dict[str, Any], packing: bool, reducing: bool, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(heads.ELEMENTS, "cpu", 1)  # the fewest places at a time
    own = objective(folders, options, data={"packing": packing})
    batch = batch_from(prepared(own, rows_of(folders), None))
    networks = networks_of(own, reducing)
    temperature, hard = options.get("temperature", 1.0), options.get("hard", 0.0)
    p, q, ce = plain(networks, batch, temperature)
    soft = divergence(options.get("divergence", "forward_kl"), p, q, options.get("beta", 0.5)).sum() * temperature**2
    wanted = hard * ce + (1 - hard) * soft
    expected = torch.autograd.grad(wanted, list(networks["student"].parameters()))
    terms = own.loss(own.turns[0], networks, batch)
    assert {name: term.weight for name, term in terms.items()} == {"loss": 1, "divergence": 0, "cross_entropy": 0}
    values = [value(terms[name]) for name in ("loss", "divergence", "cross_entropy")]
    assert values == pytest.approx([wanted.item(), soft.item(), ce.item()], abs=1e-10)
    found = torch.autograd.grad(terms["loss"].sum, list(networks["student"].parameters()))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert own.counts(own.turns[0], batch)["targets"] == len(p)
    own_terms = own.evaluate(networks, batch)
    assert int(own_terms["agreement"].sum) == int((networks_agree(networks, batch)).sum())


def networks_agree(networks: dict[str, Any], batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {k: batch[k] for k in ("input_ids", "position_ids") if k in batch}
    learned, shared = batch["labels"] != IGNORE, len(WORDS) + 3
    ours, theirs = (
        networks[n](**inputs, use_cache=False).logits[learned][:, :shared].argmax(-1) for n in ("student", "teacher")
    )
    return ours == theirs


@pytest.mark.parametrize("reducing", [False, True])
def test_hidden_states_are_matched_on_real_tokens_through_a_projection(reducing: bool, folders: Path) -> None:
    options = {"hidden": {"layers": {1: 2, 0: 0}, "weight": 3.0}}
    own = objective(
        folders,
        options,
        networks={"student": {"path": str(folders / "narrow")}},
        players={"student": {"networks": ["student", "projection"]}},
    )
    batch = batch_from(prepared(own, rows_of(folders), None))
    networks = networks_of(own, reducing)
    terms = own.loss(own.turns[0], networks, batch)
    student, teacher = (
        networks[n](input_ids=batch["input_ids"], output_hidden_states=True).hidden_states
        for n in ("student", "teacher")
    )
    total = 0.0
    for row, length in enumerate(batch["lengths"].tolist()):
        for number, (a, b) in enumerate([(0, 0), (1, 2)]):
            mapped = student[a][row, :length] @ networks["projection"].maps[number].weight.T
            total += (mapped - teacher[b][row, :length]).square().mean(-1).sum().item() / 2
    assert value(terms["hidden"]) == pytest.approx(total, rel=1e-6)
    assert (terms["hidden"].weight, terms["hidden"].per) == (3.0, "tokens")
    sum(term.weight * term.sum for term in terms.values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in networks["projection"].parameters())


@pytest.mark.parametrize("packing", [False, True])
def test_attentions_are_matched_on_real_tokens(packing: bool, folders: Path) -> None:
    eager = {"config": {"attn_implementation": "eager"}}
    own = objective(
        folders,
        {"attention": {"layers": {1: 2}}},
        networks={
            "student": {"path": str(folders / "student"), **eager},
            "teacher": {"path": str(folders / "teacher"), "frozen": True, **eager},
        },
        data={"packing": packing},
    )
    batch = batch_from(prepared(own, rows_of(folders), None))
    networks = networks_of(own, reducing=True)
    terms = own.loss(own.turns[0], networks, batch)
    inputs = {k: batch[k] for k in ("input_ids", "position_ids") if k in batch}
    ours, theirs = (
        networks[n](**inputs, use_cache=False, output_attentions=True).attentions for n in ("student", "teacher")
    )
    total = 0.0
    for row, length in enumerate(batch["lengths"].tolist()):
        for head in range(2):
            for place in range(length):
                p, q = theirs[1][row, head, place], ours[0][row, head, place]
                seen = p > 0
                total += (p[seen] * (p[seen] / q[seen]).log()).sum().item() / 2
    assert value(terms["attention"]) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_what_is_kept_gives_the_loss_of_the_teacher_itself(packing: bool, folders: Path) -> None:
    data, tokens = {"packing": packing}, len(WORDS) + 3
    live = objective(folders, {"temperature": 2.0}, data=data)
    batch = batch_from(prepared(live, rows_of(folders), None))
    networks = networks_of(live)
    expected = live.evaluate(networks, batch)
    found = {}
    for k in (2, 5, tokens):
        own = objective(folders, {"temperature": 2.0, "cache": {"top_k": k}}, data=data)
        prepared_data = prepared(own, rows_of(folders), None)
        assert "teacher" not in own.networks()
        ahead = own.ahead()
        assert ahead is not None
        assert list(ahead.networks) == ["teacher"]
        missing = ahead.missing()
        for part in missing:
            ahead.do({"teacher": networks["teacher"]}, torch.device("cpu"), part)
        assert missing
        assert ahead.missing() == []
        found[k] = own.evaluate({"student": networks["student"]}, batch_from(prepared_data))
        again = objective(folders, {"temperature": 2.0, "cache": {"top_k": k}, "divergence": "reverse_kl"}, data=data)
        prepared(again, rows_of(folders), None)
        assert again.ahead().missing() == []  # type: ignore[union-attr]
    for name, term in expected.items():
        assert value(found[tokens][name]) == pytest.approx(value(term), rel=2e-3)
    losses = [value(found[k]["loss"]) for k in found]
    assert losses == sorted(losses)
    assert losses[0] < 0.9 * losses[-1]


def test_another_teacher_or_other_data_ask_anew(folders: Path, tmp_path: Path) -> None:
    def missing(**changes: Any) -> list[int]:
        options = {"cache": {"top_k": 3}, "temperature": changes.pop("temperature", 1.0)}
        own = objective(folders, options, **changes)
        prepared(own, rows_of(folders), None)
        ahead = own.ahead()
        assert ahead is not None
        found = ahead.missing()
        for part in found:
            ahead.do({"teacher": teacher}, torch.device("cpu"), part)
        return found

    teacher = networks_of(objective(folders, {}))["teacher"]
    assert missing()
    assert not missing()
    assert missing(temperature=2.0)
    assert missing(data={"seq_len": 4})
    assert missing(data={"packing": True})
    assert missing(networks={"teacher": {"path": str(folders / "student"), "frozen": True}})
    assert not missing()


def write_adapter(folder: Path, scale: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"lora_B.weight": torch.full((2, 2), scale)}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("adapter", [{"path": "adapter"}, {"merge": ["adapter"]}])
def test_a_teacher_s_adapter_is_part_of_its_weights(adapter: dict[str, Any], folders: Path, tmp_path: Path) -> None:
    place = str(tmp_path / "adapter")
    own = {key: place if value == "adapter" else [place] for key, value in adapter.items()}
    teacher = {"path": str(folders / "teacher"), "frozen": True, "adapter": own}

    def fingerprint() -> str:
        return identity(NetworkSpec.model_validate(teacher), None)[1]

    write_adapter(tmp_path / "adapter", 1.0)
    before = fingerprint()
    assert fingerprint() == before
    write_adapter(tmp_path / "adapter", 2.0)
    assert fingerprint() != before


def test_what_a_finished_adapter_goes_over_is_part_of_a_teacher_s_weights(folders: Path, tmp_path: Path) -> None:
    checkpoint, base, merged = tmp_path / "first" / "step-00000002", tmp_path / "base", tmp_path / "merged"
    spec = {"type": "causal_lm", "path": str(base), "adapter": {"type": "lora", "merge": [str(merged)]}}
    write_adapter(checkpoint / "networks" / "model", 1.0)
    (checkpoint / "manifest.json").write_text(json.dumps({"format": FORMAT, "networks": {"model": spec}}))
    found = set()
    for weights, adapter in [(1.0, 1.0), (2.0, 1.0), (2.0, 2.0)]:
        write_adapter(base, weights)
        write_adapter(merged, adapter)
        teacher = NetworkSpec.model_validate({"from": f"run:{tmp_path / 'first'}/model", "frozen": True})
        found.add(identity(teacher, checkpoint / "networks" / "model")[1])
    assert len(found) == 3


def test_the_second_start_builds_no_teacher(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    load = causal_lm.load

    def counted(path: str, *arguments: Any) -> Any:
        loaded.append(Path(path).name)
        return load(path, *arguments)

    monkeypatch.setattr(causal_lm, "load", counted)
    recipe = Recipe.model_validate(recipe_of(folders, {"cache": {"top_k": 4}}))
    losses = []
    for name in ("first", "second"):
        folder = train(recipe, name, tmp_path)
        losses.append([r["loss"] for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())])
    assert losses[0] == losses[1]
    assert loaded == ["teacher", "student", "student"]


@pytest.mark.parametrize("options", [{"cache": {"top_k": 5}}, {}])
def test_a_run_teaches_another_which_is_evaluated_afterwards(
    options: dict[str, Any], folders: Path, tmp_path: Path
) -> None:
    rows = str(folders / "rows.jsonl")
    first = recipe_of(folders, {}, networks={}) | {"networks": {"model": {"path": str(folders / "teacher")}}}
    train(Recipe.model_validate(first | {"objective": {"type": "causal_lm"}}), "first", tmp_path)
    teacher = {"frozen": True, "from": f"run:{tmp_path / 'first'}/model"}
    second = recipe_of(folders, options, networks={"teacher": teacher}, data={"eval": rows})
    folder = train(Recipe.model_validate(second), "second", tmp_path)
    last = [r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if r["kind"] == "evaluate"]
    found, *_ = evaluate(folder)
    assert {"loss", "agreement", "perplexity"} <= found.keys()
    assert found == {name: pytest.approx(last[-1][name], rel=1e-6) for name in found}
    probe = gate.probe(FinishedStage.open(folder), "student", None)
    assert probe is not None
    assert probe.source == "rows of the run's data"
    assert len(probe.inputs["input_ids"]) == gate.ROWS


@pytest.mark.parametrize("packing", [False, True])
def test_prompts_end_before_the_first_learned_token(packing: bool, folders: Path) -> None:
    own = objective(folders, {}, data={"packing": packing})
    data = prepared(own, rows_of(folders), None)
    prompts = prompts_of(batch_from(data))
    texts = sorted(own.tokenizer.decode(ids) for ids in prompts)
    assert texts == sorted(row["prompt"] for row in ROWS)


def test_continuations_are_drawn_as_the_network_says(folders: Path) -> None:
    """With a low temperature they are transformers' greedy ones, with the prompts padded at the left or alone."""
    own = objective(folders, {})
    prepared(own, rows_of(folders), None)
    student = networks_of(own)["student"]
    prompts = [[3], [5, 6, 7, 8, 4], [4, 4]]
    drawn = continued(student, prompts, 7, 1e-6, len(WORDS) + 3, {2}, 0, torch.device("cpu"))
    assert drawn.shape == (3, 7)
    for prompt, row in zip(prompts, drawn.tolist(), strict=True):
        ids = list(prompt)
        for token in row:
            logits = student(input_ids=torch.tensor([ids])).logits[0, -1, : len(WORDS) + 3]
            assert token == int(logits.argmax())
            ids.append(token)
            if token == 2:
                break
    many = continued(student, [[3]] * 4000, 1, 1.0, len(WORDS) + 3, set(), 0, torch.device("cpu"))
    share = torch.bincount(many[:, 0], minlength=13) / 4000
    p = student(input_ids=torch.tensor([[3]])).logits[0, -1, :13].softmax(-1)
    assert (share - p).abs().max() < 0.04


def test_a_continuation_is_learned_up_to_its_end() -> None:
    drawn = torch.tensor([[5, 2, 0, 0], [6, 7, 8, 9]])
    batch = batch_of([[3, 4], [5]], drawn, {2}, 0)
    assert batch["input_ids"].tolist() == [[3, 4, 5, 0, 0, 0, 0, 0], [5, 6, 7, 8, 0, 0, 0, 0]]
    assert batch["labels"][0, :4].tolist() == [IGNORE, 5, 2, IGNORE]
    assert batch["labels"][1, :5].tolist() == [6, 7, 8, 9, IGNORE]
    assert batch["lengths"].tolist() == [3, 4]
    assert batch["learned"].tolist() == [1, 2, 8, 9, 10, 11]


def test_a_share_of_windows_is_on_policy_and_a_function_of_position(folders: Path) -> None:
    own = objective(folders, {"on_policy": {"share": 0.4, "max_new_tokens": 5}})
    batch = batch_from(prepared(own, rows_of(folders), None))
    networks = networks_of(own)
    networks["student"].train()
    replaced = 0
    for window in range(60):
        torch.manual_seed(window)
        one, two = own.enrich(own.turns[0], networks, [batch, batch], [7, 8], torch.device("cpu"))
        assert (one is batch) == (two is batch)
        replaced += one is not batch
        if one is not batch:
            assert not torch.equal(one["labels"], two["labels"])
            torch.manual_seed(window)
            again = own.enrich(own.turns[0], networks, [batch], [8], torch.device("cpu"))[0]
            assert all(torch.equal(again[name], two[name]) for name in two)
    assert 15 <= replaced <= 33
    assert networks["student"].training


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("options", [{"hard": 0.2}, {"on_policy": {"share": 0.6, "max_new_tokens": 4}}])
def test_accumulation_changes_nothing(options: dict[str, Any], folders: Path, tmp_path: Path) -> None:
    """Of windows on policy, micro-batches have continuations of their own: there, a run is compared with itself."""
    micro = [2, 2] if "on_policy" in options else [4, 2]
    found = []
    for number, size in enumerate(micro):
        recipe = recipe_of(folders, options, duration="6 steps", micro_batch=size)
        found.append(losses(train(Recipe.model_validate(recipe), f"r{number}", tmp_path)))
    assert len(found[0]) == 6
    assert found[0] == pytest.approx(found[1], rel=0 if "on_policy" in options else 1e-5)


@pytest.mark.parametrize(
    ("options", "networks", "words"),
    [
        ({}, {"teacher": {"path": "other", "frozen": True}}, r"`bush` is .* vocabulary"),
        ({}, {"teacher": {"path": "teacher"}}, r"frozen: true"),
        ({"hidden": {"layers": {1: 3}}}, {}, r"objective.hidden.layers: the teacher has no layer 3: .* 1 to 2"),
        ({"attention": {"layers": {2: 2}}}, {}, r"objective.attention.layers: the student has no layer 2"),
        ({"attention": {"layers": {1: 2}}}, {}, r"networks.student.config.attn_implementation=eager"),
        ({"hidden": {"layers": {1: 2}}}, {"student": {"path": "narrow"}}, r"8 wide .* 16: train a projection"),
        ({"cache": {"top_k": 99}}, {}, r"objective.cache.top_k: there are 13 tokens"),
        ({"on_policy": {"share": 0.5, "max_new_tokens": 60}}, {}, r"max_new_tokens=60: networks.student has 64"),
        ({"on_policy": 1}, {"student": {"path": "student", "adapter": {"type": "prompt"}}}, r"adapter is a prompt"),
    ],
)
def test_what_does_not_fit_is_refused(
    options: dict[str, Any], networks: dict[str, Any], words: str, folders: Path
) -> None:
    placed = {name: {**spec, "path": str(folders / spec["path"])} for name, spec in networks.items()}
    with pytest.raises(UserError, match=words):
        prepared(objective(folders, options, networks=placed), rows_of(folders), None)


def test_attention_needs_as_many_heads(folders: Path) -> None:
    eager = {"config": {"attn_implementation": "eager"}}
    teacher = {"path": str(folders / "teacher"), "frozen": True, **eager}
    changes = {"student": {"path": str(folders / "eager"), **eager}, "teacher": teacher}
    with pytest.raises(UserError, match=r"the student has 4 heads and the teacher 2"):
        prepared(objective(folders, {"attention": {"layers": {1: 2}}}, networks=changes), rows_of(folders), None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 0.5}, "beta is for divergence: jsd"),
        ({"cache": {}, "on_policy": 0.5}, "take one"),
        ({"cache": {}, "hidden": {"layers": {1: 1}}}, "take one"),
        ({"on_policy": 0.5, "hard": 0.1}, "as if they were data"),
        ({"attention": {"layers": {0: 1}}}, "attend to nothing"),
        ({"divergence": "kl"}, "forward_kl"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Config.model_validate(options)


def test_streams_and_texts_are_refused_where_they_cannot_be(folders: Path, tmp_path: Path) -> None:
    stream = open_rows([SourceSpec(path=str(folders / "rows.jsonl"), stream=True)])
    with pytest.raises(UserError, match=r"objective.cache needs data whose rows have numbers"):
        objective(folders, {"cache": {}}).prepare(stream, None)
    (tmp_path / "text.txt").write_text("the cat sat on the mat\n" * 20)
    texts = open_rows([SourceSpec(path=str(tmp_path / "text.txt"))])
    with pytest.raises(UserError, match=r"objective.on_policy continues prompts"):
        objective(folders, {"on_policy": 0.5}).prepare(texts, None)


def test_a_new_student_takes_the_tokenizer_of_its_teacher(folders: Path) -> None:
    sizes = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, **SIZES}
    own = objective(folders, {}, networks={"student": {"config": sizes}})
    prepared(own, rows_of(folders), None)
    assert own.networks()["student"].config["vocab_size"] == len(WORDS) + 3
    assert own.tokenizer.get_vocab()["tree"] == 12
