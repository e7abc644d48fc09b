"""The causal language model's objective against plain sums, and isolation against the samples one by one."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scaletrain.assemble import prepare
from scaletrain.config import NetworkSpec, Recipe, SourceSpec
from scaletrain.data.sources import open_rows
from scaletrain.data.text import IGNORE, Samples, Tokens
from scaletrain.errors import UserError
from scaletrain.evaluate.generation import SamplingConfig, generate
from scaletrain.inspection import inspected
from scaletrain.networks import causal_lm
from scaletrain.networks.build import build, save
from scaletrain.objectives.base import Request
from scaletrain.objectives.causal_lm import Config, Objective, check_attention, forward, sample_lengths
from tests.unit.objectives.prepared import prepared

SIZES = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {"model_type": "llama", "intermediate_size": 32, "max_position_embeddings": 64, **SIZES}
ARCHITECTURES = {
    "llama": LLAMA,
    "gpt2": {"model_type": "gpt2", "n_positions": 64, **SIZES},
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 8, "num_key_value_heads": 1},
    "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": 4, "num_key_value_heads": 1},
}
PROMPT = {"type": "prompt", "virtual_tokens": 4}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALETRAIN_CACHE", str(tmp_path / "cache"))


def network(config: dict[str, Any], **options: Any) -> Any:
    torch.manual_seed(0)
    module = causal_lm.build(causal_lm.Config(**{**config, **options}))
    with torch.no_grad():  # large weights, so that a leak would be seen
        for p in module.parameters():
            p.normal_(0, 0.5)
    return module.eval()


def objective(options: dict[str, Any] | None = None, network: dict[str, Any] | None = None, **data: Any) -> Objective:
    recipe = Recipe.model_validate(
        {
            "objective": {"type": "causal_lm"},
            "networks": {"model": network or {"config": {k: v for k, v in LLAMA.items() if k != "vocab_size"}}},
            "data": {"train": "unused", "seq_len": 16, **data},
        }
    )
    return Objective(Config.model_validate({"tokenizer": {"vocab_size": 270}, **(options or {})}), recipe)


def rows_of(folder: Path, *rows: dict[str, Any], name: str = "rows.jsonl") -> Any:
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    return open_rows([SourceSpec(path=str(folder / name))])


PAIRS = [{"prompt": "the cat " * (i % 3 + 1), "completion": "sat on the mat " * (i % 2 + 1)} for i in range(12)]


def whole_batch(dataset: Any) -> dict[str, torch.Tensor]:
    return dataset.batch(range(len(dataset)), np.zeros(len(dataset), np.uint64))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_logits_equal_those_of_each_sample_alone(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 14, 30)
    ids = rng.integers(0, 300, lengths.sum()).astype(np.uint16)
    tokens = Tokens(ids, np.ones(len(ids), np.uint8), np.concatenate([[0], lengths.cumsum()]))
    rows = rows_of(tmp_path, *[{"text": "x"}] * 30)
    packed = Samples(tokens, rows, 20, fill=0, packed=True)
    batch = whole_batch(packed)
    module = network(ARCHITECTURES[name])
    check_attention(module, batch, packed=True)
    with torch.no_grad():
        together = forward(module, batch["input_ids"], batch["position_ids"])
        compared = 0
        for pack in range(len(packed)):
            place = 0
            for sample in packed._members(pack).tolist():
                a, n = int(tokens.offsets[sample]), int(lengths[sample]) - 1
                alone = module(input_ids=torch.from_numpy(ids[a : a + n].astype(np.int64))[None]).logits[0]
                torch.testing.assert_close(together[pack, place : place + n], alone, rtol=1e-5, atol=1e-5)
                place, compared = place + n, compared + 1
        assert compared == 30
        changed = batch["input_ids"].clone()
        first = int(lengths[packed._members(0)[0]]) - 1
        changed[0, :first] = (changed[0, :first] + 1) % 300
        again = forward(module, changed, batch["position_ids"])
    assert torch.equal(again[0, first : int(batch["lengths"][0])], together[0, first : int(batch["lengths"][0])])
    assert not torch.equal(again[0, :first], together[0, :first])


class Leaky(nn.Module):
    """Sees the sum of all tokens so far, whatever the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 16)

    def forward(self, input_ids: torch.Tensor, use_cache: bool, position_ids: torch.Tensor | None = None) -> Any:
        return type("Out", (), {"logits": self.embed(input_ids).cumsum(1) @ self.embed.weight.T})


