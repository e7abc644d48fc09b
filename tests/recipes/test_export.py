"""What is exported is what was trained, read back by the libraries alone; what differs gets no name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from scaletrain.checkpoint import reader
from scaletrain.config import AdapterSpec, NetworkSpec
from scaletrain.errors import UserError
from scaletrain.export import gate, plain
from scaletrain.export import run as exporting
from scaletrain.export.run import Form, export_run
from scaletrain.networks.adapters import add_adapter
from scaletrain.networks.build import save
from scaletrain.quantize import quantize_run
from scaletrain.shelf import Shelf
from tests.launch import run
from tests.recipes.tiny import make_data, overrides

pytestmark = pytest.mark.slow
IDS = torch.arange(2, 30)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    make_data(folder)
    return folder


def train(folder: Path, recipe: str, name: str, *changes: str) -> Path:
    few = ["train.duration=6 steps", "evaluate.every=6 steps", "evaluate.samples=0"]
    run(["run", recipe, *overrides(recipe, folder), *few, *changes, "--root", folder, "--run", name])
    return folder / name


@pytest.fixture(scope="module")
def tied(folder: Path) -> Path:
    """A whole network whose head is its embedding, averaged."""
    return train(folder, "lm/pretrain", "tied", "players.model.ema={decay: 0.9}", f"data.eval={folder}/text.txt")


@pytest.fixture(scope="module")
def classifier(folder: Path) -> Path:
    return train(folder, "text/classify", "classifier", "players.model.optimizer.lr=0.01")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the gate load what was written in this process, which is sooner done."""

    def elsewhere(asked: dict[str, Any], probe: gate.Probe) -> tuple[torch.Tensor, dict[str, Any]]:
        module, faults = plain.load(**asked)
        found = plain.fingerprints(module)
        return plain.outputs(module, probe.inputs), {"faults": faults, "fingerprints": found}

    monkeypatch.setattr(gate, "elsewhere", elsewhere)


def logits(module: Any, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module.eval()(**inputs or {"input_ids": IDS}).logits


def trained(run: Path) -> Any:
    checkpoint = reader.newest(run)
    assert checkpoint is not None
    return Shelf(run).open(checkpoint, "model")


def card(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "README.md").read_text().split("---")[1])


def test_peft_loads_an_adapter_and_the_base_it_was_trained_over(tied: Path, folder: Path) -> None:
    source = [f"networks.model.from=run:{tied}/model", "networks.model.path=null", "players.model.ema={decay: 0.9}"]
    adapted = train(folder, "lm/lora", "adapted", *source)
    base, own = export_run(adapted, folder / "adapted-out")
    assert [base.path.name, own.path.name] == ["model-base", "model"]
    assert "rows of the run's data: max |difference| of logits 0 " in own.notes[0]
    loaded = AutoPeftModelForCausalLM.from_pretrained(own.path)
    assert torch.equal(logits(loaded), logits(trained(adapted)))
    assert (own.path / "generation_config.json").exists()
    assert AutoTokenizer.from_pretrained(own.path).eos_token
    assert card(own.path)["library_name"] == "peft"


RANK = {"r": 4, "alpha": 8}


def adapted(folder: Path, name: str, adapter: dict[str, Any], *changes: str) -> Path:
    changed = [f"networks.model.adapter={json.dumps(adapter)}", "players.model.optimizer.lr=0.05", *changes]
    found = train(folder, "lm/lora", name, *changed)
    before = logits(trained_over(folder))
    assert not torch.allclose(logits(trained(found))[..., : before.shape[-1]], before, atol=1e-3)
    return found


def trained_over(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "llama")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "pissa", "olora", "vera", "ia3"])
def test_each_kind_of_adapter_merged_and_not(kind: str, folder: Path) -> None:
    rank = {"vera": {"r": 8}, "ia3": {}}.get(kind, RANK)
    source = adapted(folder, kind, {"type": kind, **rank})
    expected = logits(trained(source))
    (own,) = export_run(source, folder / f"{kind}-out")
    exact = {"rtol": 1e-5, "atol": 1e-6} if kind in ("pissa", "olora") else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(logits(AutoPeftModelForCausalLM.from_pretrained(own.path)), expected, **exact)
    (own,) = export_run(source, folder / f"{kind}-merged", Form(merge=True))
    loaded = AutoModelForCausalLM.from_pretrained(own.path)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("here")
