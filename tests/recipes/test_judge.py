"""A classifier of another run judges the pictures of a teacher and its students; what cannot judge is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launch import run
from tests.recipes.tiny import overrides

pytestmark = pytest.mark.slow
CLASSIFIER = [
    "objective={type: image_classification, size: 8, channels: 1}",
    "networks.model.config={architecture: resnet18, features: 8}",
    "train={duration: 3 steps, global_batch: 8}",
    "evaluate={batch: 64}",
]


def test_a_classifier_of_another_run_judges_the_table(tmp_path: Path) -> None:
    place = ["--root", tmp_path, "--run"]
    run(["run", "vision/cnn", *CLASSIFIER, *place, "judge"])
    tiny = [*overrides("quickstart", tmp_path)]
    run(["run", "quickstart", *tiny, f"objective.judge=run:{tmp_path}/judge/model", *place, "judged"])
    table = json.loads((tmp_path / "judged/steps.json").read_text())
    assert table["floor"]["frechet"] > 0
    for who in ("teacher", "student"):
        assert all({"frechet", "confident", "entropy"} <= set(figures) for figures in table[who].values())
    tiny.append(f"objective.judge=run:{tmp_path}/judged/student")
    said = run(["run", "quickstart", *tiny, *place, "refused"], expect=2)
    assert "judged/student` is a `unet`, no classifier of pictures" in said
    said = run(["run", "quickstart", *tiny, "objective.size=16", *place, "larger"], expect=2)
    assert "takes pictures of (1, 8, 8), and samples are (1, 16, 16)" in said
    said = run(["run", "distill/ctm_gmm", tiny[-1], *place, "points"], expect=2)
    assert "objective.judge is for the table of a student of pictures" in said
    said = run(["evaluate", tmp_path / "judged"])
    assert "Fréchet distance" in said