class Positionless(Leaky):
    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:  # type: ignore[override]
        return super().forward(input_ids, use_cache)


def test_networks_that_see_too_much_are_refused() -> None:
    batch = {"input_ids": torch.zeros(1, 8, dtype=torch.long)}
    check_attention(Leaky(), batch, packed=False)
    for module in (Leaky(), Positionless()):
        with pytest.raises(UserError, match=r"data.packing: the samples of a pack would see each other"):
            check_attention(module, batch, packed=True)
    encoder = network({"model_type": "bert", "intermediate_size": 32, "max_position_embeddings": 64, **SIZES})
    with pytest.raises(UserError, match=r"sees the tokens that it is to predict"):
        check_attention(encoder, batch, packed=False)


def test_the_check_passes_with_dropout_and_leaves_the_generator_alone() -> None:
    module = network(ARCHITECTURES["gpt2"]).train()
    state = torch.get_rng_state()
    check_attention(module, {"input_ids": torch.zeros(1, 8, dtype=torch.long)}, packed=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert module.training


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_is_the_sum_over_learned_tokens(packing: bool, smoothing: float, tmp_path: Path) -> None:
    own = objective({"label_smoothing": smoothing}, packing=packing, seq_len=40)
    data = prepared(own, rows_of(tmp_path, *PAIRS), None)
    module = causal_lm.build(causal_lm.Config(**own.networks()["model"].config)).eval()
    batch = whole_batch(data.train)
    term = own.loss(own.turns[0], {"model": module}, batch)["loss"]
    expected, plain, targets, real = 0.0, 0.0, 0, 0
    tokenizer = own.tokenizer
    assert tokenizer is not None
    for row in PAIRS:
        prompt, completion = tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]
        ids = torch.tensor([*prompt, *completion, tokenizer.eos_token_id])
        with torch.no_grad():
            log_p = module(input_ids=ids[None, :-1]).logits[0].log_softmax(-1)
        for t in range(len(prompt) - 1, len(ids) - 1):
            expected += float(-(1 - smoothing) * log_p[t, ids[t + 1]] - smoothing * log_p[t].mean())
            plain += float(-log_p[t, ids[t + 1]])
            targets += 1
        real += len(ids) - 1
    assert own.counts(own.turns[0], batch) == {"targets": targets, "tokens": real}
    assert term.per == "targets"
    assert float(term.sum) == pytest.approx(expected, rel=1e-5)
    assert float(own.evaluate({"model": module}, batch)["loss"].sum) == pytest.approx(plain, rel=1e-5)
    assert own.conclude({"loss": plain / targets})["perplexity"] == pytest.approx(math.exp(plain / targets))


