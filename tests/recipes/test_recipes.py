"""Every shipped recipe decodes, trains on tiny data, samples, and resumes bit for bit after a SIGKILL."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest

from scaletrain.catalog import info, names
from scaletrain.recipe import check, load, resolved_yaml, stages
from tests.launch import metrics, run, start, steps
from tests.recipes.tiny import make_data, overrides

pytestmark = pytest.mark.slow
WITHOUT = pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers is not installed")
RECIPES = [pytest.param(name, marks=WITHOUT) if "diffusers" in info(name).needs else name for name in names()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_data(folder)
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_decodes_and_its_resolved_form_is_the_same_recipe(name: str, data: Path, tmp_path: Path) -> None:
    recipe = load(name, overrides(name, data))
    check(recipe)
    (tmp_path / "recipe.yaml").write_text(resolved_yaml(recipe))
    assert load(str(tmp_path / "recipe.yaml")) == recipe
    assert len(stages(recipe)) == max(1, len(recipe.stages))


def final_weights(folder: Path) -> dict[str, bytes]:
    """Return every weight and optimiser file of the last checkpoint of each stage."""
    found = {}
    for checkpoint in sorted(folder.glob("step-*")):
        if json.loads((checkpoint / "manifest.json").read_text())["complete"]:
            found |= {str(p.relative_to(folder)): p.read_bytes() for p in checkpoint.rglob("*.safetensors")}
    assert found
    return found


def last_stage_but_one(name: str, data: Path) -> str:
    """Return the stage in which to kill a run: one that is not the first, where there are several."""
    found = [s.name for s in load(name, overrides(name, data)).stages]
    return found[-2] if len(found) > 2 else found[-1] if found else "main"


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.distributed)])
@pytest.mark.parametrize("name", RECIPES)
def test_killed_and_resumed_is_bit_identical(name: str, processes: int, data: Path, tmp_path: Path) -> None:
    command = ["run", name, *overrides(name, data), "--root", tmp_path]
    run([*command, "--run", "whole"], processes)
    whole = tmp_path / "whole"
    losses = [r[k] for r in metrics(whole) for k in r if k.rpartition("/")[2] == "loss"]
    assert losses
    assert all(map(math.isfinite, losses))

    parts = tmp_path / "parts"
    stage = last_stage_but_one(name, data)
    first = min(r["step"] for r in metrics(whole) if r["stage"] == stage) + (2 if stage != "main" else 9)
    codes, text = start([*command, "--run", "parts"], processes).stop_when(
        lambda: max(steps(parts), default=0) >= first
    )
    assert codes == [-9] * processes, text
    run([*command, "--run", "parts"], processes)
    assert steps(parts) == steps(whole) == list(range(1, int(max(steps(whole))) + 1))
    assert final_weights(parts) == final_weights(whole)


@pytest.mark.parametrize("name", RECIPES)
def test_afterwards(name: str, data: Path, tmp_path: Path) -> None:
    """A finished run verifies, exports, evaluates and, where its family can, samples."""
    folder = tmp_path / "r"
    run(["run", name, *overrides(name, data), "--root", tmp_path, "--run", "r"])
    assert json.loads((folder / "summary.json").read_text())["status"] == "done"
    assert (folder / "curves.png").stat().st_size > 1000
    run(["verify", folder])
    run(["export", folder, tmp_path / "out"])
    assert list((tmp_path / "out").rglob("*.safetensors"))
    codes, text = start(["sample", folder, "--count", "2"]).finish()
    assert codes == [0] or (codes == [2] and "nothing to sample" in text)
    codes, text = start(["run", name, *overrides(name, data), "--root", tmp_path, "--run", "r"]).finish()
    assert codes == [0], text