def test_an_adapter_that_has_no_weights_to_be_merged_into(folder: Path) -> None:
    source = adapted(folder, "prompt", {"type": "prompt", "virtual_tokens": 3}, "data.packing=false")
    (own,) = export_run(source, folder / "prompt-out")
    found = logits(AutoPeftModelForCausalLM.from_pretrained(own.path))
    assert torch.equal(found[:, 3:], logits(trained(source)))
    with pytest.raises(UserError, match="`model`: its kind of adapter cannot be merged"):
        export_run(source, folder / "prompt-merged", Form(merge=True))
    assert list((folder / "prompt-merged").glob("*")) == []


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("kind", ["tokens", "merge"])
def test_an_adapter_over_a_base_of_its_own(kind: str, folder: Path) -> None:
    """Rows for new tokens, or another adapter folded in: the base is no folder that there is already."""
    if kind == "tokens":
        source = adapted(folder, kind, RANK, "networks.model.config.vocab_size=40")
    else:
        other = add_adapter(trained_over(folder), AdapterSpec(r=2))
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(0.02)
        save(other, NetworkSpec(), folder / "other")
        source = adapted(folder, kind, {**RANK, "merge": [str(folder / "other")]})
    expected = logits(trained(source))
    base, own = export_run(source, folder / f"{kind}-out")
    assert base.path.name == "model-base"
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(own.path)), expected)
    (own,) = export_run(source, folder / f"{kind}-merged", Form(merge=True))
    loaded = AutoModelForCausalLM.from_pretrained(own.path)
    assert loaded.config.vocab_size == expected.shape[-1] == (40 if kind == "tokens" else 32)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_an_adapter_over_a_quantised_base(how: str, folder: Path, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("bitsandbytes")
    source = adapted(folder, how, RANK, f"networks.model.quantize={how}")
    if how == "int8":
        request.getfixturevalue("here")  # a new process costs seconds, and one has shown that it can
    (own,) = export_run(source, folder / f"{how}-out")
    assert own.notes[0].startswith("loaded by the library alone, on rows of the run's data: max |difference|")
    whole = logits(AutoPeftModelForCausalLM.from_pretrained(own.path))  # over the base as it was before
    request.getfixturevalue("here")
    (own,) = export_run(source, folder / f"{how}-merged", Form(merge=True))
    assert "from what was trained (base)" in own.notes[1]
    loaded = AutoModelForCausalLM.from_pretrained(own.path)
    assert not hasattr(loaded.config, "quantization_config")
    torch.testing.assert_close(logits(loaded), whole, rtol=1e-4, atol=1e-6)


def test_a_classifier_of_an_adapter(classifier: Path, folder: Path) -> None:
    (own,) = export_run(classifier, folder / "classifier-out", Form(merge=True))
    loaded = AutoModelForSequenceClassification.from_pretrained(own.path)
    assert loaded.config.id2label == {0: "0", 1: "1"}
    batch = AutoTokenizer.from_pretrained(own.path)(["a cat sat", "the dog"], padding=True, return_tensors="pt")
    torch.testing.assert_close(logits(loaded, **batch), logits(trained(classifier), **batch), rtol=1e-4, atol=1e-6)
    facts = card(own.path)
    assert (facts["base_model"], facts["pipeline_tag"]) == ("bert", "text-classification")
    text = (own.path / "README.md").read_text()
    assert "labels.jsonl" in text
    assert "| accuracy |" in text
    assert str(folder) not in text


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def other_weight(out: Path) -> None:
    edit(out / "model.safetensors", lambda t: t["model.layers.1.mlp.up_proj.weight"][0, 0].add_(1e-6))


def unused_row(out: Path) -> None:  # of a token that no text has: no logit tells
    edit(out / "model.safetensors", lambda t: t["model.embed_tokens.weight"][3].mul_(1.001))


def lost_tensor(out: Path) -> None:
    edit(out / "model.safetensors", lambda t: t.pop("model.norm.weight"))


def empty_tensor(out: Path) -> None:
    edit(out / "model.safetensors", lambda t: t.update({"model.norm.weight": torch.empty(0)}))


def untied(out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))