def test_loss_in_bfloat16_is_summed_in_float32(tmp_path: Path) -> None:
    own = objective(seq_len=40)
    batch = whole_batch(prepared(own, rows_of(tmp_path, *PAIRS), None).train)
    module: Any = causal_lm.build(causal_lm.Config(**own.networks()["model"].config)).to(torch.bfloat16).eval()
    with torch.no_grad():
        logits = module(input_ids=batch["input_ids"]).logits
        term = own.evaluate({"model": module}, batch)["loss"]
    assert logits.dtype == torch.bfloat16
    assert term.sum.dtype == torch.float32
    reference = F.cross_entropy(
        logits.double().flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE, reduction="sum"
    )
    assert float(term.sum) == pytest.approx(float(reference), rel=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_what_is_trained_on_and_what_is_told(packing: bool, tmp_path: Path) -> None:
    own = objective({"label_smoothing": 0.1, "z_loss": 0.01, "neftune_alpha": 5}, packing=packing, seq_len=40)
    batch = whole_batch(prepared(own, rows_of(tmp_path, *PAIRS), None).train)
    learned = (batch["labels"].flatten() != IGNORE).nonzero().squeeze(1)
    assert torch.equal(batch["learned"], learned)
    module = causal_lm.build(causal_lm.Config(**own.networks()["model"].config))
    quiet = objective({"label_smoothing": 0.1, "z_loss": 0.01}, packing=packing, seq_len=40)

    def terms(of: Objective) -> dict[str, float]:
        torch.manual_seed(0)
        return {name: float(term.sum.detach()) for name, term in of.loss(of.turns[0], {"model": module}, batch).items()}

    with torch.no_grad():
        logits = forward(module, batch["input_ids"], batch.get("position_ids")).flatten(0, 1)[learned]
    targets = batch["labels"].flatten()[learned]
    plain = float(F.cross_entropy(logits, targets, reduction="sum"))
    smoothed = float(F.cross_entropy(logits, targets, reduction="sum", label_smoothing=0.1))
    z = float(logits.logsumexp(-1).square().sum())
    assert terms(quiet) == pytest.approx({"loss": smoothed + 0.01 * z, "cross_entropy": plain}, rel=1e-5)
    assert terms(own) == terms(own)
    assert terms(own)["cross_entropy"] != pytest.approx(plain, rel=1e-5)
    told = {name: float(term.sum) for name, term in own.evaluate({"model": module}, batch).items()}
    right = int((logits.argmax(-1) == targets).sum())
    assert told == pytest.approx({"loss": plain, "accuracy": right}, rel=1e-5)
    assert own.loss(own.turns[0], {"model": module}, batch)["cross_entropy"].weight == 0


def test_lengths_of_samples() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 0, 0]])
    batch = {"input_ids": positions, "position_ids": positions, "lengths": torch.tensor([8, 6])}
    assert sample_lengths(batch).tolist() == [[3, 3, 3, 2, 2, 1, 2, 2], [6, 6, 6, 6, 6, 6, 1, 1]]
    del batch["position_ids"]
    assert sample_lengths(batch).tolist() == [[8] * 8, [6] * 8]


def test_padding_with_the_end_of_text_still_learns_the_end(tmp_path: Path) -> None:
    own = objective(seq_len=40)
    prepared(own, rows_of(tmp_path, *PAIRS), None)
    assert own.tokenizer is not None
    own.tokenizer.pad_token = own.tokenizer.eos_token
    batch = whole_batch(prepared(own, rows_of(tmp_path, *PAIRS), None).train)
    end = own.tokenizer.eos_token_id
    assert (batch["labels"] == end).sum(1).tolist() == [1] * len(PAIRS)
    assert int((batch["input_ids"] == end).sum()) == int(batch["input_ids"].numel() - batch["lengths"].sum())


def test_a_new_network_takes_the_tokenizer_s_figures(tmp_path: Path) -> None:
    own = objective()
    prepared(own, rows_of(tmp_path, {"text": "the cat sat on the mat " * 9}), None)
    spec = own.networks()["model"]
    assert spec.type == "causal_lm"
    assert own.tokenizer is not None
    assert spec.config["vocab_size"] == 270
    assert spec.config["eos_token_id"] == own.tokenizer.eos_token_id
    assert spec.config["hidden_size"] == 16


@pytest.mark.parametrize(
    ("options", "network_spec", "data", "message"),
    [
        ({}, {}, {"seq_len": None}, "data.seq_len is missing"),
        ({}, {"config": LLAMA}, {"seq_len": 65}, "data.seq_len=65: the network has 64 positions"),
        ({}, {"config": {**LLAMA, "vocab_size": 269}}, {}, "tokenizer has 270 tokens, the network embeds 269"),
        ({"format": "chat"}, {}, {}, "no column `messages`"),
        ({}, {"config": LLAMA, "adapter": PROMPT}, {"seq_len": 57}, "has 56 positions, .* beside 4 virtual tokens"),
        ({"sampling": {"max_new_tokens": 60}}, {"config": LLAMA, "adapter": PROMPT}, {}, "has 60 positions in all"),
    ],
)
def test_bad_settings(options: Any, network_spec: Any, data: Any, message: str, tmp_path: Path) -> None:
    own = objective(options, network_spec, **data)
    with pytest.raises(UserError, match=message):
        prepared(own, rows_of(tmp_path, {"text": "the cat sat on the mat " * 9}), None)


