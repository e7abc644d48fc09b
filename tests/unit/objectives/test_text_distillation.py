"""Distillation against sums over texts one by one, and what it says of teachers that do not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from scaletrain.config import Recipe
from scaletrain.errors import UserError
from scaletrain.export import gate
from scaletrain.finished import FinishedStage
from scaletrain.networks.build import build
from scaletrain.runs import train
from tests.recipes.tiny import make_networks
from tests.unit.objectives.prepared import prepared
from tests.unit.objectives.texts import from_recipe, network, rows_of, whole_batch

ROWS = [
    {"text": f"the {w} sat on a {v}", "label": ["cats", "dogs"][i % 2]}
    for i, (w, v) in enumerate(zip(["cat", "dog", "fish"] * 3, ["mat", "tree"] * 4, strict=False))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder, `bert`, and a wider teacher of 3 layers that tells dogs from cats, in this order."""
    folder = tmp_path_factory.mktemp("networks")
    make_networks(folder)
    size = {"vocab_size": 32, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3}
    classes = {"id2label": {0: "dogs", 1: "cats"}, "label2id": {"dogs": 0, "cats": 1}}
    torch.manual_seed(1)
    wide = BertForSequenceClassification(
        BertConfig(**size, num_attention_heads=2, max_position_embeddings=64, **classes)
    )
    wide.save_pretrained(folder / "wide")
    AutoTokenizer.from_pretrained(folder / "bert").save_pretrained(folder / "wide")
    return folder


def distiller(folder: Path, teacher: dict[str, Any] | None = None, both: bool = True, **options: Any) -> Any:
    networks = {
        "student": {"path": str(folder / "bert")},
        "teacher": {"path": str(folder / "wide"), "frozen": True, **(teacher or {})},
    }
    players = {"student": {"networks": ["student", "projection"]}} if both else {}
    return from_recipe({"type": "text_distillation", **options}, networks, None, **players)


def test_loss_is_the_sum_over_texts(folder: Path, tmp_path: Path) -> None:
    alpha, heat = 0.3, 3.0
    own = distiller(folder, alpha=alpha, temperature=heat, hidden=0.5, follows=[2, 0])
    batch = whole_batch(prepared(own, rows_of(tmp_path, *ROWS), None).train)
    networks = {name: network(own, name, seed) for seed, name in enumerate(own.networks())}
    assert sorted(networks) == ["projection", "student", "teacher"]
    assert networks["student"].config.id2label == {0: "dogs", 1: "cats"}
    hard = soft = distance = 0.0
    right = same = tokens = 0
    for row in ROWS:
        ids = torch.tensor([own.tokenizer(row["text"])["input_ids"]])
        with torch.no_grad():
            student, teacher = (networks[n](ids, output_hidden_states=True) for n in ("student", "teacher"))
            p, q = student.logits[0].double(), teacher.logits[0].double()
            label = ["dogs", "cats"].index(row["label"])
            hard -= float(p.log_softmax(-1)[label])
            told, said = (q / heat).softmax(-1), (p / heat).softmax(-1)
            soft += heat**2 * float((told * (told / said).log()).sum())
            for mine, other in ((0, 0), (1, 3), (2, 1)):
                gap = networks["projection"](student.hidden_states[mine][0]) - teacher.hidden_states[other][0]
                distance += float((gap**2).mean(-1).sum()) / 3
        right, same = right + int(p.argmax() == label), same + int(p.argmax() == q.argmax())
        tokens += ids.shape[1]
    terms = own.loss(own.turns[0], networks, batch)
    found = {name: (float(t.sum.detach()), t.per, t.weight) for name, t in terms.items()}
    assert found == {
        "hard": (pytest.approx(hard, rel=1e-4), "samples", 1 - alpha),
        "soft": (pytest.approx(soft, rel=1e-4), "samples", alpha),
        "hidden": (pytest.approx(distance, rel=1e-4), "tokens", 0.5),
        "accuracy": (right, "samples", 0.0),
        "agreement": (same, "samples", 0.0),
    }
    assert own.counts(own.turns[0], batch) == {"samples": len(ROWS), "tokens": tokens}
    with torch.no_grad():
        judged = own.evaluate(networks, batch)
    assert float(judged["loss"].sum) == pytest.approx(hard, rel=1e-4)
    assert (int(judged["accuracy"].sum), int(judged["agreement"].sum)) == (right, same)