def cut_config(out: Path) -> None:
    (out / "config.json").write_text("{")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_weight, "up_proj.weight` differs"),
        (unused_row, "embed_tokens.weight` differs"),
        (lost_tensor, "model.norm.weight is missing"),
        (empty_tensor, "tensors are empty, as model.norm.weight"),
        (untied, "lm_head.weight is missing"),
    ],
)
def test_an_export_that_differs_gets_no_name(
    damage: Callable[[Path], None], message: str, tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(damage, message, tied, tmp_path, monkeypatch)


def refused(
    damage: Callable[[Path], None], message: str, source: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = exporting.check

    def spoiled(out: Path, *rest: Any) -> Any:
        damage(out)
        return original(out, *rest)

    monkeypatch.setattr(exporting, "check", spoiled)
    with pytest.raises(RuntimeError, match=message) as error:
        export_run(source, place / "out")
    assert str(error.value).startswith("export of model: ")
    assert list((place / "out").iterdir()) == []


def test_what_a_new_process_cannot_load_gets_no_name(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(cut_config, "cannot be loaded by the libraries alone", tied, tmp_path, monkeypatch)


@pytest.mark.usefixtures("here")
def test_an_adapter_that_was_changed_gets_no_name(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(out: Path) -> None:
        edit(out / "adapter_model.safetensors", lambda t: next(t[k] for k in sorted(t) if "lora_B" in k).mul_(1.001))

    refused(damage, "differs after loading it back", classifier, tmp_path, monkeypatch)


@pytest.mark.usefixtures("here")
def test_a_change_of_form_that_moves_the_logits_too_far_is_refused(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = exporting._merged

    def spoiled(*rest: Any) -> Any:
        module = original(*rest)
        with torch.no_grad():
            module.classifier.weight.mul_(1.01)
        return module

    monkeypatch.setattr(exporting, "_merged", spoiled)
    with pytest.raises(RuntimeError, match="merge moved the logits by"):
        export_run(classifier, tmp_path / "out", Form(merge=True))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("method", ["int8", "int8-dynamic", "int4", "bnb-int8"])
def test_quantised(method: Any, tied: Path, tmp_path: Path) -> None:
    if method.startswith("bnb"):
        pytest.importorskip("bitsandbytes")
    written, table = quantize_run(tied, tmp_path / "out", Form(quantize=method, group=16 if method == "int4" else None))
    loaded = AutoModelForCausalLM.from_pretrained(written[0].path)
    assert loaded.config.quantization_config is not None
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    expected = logits(trained(tied))
    found = logits(loaded)
    assert not torch.equal(found, expected)
    assert (found - expected).abs().max() < (0.3 if method == "int4" else 0.05) * expected.abs().max()
    rows = {line[:12].strip(): line.split()[-3:] for line in table.splitlines()}
    assert {"loss", "perplexity", "on disk", "in memory", "tokens/s"} <= rows.keys()
    sizes = [float(number) for number in table.split("in memory")[1].split("\n")[0].split()[::2]]
    assert sizes[1] < 0.75 * sizes[0]


@pytest.mark.usefixtures("here")
def test_trained_for_int4_and_then_in_it(folder: Path, tmp_path: Path) -> None:
    qat = train(folder, "lm/qat", "qat", f"data.eval={folder}/prompts.jsonl")
    expected = logits(trained(qat))
    (own,) = export_run(qat, tmp_path / "int4", Form(quantize="int4"))
    assert "(trained for)" in own.notes[1]
    found = logits(AutoModelForCausalLM.from_pretrained(own.path))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    (own,) = export_run(qat, tmp_path / "float")
    assert own.notes[0].startswith("trained for int4, and not in it")
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(own.path)), expected, atol=1e-4)


@pytest.mark.usefixtures("here")
def test_another_type_without_the_data(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "prompts.jsonl", folder / "moved.jsonl")
    source = train(folder, "lm/lora", "moved", f"data.train={folder}/moved.jsonl", "data.holdout=0")
    with pytest.raises(UserError, match="there is no evaluation data: give --data FILE"):
        quantize_run(source, tmp_path / "int8", Form(quantize="int8"))
    (folder / "moved.jsonl").unlink()
    (own,) = export_run(source, tmp_path / "out", Form(merge=True, dtype="bfloat16"))
    assert "tokens in turn, since the run's data cannot be read" in own.notes[0]
    assert AutoModelForCausalLM.from_pretrained(own.path).dtype == torch.bfloat16


def test_messages(tied: Path, classifier: Path, tmp_path: Path) -> None:
    for option, message in (
        ({"dtype": "bfloat17"}, r"--dtype bfloat17: it is one of .* Did you mean `bfloat16`"),
        ({"quantize": "int3"}, r"--quantize int3: it is one of .* Did you mean `int"),
        ({"quantize": "int8", "group": 32}, "--group is for int4"),
    ):
        with pytest.raises(UserError, match=message):
            Form(**option)
    for source, form, message in (
        (tied, Form(merge=True), "`model`: there is no adapter to merge"),
        (classifier, Form(dtype="float16"), "say --merge, too"),
        (tied, Form(quantize="int4"), "groups of 32 do not divide the 16 inputs"),
        (tied, Form(quantize="bnb-nf4"), "take int4"),
    ):
        with pytest.raises(UserError, match=message):
            export_run(source, tmp_path / "out", form)
        assert list((tmp_path / "out").glob("*")) == []