def test_a_network_must_be_named() -> None:
    with pytest.raises(UserError, match=r"networks.model: give the `path`"):
        objective(network={"frozen": False})


def test_all_masked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing to learn .*rows.jsonl line 1"):
        prepared(objective(seq_len=2), rows_of(tmp_path, *PAIRS), None)


def test_samples_are_a_function_of_the_generator(tmp_path: Path) -> None:
    own = objective({"sampling": {"max_new_tokens": 6}}, seq_len=40)
    prepared(own, rows_of(tmp_path, *PAIRS), None)
    module = causal_lm.build(causal_lm.Config(**own.networks()["model"].config)).eval()

    def texts(seed: int, **request: Any) -> list[str]:
        asked = Request(count=5, generator=torch.Generator().manual_seed(seed), **request)
        found = own.sample({"model": module}, asked).texts
        assert found is not None
        return found

    state = torch.get_rng_state()
    assert texts(1) == texts(1)
    assert texts(1) != texts(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(t.startswith("the cat ") for t in texts(1))
    assert all(t.startswith("the mat") for t in texts(1, prompts=("the mat",)))
    with pytest.raises(UserError, match=r"`temprature`.*`temperature`"):
        texts(1, options={"temprature": 1})


def test_virtual_tokens_take_positions_of_what_is_sampled(tmp_path: Path) -> None:
    spec = NetworkSpec.model_validate(
        {"type": "causal_lm", "config": ARCHITECTURES["gpt2"], "adapter": {"type": "prompt", "virtual_tokens": 4}}
    )
    model: Any = build("model", spec).eval()
    save(model, spec, tmp_path)
    going_on = {"config": ARCHITECTURES["gpt2"], "adapter": {"path": str(tmp_path)}}
    own, rows = objective(network=going_on, seq_len=57), rows_of(tmp_path, {"text": "the cat sat on the mat " * 9})
    with pytest.raises(UserError, match="56 positions, in multiples of 8, beside 4 virtual"):
        prepared(own, rows, None)
    how = SamplingConfig(max_new_tokens=8, temperature=0.0)
    (long, short) = generate(model, [list(range(64)), list(range(12, 64))], how, torch.Generator(), 0, [])
    assert len(long) == 8
    assert long == short  # the beginning goes: 60 positions less 8
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 60, dtype=torch.long))


