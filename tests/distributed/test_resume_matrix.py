"""What any engine saves, any other goes on with, on other numbers of processes too: as one process all along."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.distributed.engines import ENGINES, assert_close
from tests.launch import metrics, run
from tests.recipes.tiny import make_data, overrides

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

WAYS = {"one": (1, ENGINES["ddp"]), **{name: (2, variables) for name, variables in ENGINES.items()}}
"""Processes and variables."""
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
"""Of tensors. An Adam update of a weight whose gradient is near 0 magnifies the order of its summation."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("matrix")
    make_data(folder)
    return folder


def command(name: str, data: Path, steps: int, every: int) -> list[object]:
    averages = [f"players.{p}.ema={{decay: 0.9}}" for p in (("generator", "critic") if "gan" in name else ("model",))]
    own = ["data.holdout=0"] if name == "lm/lora" else []
    words = ["run", name, *overrides(name, data), *averages, *own, f"train.duration={steps} steps"]
    words += ["evaluate.every=1000 steps", "evaluate.samples=0", "train.micro_batch=2", "data.workers=0"]
    return [*words, f"checkpoint.every={every} steps", "checkpoint.keep=100", "--root", data]


def train(words: list[object], run_name: str, way: str) -> None:
    processes, variables = WAYS[way]
    run([*words, "--run", run_name], processes, variables=variables)


def cut(folder: Path, step: int) -> None:
    """Have a run folder be as it was when a checkpoint was made."""
    (folder / "latest").unlink()
    for checkpoint in folder.glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)


def losses(folder: Path) -> list[float]:
    return [v for r in metrics(folder) for k, v in sorted(r.items()) if k.rpartition("/")[2] == "loss"]


def engine(folder: Path) -> str:
    return json.loads((folder / "latest" / "manifest.json").read_text())["engine"]


@pytest.fixture(scope="module")
def sources(data: Path) -> Path:
    """Six steps under each engine, saved at the third."""
    words = command("lm/pretrain", data, 6, 3)
    for way in WAYS:
        train(words, way, way)
    return data


@pytest.mark.parametrize("source", WAYS)
def test_every_engine_goes_on_with_it(source: str, sources: Path, tmp_path: Path) -> None:
    expected = losses(sources / "one")
    assert losses(sources / source) == pytest.approx(expected, rel=1e-6)
    assert_close(sources / source / "latest", sources / "one" / "latest", **CLOSE)
    for target in WAYS:
        if target == source:
            continue
        folder = sources / f"{source}-{target}"
        shutil.copytree(sources / source, folder, symlinks=True)
        cut(folder, 3)
        train(command("lm/pretrain", sources, 6, 3), folder.name, target)
        assert losses(folder) == pytest.approx(expected, rel=1e-6), target
        assert engine(folder) == engine(sources / target)
        assert_close(folder / "latest", sources / "one" / "latest", **CLOSE)


@pytest.mark.parametrize("name", ["gan/dcgan", "lm/lora"])
def test_from_one_to_the_next(name: str, data: Path) -> None:
    words = command(name, data, 10, 2)
    whole, parts = data / f"{name.replace('/', '-')}-whole", data / f"{name.replace('/', '-')}-parts"
    train(words, whole.name, "one")
    for number, way in enumerate(("ddp", "zero3", "one", "fsdp2", "zero1")):
        if number:
            cut(parts, 2 * number)
        train(words, parts.name, way)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-6)
    used = [json.loads(path.read_text())["engine"] for path in sorted(parts.glob("step-*/manifest.json"))]
    assert used == ["data_parallel", "zero3", "data_parallel", "fsdp2", "zero1"]
    assert_close(parts / "latest", whole / "latest", **CLOSE)
