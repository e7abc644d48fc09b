"""Every mistake of a user: exit status 2, one message that names it, no traceback, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.launch import run, start
from tests.recipes.tiny import make_data, overrides

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    make_data(folder)
    return folder


def refused(arguments: list[object], root: Path, processes: int = 1) -> str:
    """Run a command that must be refused. Returns its one message."""
    before = sorted(root.rglob("*"))
    codes, text = start(["run", *arguments, "--root", root], processes).finish()
    assert codes == [2] * processes, text
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, text
    assert sorted(root.rglob("*")) == before, "something was written"
    return lines[0]


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def small(name: str, data: Path, *changes: str) -> list[object]:
    return [name, *overrides(name, data), *changes]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("trian.duration=3 steps", ["trian", "train"]),
        ("players.model.optimizer.lrr=1", ["players.model.optimizer.lrr", "lr"]),
        ("networks.model.config.hidden_sizes=8", ["networks.model.config", "hidden_sizes", "hidden_size"]),
        ("objective.label_smothing=0.1", ["objective.label_smothing", "label_smoothing"]),
        ("train.global_batch=many", ["train.global_batch", "many"]),
        ("players.model.clip=-1", ["players.model.clip"]),
        ("train.duration=5 weeks", ["train.duration", "steps, epochs"]),
        ("data.train=nowhere.txt", ["nowhere.txt"]),
        ("train.micro_batch=3", ["train.global_batch=8", "micro"]),
        ("players.modle.clip=1", ["players.modle", "model"]),
    ],
)
def test_keys_and_values(change: str, words: list[str], data: Path, tmp_path: Path) -> None:
    message = refused(small("lm/pretrain", data, change), tmp_path)
    for word in words:
        assert word in message


def broken_line(folder: Path, data: Path) -> tuple[list[object], list[str]]:
    good = {"prompt": "a", "completion": "b"}
    path = lines(folder / "broken.jsonl", good, good, '{"prompt": "a", "compl', good)
    return small("lm/lora", data, f"data.train={path}"), ["broken.jsonl", "line 3"]


def no_column(folder: Path, data: Path) -> tuple[list[object], list[str]]:
    path = lines(folder / "columns.jsonl", {"sentence": "a cat", "label": 0}, {"sentence": "a dog", "label": 1})
    return small("text/classify", data, f"data.train={path}", "data.holdout=0"), ["columns.jsonl", "text", "sentence"]


def empty(folder: Path, data: Path) -> tuple[list[object], list[str]]:
    return small("text/classify", data, f"data.train={lines(folder / 'empty.jsonl')}"), ["empty.jsonl"]


def all_masked(folder: Path, data: Path) -> tuple[list[object], list[str]]:
    rows = [{"messages": [{"role": "user", "content": "a cat"}]}] * 3
    path = lines(folder / "masked.jsonl", *rows)
    return small("lm/lora", data, f"data.train={path}", "data.holdout=0"), ["masked.jsonl", "learn"]


def empty_answers(folder: Path, data: Path) -> tuple[list[object], list[str]]:
    path = lines(folder / "silent.jsonl", *[{"prompt": "a cat", "completion": c} for c in ("sat", "ran", "", "")])
    words = ["50.0% of the rows", "silent.jsonl line 3", "the completion is empty", "objective.max_lost"]
    return small("lm/lora", data, f"data.train={path}", "data.holdout=0"), words


def cut_answers(folder: Path, data: Path) -> tuple[list[object], list[str]]:
    rows = [{"prompt": "a cat " * n, "completion": "sat"} for n in (1, 1, 9)]
    path = lines(folder / "long.jsonl", *rows)
    words = ["33.3% of the rows", "long.jsonl line 3", "data.seq_len=8", "objective.max_lost"]
    return small("lm/lora", data, f"data.train={path}", "data.holdout=0", "data.seq_len=8"), words


def template_refuses(folder: Path, data: Path) -> tuple[list[object], list[str]]:
    template = folder / "strict.jinja"
    template.write_text("{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}"
                        "{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}")  # fmt: skip
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "cat"}]
    path = lines(folder / "chat.jsonl", {"messages": chat}, {"messages": [{"role": "system", "content": "b"}, *chat]})
    change = [f"data.train={path}", "data.holdout=0", f"objective.chat_template={template}"]
    return small("lm/lora", data, *change), ["chat.jsonl line 2", "no system here"]


def class_out_of_range(folder: Path, data: Path) -> tuple[list[object], list[str]]:
    path = lines(folder / "classes.jsonl", {"text": "a cat", "label": 0}, {"text": "a dog", "label": 7})
    return small("text/classify", data, f"data.train={path}", "data.holdout=0", "objective.num_classes=2"), [
        "classes.jsonl line 2",
        "7",
    ]


def corrupt_image(folder: Path, data: Path) -> tuple[list[object], list[str]]:
    for kind in ("cats", "dogs"):
        (folder / "photos" / kind).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((16, 16), 10 * i, np.uint8)).save(folder / "photos" / kind / f"{i}.png")
    bad = folder / "photos" / "dogs" / "2.png"
    bad.write_bytes(bad.read_bytes()[:40])
    return small("vision/cnn", data, "data.train.rows=8", f"data.train={folder / 'photos'}"), ["dogs/2.png"]


def vocabulary(folder: Path, data: Path) -> tuple[list[object], list[str]]:
    shutil.copytree(data / "llama", folder / "narrow")
    tokenizer = json.loads((folder / "narrow" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"word{i}": 20 + i for i in range(30)}
    (folder / "narrow" / "tokenizer.json").write_text(json.dumps(tokenizer))
    return small("lm/lora", data, f"networks.model.path={folder / 'narrow'}"), ["50", "32"]


def unknown_recipe(folder: Path, data: Path) -> tuple[list[object], list[str]]:
    return ["lm/pretrian"], ["lm/pretrian", "lm/pretrain"]


def python_tag(folder: Path, data: Path) -> tuple[list[object], list[str]]:
    path = folder / "tag.yaml"
    path.write_text("objective: {type: gan}\ndata:\n  train: !!python/object/apply:os.system ['true']\n")
    return [path], ["tag.yaml", "line 3"]


def unwritable(folder: Path, data: Path) -> tuple[list[object], list[str]]:
    (folder / "file").write_text("")
    return small("vision/cnn", data, "--run", "../file/run"), ["cannot be written", "file"]


CASES: list[Callable[[Path, Path], tuple[list[object], list[str]]]] = [
    broken_line, no_column, empty, all_masked, empty_answers, cut_answers, template_refuses, class_out_of_range,
    corrupt_image, vocabulary, unknown_recipe, python_tag, unwritable,
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_data_and_files(
    case: Callable[[Path, Path], tuple[list[object], list[str]]], data: Path, tmp_path: Path
) -> None:
    (tmp_path / "given").mkdir()
    (tmp_path / "root").mkdir()
    arguments, words = case(tmp_path / "given", data)
    if case is unwritable:
        arguments = [a if a != "../file/run" else "../given/file/run" for a in arguments]
    message = refused(arguments, tmp_path / "root")
    for word in words:
        assert word in message


@pytest.mark.distributed
def test_more_processes_than_samples(data: Path, tmp_path: Path) -> None:
    path = lines(data / "one.jsonl", {"prompt": "a", "completion": "b"})
    message = refused(small("lm/lora", data, f"data.train={path}", "data.holdout=0"), tmp_path, processes=2)
    assert "2 processes" in message
    assert "1 example" in message


def test_a_folder_of_another_recipe_is_left_alone(data: Path, tmp_path: Path) -> None:
    run(["run", *small("vision/cnn", data), "--root", tmp_path, "--run", "taken"])
    message = refused([*small("vision/cnn", data, "players.model.optimizer.lr=1"), "--run", "taken"], tmp_path)
    assert "players.model.optimizer.lr" in message
    assert "--run" in message
    refused([*small("vision/cnn", data), "--run", "taken", "--fresh"], tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["checkpoint.best=acuracy"], ["checkpoint.best", "acuracy", "accuracy"]),
        (["data.holdout=0", "evaluate.patience=1"], ["data.eval", "data.holdout"]),
        (["networks.modle.config.features=8"], ["networks.modle", "model"]),
        (["players.model.networks=[modle]"], ["players.model.networks", "modle", "model"]),
    ],
)
def test_names_that_only_the_family_knows(change: list[str], words: list[str], data: Path, tmp_path: Path) -> None:
    message = refused(small("vision/cnn", data, *change), tmp_path)
    for word in words:
        assert word in message