def test_greedy_samples_equal_the_most_likely_tokens(tmp_path: Path) -> None:
    """With prompts of different lengths in one batch, so that padding and the cache are right."""
    own = objective({"sampling": {"max_new_tokens": 5, "temperature": 0}}, seq_len=40)
    prepared(own, rows_of(tmp_path, *PAIRS), None)
    tokenizer = own.tokenizer
    assert tokenizer is not None
    module: Any = network(own.networks()["model"].config)
    prompts = ("the cat", "the cat sat on the mat", "a")
    request = Request(count=3, generator=torch.Generator().manual_seed(0), prompts=prompts)
    for prompt, text in zip(prompts, own.sample({"model": module}, request).texts or [], strict=True):
        ids = tokenizer(prompt)["input_ids"]
        for _ in range(5):
            with torch.no_grad():
                token = int(module(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
        assert text == tokenizer.decode(ids, skip_special_tokens=True)


CHATS = [
    {"messages": [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": f"sat {i} on the mat"}]}
    for i in range(8)
]


def test_only_what_makes_the_tokens_makes_them_anew(tmp_path: Path) -> None:
    kept = tmp_path / "cache" / "tokens"
    rows = rows_of(tmp_path, *CHATS)
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}[{{ m.role }}{{ word }}]{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant{{ word }}]{% endif %}"
    )
    own = {"chat_template": str(template)}

    def entries(options: dict[str, Any], **data: Any) -> int:
        prepared(objective(options, **data), rows, None)
        return sum(path.is_dir() for path in kept.iterdir())

    assert entries({}, seq_len=60) == entries({}, seq_len=58, packing=True) == 1
    assert entries({"label_smoothing": 0.1}, seq_len=60) == 1
    assert entries({"learn": "last"}, seq_len=60) == 2
    assert entries(own, seq_len=60) == 3
    assert entries({**own, "template_options": {"word": "!"}}, seq_len=60) == 4
    assert entries({"tokenizer": {"vocab_size": 265}}, seq_len=60) == 5
    assert entries({}, seq_len=60) == 5


def test_a_template_of_the_user_s_own(tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    own = objective({"chat_template": str(template)}, seq_len=60)
    with pytest.raises(UserError, match=r"objective.chat_template: .*mine.jinja` cannot be read"):
        prepared(own, rows_of(tmp_path, *CHATS), None)
    template.write_text("one\n{% for m in %}")
    with pytest.raises(UserError, match=r"mine.jinja` line 2 is no Jinja template"):
        prepared(own, rows_of(tmp_path, *CHATS), None)


def test_sources_of_different_formats(tmp_path: Path) -> None:
    pairs = rows_of(tmp_path, *PAIRS, name="a.jsonl")
    chats = rows_of(tmp_path, *CHATS, name="b.jsonl")
    both = open_rows([SourceSpec(path=str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl", "a.jsonl")])
    own = objective(seq_len=60)
    data = prepared(own, both, None).train
    assert own.tokenizer is not None
    learned = [own.tokenizer.decode([i for i in data.at(k)["labels"] if i != IGNORE]) for k in range(len(data))]
    end = own.tokenizer.eos_token
    said = [f"{row['messages'][1]['content']}{end}" for row in CHATS]
    written = [f"{row['completion']}{end}" for row in PAIRS]
    assert learned == [*written, *said, *written]
    assert [data.name(i) for i in (0, 12, 20)] == [pairs.name(0), chats.name(0), pairs.name(0)]
    assert own.inspect(data).wrong == ()
    rows_of(tmp_path, {"text": "the cat"}, name="c.jsonl")
    mixed = open_rows([SourceSpec(path=str(tmp_path / name)) for name in ("a.jsonl", "c.jsonl")])
    with pytest.raises(UserError, match=r"plain text and rows with answers .* `weight`"):
        prepared(objective(seq_len=60), mixed, None)


def test_too_many_rows_without_an_answer(tmp_path: Path) -> None:
    silent = [{"messages": [{"role": "user", "content": "the cat?"}]}]
    own = objective(seq_len=60)
    found = own.inspect(prepared(own, rows_of(tmp_path, *CHATS, *silent), None).train)
    assert found.wrong[0].startswith("11.1% of the rows are left without an answer, more than objective.max_lost=0.05")
    own = objective({"max_lost": 0.2}, seq_len=60)
    assert own.inspect(prepared(own, rows_of(tmp_path, *CHATS, *silent), None).train).wrong == ()


def test_restored_from_its_folder(tmp_path: Path) -> None:
    own = objective(seq_len=60)
    chat = [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "the cat sat on the mat " * 2}]
    prepared(own, rows_of(tmp_path, {"messages": chat}), None)
    folder = tmp_path / "model"
    folder.mkdir()
    own.save_assets("model", folder)
    again = objective()
    again.restore({"model": folder})
    assert again.networks() == own.networks()
    module = network(again.networks()["model"].config)
    request = Request(2, torch.Generator().manual_seed(0), ("hello",), {"max_new_tokens": 3})
    assert (again.sample({"model": module}, request).texts or [""])[0].startswith("<|im_start|>user\nhello")


def test_a_mixture_of_text_and_chats(tmp_path: Path) -> None:
    rows_of(tmp_path, *[{"text": "the cat sat on the mat " * 9}] * 4, name="a.jsonl")
    rows_of(tmp_path, *CHATS, name="b.jsonl")
    sources = [{"path": str(tmp_path / name), "weight": 1} for name in ("a.jsonl", "b.jsonl")]
    own = objective(seq_len=60, train=sources, packing=True)
    mixture = prepare(own, own.recipe).train
    assert [type(dataset).__name__ for dataset in mixture.datasets] == ["Blocks", "Samples"]
    batch = mixture.collate([mixture.example(i, np.random.default_rng(0)) for i in (0, len(mixture) - 1)])
    assert batch["position_ids"].shape == batch["labels"].shape
    assert [len(found.lines) > 2 for _, found in inspected(own, prepare(own, own.recipe))] == [True, True]
