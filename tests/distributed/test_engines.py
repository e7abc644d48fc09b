"""Every engine trains as one plain process does."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from scaletrain.catalog import RECIPES as SHIPPED
from tests.distributed.engines import ENGINES
from tests.launch import metrics, run, start, steps
from tests.recipes.test_recipes import final_weights
from tests.recipes.tiny import make_data, overrides

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RECIPES = ("lm/pretrain", "lm/lora", "gan/dcgan", "quickstart", "distill/dmd2")
TOLERANCE = {
    "fp32": dict.fromkeys(ENGINES, 1e-5),
    "bf16": {**dict.fromkeys(ENGINES, 1e-5), "fsdp2": 5e-3, "zero3": 2e-3},
}
"""Relative, of every loss. FSDP2 gathers norms, biases and embeddings in bf16, too, where autocast leaves them in fp32;
DeepSpeed has a linear layer of its own under ZeRO-3, which adds the bias after the product was rounded."""
GAME = {
    "fp32": dict.fromkeys(ENGINES, 2e-5),
    "bf16": {"ddp": 1e-5, "fsdp2": 1e-2, "zero1": 1e-2, "zero2": 1e-2},
}
"""The same for distribution matching: three players, each of which takes over what the others round. In bf16 a last bit
of fp32 is enough for that. Under ZeRO-3 its convolutions do not train in bf16 yet."""
SAVED = {"ddp": "data_parallel"}
"""Names of engines in a manifest, where they are others."""

_worst: dict[tuple[str, str], dict[str, float]] = {}
"""The largest relative error of a loss, by recipe and precision, and by engine."""


@pytest.fixture(scope="module", autouse=True)
def table(request: pytest.FixtureRequest) -> Iterator[None]:
    """Print the errors of all cells at the end, and write them to the file that SCALETRAIN_TABLE names."""
    yield
    rows = [
        f"| `{name}` | {precision} | " + " | ".join(f"{errors[e]:.1e}" if e in errors else "" for e in ENGINES) + " |"
        for (name, precision), errors in sorted(_worst.items(), key=lambda row: (row[0][1] != "fp32", row[0][0]))
    ]
    if not rows:
        return
    head = [f"| recipe | precision | {' | '.join(ENGINES)} |", "|---" * (2 + len(ENGINES)) + "|"]
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print("", *head, *rows, sep="\n")
    if "SCALETRAIN_TABLE" in os.environ:
        Path(os.environ["SCALETRAIN_TABLE"]).write_text("\n".join([*head, *rows]) + "\n")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipes' data; the quickstart cut to its teacher and the first student; dmd2 after a teacher of its own."""
    folder = tmp_path_factory.mktemp("engines")
    make_data(folder)
    (folder / "held.txt").write_text("the cat sat under a tree and then slept\n" * 12)
    quickstart = yaml.safe_load((SHIPPED / "quickstart.yaml").read_text())
    teacher, student = quickstart["stages"][:2]
    teacher["networks"]["model"]["config"] = {"features": [8, 16], "middle": 0}
    teacher["train"] = {"duration": "3 steps"}
    student["train"] = {"duration": "20 steps"}
    student["objective"]["compare_samples"] = 64
    quickstart |= {"stages": [teacher, student]}
    quickstart["data"]["train"] = {"path": "sklearn:digits", "rows": 100}
    (folder / "quickstart.yaml").write_text(yaml.safe_dump(quickstart))
    matched = yaml.safe_load((SHIPPED / "distill" / "dmd2.yaml").read_text())
    none = dict.fromkeys(matched["players"])
    network = {"from": "stage:teacher/model"}
    matched["networks"] = {"student": network, "teacher": {**network, "frozen": True}, "critic": {}}
    matched["networks"]["critic"]["config"] = {"features": [8, 16]}
    matched["objective"] |= {"steps": 2, "every": 2, "compare_samples": 64}
    matched["data"] = quickstart["data"]
    matched["stages"] = [
        {**teacher, "networks": {**dict.fromkeys(matched["networks"]), **teacher["networks"]}},
        {"name": "match", "train": {"duration": "20 steps"}},
    ]
    matched["stages"][0]["players"] |= none
    (folder / "dmd2.yaml").write_text(yaml.safe_dump(matched))
    return folder


def command(name: str, data: Path, *changes: str) -> list[object]:
    """Return the command of a recipe made small: 20 steps, two evaluations, averages of all networks."""
    always = ["train.global_batch=8", "train.micro_batch=2", "evaluate.every=10 steps", "evaluate.samples=0"]
    always += ["log.every=1", "checkpoint.every=1000 steps", *changes]
    if name in ("quickstart", "distill/dmd2"):
        return ["run", data / f"{Path(name).name}.yaml", *always, "train.micro_batch=4"]
    averages = [f"players.{p}.ema={{decay: 0.9}}" for p in (("generator", "critic") if "gan" in name else ("model",))]
    own = {
        "lm/pretrain": [f"data.eval={data}/held.txt"],
        "lm/lora": ["data.holdout=0.1", "players.model.optimizer.lr=0.01"],  # else the loss hardly moves
    }
    return ["run", name, *overrides(name, data), "train.duration=20 steps", *averages, *own.get(name, []), *always]


