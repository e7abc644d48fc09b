"""`scaletrain validate` tells what is learned, without weights."""

from pathlib import Path

import pytest

from tests.launch import run
from tests.recipes.tiny import make_data, overrides

pytestmark = pytest.mark.slow


def test_the_contract_and_some_rows(tmp_path: Path) -> None:
    make_data(tmp_path)
    (tmp_path / "llama" / "model.safetensors").unlink()
    rows = tmp_path / "few.jsonl"
    rows.write_text(
        '{"prompt": "the cat", "completion": " sat on the mat"}\n' * 2 + '{"prompt": "a", "completion": "b"}\n'
    )
    change = [f"data.train={rows}", "data.holdout=0"]
    text = run(["validate", "lm/lora", *overrides("lm/lora", tmp_path), *change, "--data", "3"])
    assert "data: 3 rows, 17 tokens, of which 12 (71%) are learned; 1 rows (such as" in text
    assert "few.jsonl line 1\nthe cat⟦sat on the mat </s>⟧" in text
    assert "lm/lora is valid: " in text
    text = run(["validate", "text/classify", *overrides("text/classify", tmp_path)])
    assert "texts in 2 classes: 0 " in text