def test_hidden_states_are_spread_evenly_and_learned(folder: Path, tmp_path: Path) -> None:
    own = distiller(folder, hidden=1.0, alpha=1.0)
    batch = whole_batch(prepared(own, rows_of(tmp_path, *ROWS), None).train)
    assert own._follows == [0, 1, 3]
    networks: Any = {name: build(name, spec).eval() for name, spec in own.networks().items()}
    trained = [p for name in ("student", "projection") for p in networks[name].parameters()]
    optimizer = torch.optim.Adam(trained, lr=3e-3)
    first = own.loss(own.turns[0], networks, batch)["hidden"].sum.detach()
    for _ in range(30):
        terms = own.loss(own.turns[0], networks, batch)
        optimizer.zero_grad()
        (terms["soft"].sum + terms["hidden"].sum).backward()
        optimizer.step()
    assert terms["hidden"].sum < 0.7 * first
    assert all(p.grad is None for p in networks["teacher"].parameters())


def test_a_folder_of_ours_tells_the_classes(folder: Path, tmp_path: Path) -> None:
    own = distiller(folder)
    prepared(own, rows_of(tmp_path, *ROWS), None)
    module = network(own, "student")
    module.save_pretrained(tmp_path / "run")
    own.save_assets("student", tmp_path / "run")
    again = distiller(folder, {"path": None, "from": "run:somewhere/model"})
    again.restore({"teacher": tmp_path / "run"})
    prepared(again, rows_of(tmp_path, *ROWS), None)
    assert again.classes == own.classes
    assert "projection" not in again.networks()
    assert set(again.networks()["teacher"].config) == set()  # those of the run that it comes from


@pytest.mark.parametrize(
    ("teacher", "options", "message"),
    [
        ({"frozen": False}, {}, r"networks.teacher must have `frozen: true`"),
        ({"path": None}, {}, r"and `from` or `path`"),
        ({"path": "bert"}, {}, r"`.*bert` does not classify yet: finetune it first"),
        ({"path": "llama"}, {}, r"its tokenizer is not the student's"),
        ({"path": "finetuned"}, {}, r"line 1: `label` 'cats' is no class"),
        ({}, {"hidden": 1.0, "follows": [0]}, r"objective.follows: \[0\]: give one of the teacher's 3 layers"),
        ({}, {"hidden": 1.0, "follows": [0, 3]}, r"objective.follows: \[0, 3\]"),
        ({}, {"hidden": 1.0, "both": False}, r"set players.student.networks=\[student, projection\]"),
    ],
)
def test_what_does_not_fit_is_refused(
    teacher: dict[str, Any], options: Any, message: str, folder: Path, tmp_path: Path
) -> None:
    if teacher.get("path"):
        teacher = {"path": str(folder / teacher["path"])}
    with pytest.raises(UserError, match=message):
        prepared(distiller(folder, teacher, **options), rows_of(tmp_path, *ROWS), None)


def test_a_student_of_other_classes_is_refused(folder: Path, tmp_path: Path) -> None:
    networks = {
        "student": {"path": str(folder / "finetuned")},
        "teacher": {"path": str(folder / "wide"), "frozen": True},
    }
    own = from_recipe({"type": "text_distillation"}, networks, None)
    with pytest.raises(UserError, match=r"networks.student: its classes are LABEL_0, LABEL_1; the teacher's are dogs"):
        prepared(own, rows_of(tmp_path, *ROWS), None)


def test_an_export_is_compared_on_rows_where_a_run_teaches(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SCALETRAIN_CACHE", str(tmp_path / "cache"))
    rows_of(tmp_path, *ROWS)
    shared = {
        "data": {"train": str(tmp_path / "rows.jsonl")},
        "train": {"duration": "1 step", "global_batch": 4},
        "evaluate": {"samples": 0},
    }
    taught = {"model": {"path": str(folder / "bert")}}
    first = {"objective": {"type": "text_classification"}, "networks": taught, **shared}
    train(Recipe.model_validate(first), "first", tmp_path)
    teacher = {"frozen": True, "from": f"run:{tmp_path / 'first'}/model"}
    networks = {"student": {"path": str(folder / "bert")}, "teacher": teacher}
    second = {"objective": {"type": "text_distillation"}, "networks": networks, **shared}
    run = FinishedStage.open(train(Recipe.model_validate(second), "second", tmp_path))
    probe = gate.probe(run, "student", None)
    assert probe is not None
    assert probe.source == "rows of the run's data"
    assert len(probe.inputs["input_ids"]) == gate.ROWS
    (tmp_path / "rows.jsonl").unlink()
    assert gate.probe(run, "student", torch.nn.Linear(1, 1)) is None
    assert "`student` is not compared on rows of the run's data: " in caplog.text