def losses(folder: Path) -> list[float]:
    """Return every loss of the run, of training and of evaluations with averaged weights, in order."""
    return [v for r in metrics(folder) for k, v in sorted(r.items()) if k.rpartition("/")[2] == "loss"]


@pytest.mark.parametrize(
    ("name", "precision"), [*((n, p) for p in TOLERANCE for n in RECIPES), ("text/classify", "fp32")]
)
def test_two_processes_train_as_one(name: str, precision: str, data: Path, tmp_path: Path) -> None:
    words = [*command(name, data, f"train.precision={precision}"), "--root", tmp_path]
    run([*words, "--run", "one"])
    expected = torch.tensor(losses(tmp_path / "one"), dtype=torch.float64)
    assert len(expected) >= 22
    limits = (GAME if name == "distill/dmd2" else TOLERANCE)[precision]
    found = _worst.setdefault((name, precision), {})
    for engine in limits:
        run([*words, "--run", engine], 2, variables=ENGINES[engine])
        there = torch.tensor(losses(tmp_path / engine), dtype=torch.float64)
        found[engine] = float(((there - expected) / expected).abs().max())
        manifest = json.loads((tmp_path / engine / "latest" / "manifest.json").read_text())
        assert manifest["engine"] == SAVED.get(engine, engine)
        assert manifest["world_size"] == 2
    assert found == {engine: pytest.approx(0, abs=limit) for engine, limit in limits.items()}


OVERFLOWING = '''
"""A causal language model of whose micro-batches some, on one rank or the other, overflow."""

from typing import final

from scaletrain.objectives import causal_lm

Config = causal_lm.Config


class Objective(causal_lm.Objective):
    def loss(self, turn, networks, batch):
        (term,) = super().loss(turn, networks, batch).values()
        spoil = float("inf") if int(batch["input_ids"].sum()) % 16 == 0 else 1.0
        return {"loss": type(term)(term.sum * spoil, term.per)}
'''


def saved(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what every checkpoint says of the player: its scale and counters."""
    return {
        path.parts[-3]: json.loads(path.read_text())["players"]["model"]
        for path in sorted(folder.glob("step-*/training/state.json"))
    }


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2"])
def test_killed_with_loss_scaling_is_bit_identical(engine: str, data: Path, tmp_path: Path) -> None:
    """Where one rank overflows both skip, and scale and growth counter go on as if nothing had happened."""
    (tmp_path / "overflowing.py").write_text(OVERFLOWING)
    changes = ["objective.type=overflowing", "train.precision=fp16", "checkpoint.every=3 steps", "checkpoint.keep=100"]
    changes += ["train.duration=20 steps", "players.model.scaler={initial: 1024.0, interval: 6}"]
    words = [*command("lm/pretrain", data, *changes), "--code", tmp_path / "overflowing.py", "--root", tmp_path]
    run([*words, "--run", "one"])
    run([*words, "--run", "whole"], 2, variables=ENGINES[engine])
    one, whole, parts = (tmp_path / name for name in ("one", "whole", "parts"))
    trained = [r for r in metrics(whole) if r["kind"] == "train"]
    scales = [r["scale"] for r in trained]
    assert min(scales) < 1024
    assert any(b > a for a, b in pairwise(scales))
    assert [(r["scale"], r["skipped"]) for r in metrics(one) if r["kind"] == "train"] == [
        (r["scale"], r["skipped"]) for r in trained
    ]
    life = start([*words, "--run", "parts"], 2, variables=ENGINES[engine])
    codes, printed = life.stop_when(lambda: max(steps(parts), default=0) >= 9)
    assert codes == [-9, -9], printed
    left = max(saved(parts))
    assert saved(whole)[left]["scaler"]["good"] > 0
    run([*words, "--run", "parts"], 2, variables=ENGINES[engine])
    assert [r["scale"] for r in metrics(parts) if r["kind"] == "train"] == scales
    assert saved(parts) == saved(whole)
    assert final_weights(parts) == final_weights(whole)


def test_the_first_fsdp_is_refused(data: Path, tmp_path: Path) -> None:
    variables = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}
    codes, printed = start([*command("lm/pretrain", data), "--root", tmp_path / "r"], 2, variables=variables).finish()
    assert codes == [2, 2], printed
    assert "fsdp_version: 2" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "r").exists()
