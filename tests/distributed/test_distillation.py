"""Distillation on two processes, whatever holds the networks, is that of one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed.engines import ENGINES
from tests.launch import metrics, run
from tests.recipes.tiny import make_data, overrides

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

NARROW = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
NARROW |= {"num_attention_heads": 2, "max_position_embeddings": 128}
CASES = {
    "on policy": ["objective.hard=0", "objective.on_policy={share: 0.5, max_new_tokens: 6}"],
    "kept": ["objective.cache={top_k: 8}"],
    "projected": [
        "objective.hidden={layers: {0: 0, 1: 2}}",
        "players.student.networks=[student, projection]",
        f"networks.student={json.dumps({'path': None, 'config': NARROW})}",
    ],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipes' data, with a teacher that is sure of what it says."""
    folder = tmp_path_factory.mktemp("distillation")
    make_data(folder)
    shutil.copytree(folder / "llama", folder / "teacher")
    weights = load_file(folder / "teacher" / "model.safetensors")
    torch.manual_seed(1)
    sure = {name: torch.randn_like(tensor) * 0.3 for name, tensor in weights.items()}
    save_file(sure, folder / "teacher" / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"])
def test_two_processes_distil_as_one(
    case: str, engine: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher is held in parts, too, where the engine does that; what it says is written anew by two processes."""
    always = ["train.duration=6 steps", "networks.teacher.shard=true", "evaluate.samples=0", "checkpoint.every=6 steps"]
    always += [f"networks.teacher.path={data}/teacher", "players.student.optimizer.lr=0.01"]
    words = ["run", "lm/distill", *overrides("lm/distill", data), *always, *CASES[case], "--root", tmp_path]
    figures = []
    for name, processes in (("one", 1), ("two", 2)):
        monkeypatch.setenv("SCALETRAIN_CACHE", str(tmp_path / f"cache-{name}"))
        run([*words, "--run", name], processes, variables=ENGINES[engine] if processes > 1 else None)
        kept = [r for r in metrics(tmp_path / name) if r["kind"] in ("train", "evaluate")]
        figures.append([r[k] for r in kept for k in ("loss", "cross_entropy")])
    assert len(figures[0]) >= 14
    assert min(figures[0]) > 0.005
    assert figures[1] == pytest.approx(figures[0], rel=1e-4)
