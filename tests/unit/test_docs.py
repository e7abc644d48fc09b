"""What the documents show runs as it is shown."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.launch import run

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_family_of_the_guide_learns_a_line(tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "adding-a-family.md").read_text(), re.DOTALL)[0]
    (tmp_path / "regression.py").write_text(code)
    x = np.random.default_rng(0).standard_normal((200, 2))
    y = x @ [2.0, -1.0] + 0.5
    rows = [json.dumps({"x": a.tolist(), "y": float(b)}) for a, b in zip(x, y, strict=True)]
    (tmp_path / "table.jsonl").write_text("\n".join(rows))
    recipe = {"objective": {"type": "regression"}, "data": {"train": str(tmp_path / "table.jsonl")}}
    (tmp_path / "mine.yaml").write_text(json.dumps(recipe))
    change = ["networks.model.config.hidden=[]", "players.model.optimizer.lr=0.05", "train.duration=400 steps"]
    run(["run", tmp_path / "mine.yaml", "--code", tmp_path / "regression.py", *change, "--root", tmp_path])
    weights = load_file(tmp_path / "mine" / "latest" / "networks" / "model" / "model.safetensors")
    assert weights["0.weight"].tolist()[0] == pytest.approx([2.0, -1.0], abs=0.02)
    assert weights["0.bias"].item() == pytest.approx(0.5, abs=0.02)
