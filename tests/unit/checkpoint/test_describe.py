import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from scaletrain.cli import app
from tests.unit.test_snapshot import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("described"), "train.precision=fp16")


def call(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["inspect", *map(str, words)])
    return done.exit_code, done.output


def test_a_run_is_its_newest_checkpoint(folder: Path) -> None:
    code, text = call(folder, "--json")
    assert code == 0
    found = json.loads(text)
    assert found["checkpoint"] == str(folder / "step-00000012")
    assert found["all_steps"] == [8, 12]
    assert (found["step"], found["stage"], found["complete"]) == (12, "main", True)
    assert (found["engine"], found["world_size"]) == ("data_parallel", 1)
    weights = load_file(folder / "step-00000012" / "networks" / "critic" / "model.safetensors")
    assert found["networks"]["critic"]["parameters"] == sum(math.prod(w.shape) for w in weights.values())
    player = found["players"]["generator"]
    assert (player["updates"] + player["skipped"], player["lr"] > 0, player["scaler"]["scale"] > 0) == (12, True, True)
    moments = player["numbers"]
    assert moments["ema"] >= moments["optimizer/exp_avg"] == moments["optimizer/exp_avg_sq"] > 0
    assert "ema" not in found["players"]["critic"]["numbers"]
    assert found["progress"]["step"] == 12
    assert found["bytes"] == sum(found["files"].values())


def test_one_checkpoint_in_words(folder: Path) -> None:
    code, text = call(folder / "step-00000008")
    assert code == 0
    assert "step 8, stage main at step 8\n" in text
    assert "player generator: " in text
    assert "loss scale" in text
    assert "network critic: dcgan_critic, " in text
    code, text = call("r", "--root", folder.parent)
    assert code == 0
    assert "step 12, stage main at step 12, the end of its stage" in text
    assert "checkpoints of the run: steps 8, 12" in text


def test_what_cannot_be_described(tmp_path: Path) -> None:
    broken = tmp_path / "step-00000001"
    broken.mkdir()
    (broken / "manifest.json").write_text("{}")
    code, _ = call(broken)
    assert code == 2
    assert call(tmp_path / "nothing")[0] == 2
