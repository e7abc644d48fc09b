"""Sequence to sequence against the library's own loss and its own search."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scaletrain.errors import UserError
from scaletrain.networks.build import build
from scaletrain.objectives.base import Request
from tests.unit.objectives.prepared import prepared
from tests.unit.objectives.texts import network, objective, rows_of, whole_batch

BART = {
    "model_type": "bart", "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64,
    "dropout": 0.0,
}  # fmt: skip
T5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
ROWS = [{"source": "the cat " * (i % 4 + 1), "target": "sat on " * (i % 3) + "a mat"} for i in range(12)]


def writer(config: dict[str, Any], **options: Any) -> Any:
    return objective("seq2seq", config, 40, **options)


@pytest.mark.parametrize("config", [BART, T5], ids=["bart", "t5"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_is_the_librarys(config: dict[str, Any], smoothing: float, tmp_path: Path) -> None:
    own = writer(config, label_smoothing=smoothing)
    batch = whole_batch(prepared(own, rows_of(tmp_path, *ROWS), None).train)
    module = network(own)
    loss, plain, targets, tokens = 0.0, 0.0, 0, 0
    for row in ROWS:
        source = own.tokenizer(row["source"])["input_ids"]
        target = [*own.tokenizer(row["target"])["input_ids"], own.tokenizer.eos_token_id]
        with torch.no_grad():  # the library makes the decoder's input of the labels
            out = module(input_ids=torch.tensor([source]), labels=torch.tensor([target]))
        plain += float(out.loss) * len(target)
        loss += float(F.cross_entropy(out.logits[0], torch.tensor(target), reduction="sum", label_smoothing=smoothing))
        targets, tokens = targets + len(target), tokens + len(source) + len(target)
    terms = own.loss(own.turns[0], {"model": module}, batch)
    assert float(terms["loss"].sum.detach()) == pytest.approx(loss, rel=1e-5)
    with torch.no_grad():
        assert float(own.evaluate({"model": module}, batch)["loss"].sum) == pytest.approx(plain, rel=1e-5)
    assert own.counts(own.turns[0], batch) == {"targets": targets, "tokens": tokens}


@pytest.mark.parametrize("config", [BART, T5], ids=["bart", "t5"])
def test_it_learns_is_restored_and_writes(config: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"prompt": word, "completion": word[::-1]} for word in ("abc", "cab", "bca", "aab")]
    own = writer(config)
    batch = whole_batch(prepared(own, rows_of(tmp_path, *rows), None).train)
    torch.manual_seed(0)
    module: Any = build("model", own.networks()["model"])
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for _ in range(150):
        term = own.loss(own.turns[0], {"model": module}, batch)["loss"]
        optimizer.zero_grad()
        term.sum.backward()
        optimizer.step()
    assert float(term.sum.detach()) < 0.5
    module.eval()
    module.save_pretrained(tmp_path / "model")
    own.save_assets("model", tmp_path / "model")
    again = writer(config)
    again.restore({"model": tmp_path / "model"})
    from transformers import AutoModelForSeq2SeqLM

    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
    found = again.sample({"model": loaded}, Request(2, torch.Generator(), ("abc", "cab")))
    assert found is not None
    assert found.texts == ["abc → cba", "cab → bac"]
    # The folder generates by itself, and a search with one beam is the likeliest token each time.
    ids = torch.tensor([own.tokenizer("bca")["input_ids"]])
    plain = own.tokenizer.batch_decode(loaded.generate(ids, max_new_tokens=6), skip_special_tokens=True)
    how = own.config.sampling.model_copy(update={"beams": 1})
    assert plain == again.write(loaded, ["bca"], how, torch.device("cpu")) == ["acb"]
    assert again.sample({"model": loaded}, Request(2, torch.Generator())) is None
    sampled = own.sample({"model": loaded}, Request(2, torch.Generator()))
    assert [text.split(" → ")[0] for text in sampled.texts] == ["abc", "bca"]


def test_rows_tell_how_long_they_are(tmp_path: Path) -> None:
    data = prepared(writer(BART), rows_of(tmp_path, *ROWS), None).train
    found = data.lengths(np.array([11, 0, 5]))
    examples = [data.example(i, np.random.default_rng()) for i in (11, 0, 5)]
    assert found is not None
    assert found.tolist() == [len(e["input_ids"]) + len(e["labels"]) for e in examples]


def test_targets_are_cut_before_their_end(tmp_path: Path) -> None:
    own = writer(BART, target_len=5)
    data = prepared(own, rows_of(tmp_path, *ROWS), None).train
    example = data.example(2, None)  # type: ignore[arg-type]
    bare = own.tokenizer(ROWS[2]["target"])["input_ids"]
    end = own.tokenizer.eos_token_id
    assert example["labels"].tolist() == [*bare[:4], end]
    assert example["decoder_input_ids"].tolist() == [end, *bare[:4]]  # as BART begins


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"source": "", "target": "a"}, {}, r"line 1: `source` is empty"),
        ({"source": "a", "target": 3}, {}, r"line 1: `target` must be a text"),
        ({"source": "a"}, {}, r"no column `target`"),
        ({"source": "a", "target": "b"}, {"target_len": 65}, r"objective.target_len=65: the network has 64 positions"),
        ({"source": "a", "target": "b"}, {"sampling": {"max_new_tokens": 65}}, r"sampling.max_new_tokens=65"),
    ],
)
def test_bad_rows_and_lengths_are_named(row: Any, options: Any, message: str, tmp_path: Path) -> None:
    own, teacher = writer(BART, **options), writer(BART)
    prepared(teacher, rows_of(tmp_path, *ROWS, name="good.jsonl"), None)
    own.tokenizer = copy.deepcopy(teacher.tokenizer)
    with pytest.raises(UserError, match=message):
        prepared(own, rows_of(tmp_path, row), None)


def test_an_unknown_option_of_a_sample_is_refused(tmp_path: Path) -> None:
    own = writer(BART)
    with pytest.raises(UserError, match=r"no sampling option is called `beam`. Did you mean `beams`"):
        own.sample({}, Request(1, torch.Generator(), ("a",), {"beam": 2}))
