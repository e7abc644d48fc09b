"""What is asked of DeepSpeed, and ZeRO's own ways: offload, updates left out, stages that follow one another."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from scaletrain.config import OptimizerSpec
from scaletrain.engine import zero_spec
from scaletrain.engine.choice import engine_name
from scaletrain.engine.deepspeed import Zero
from scaletrain.engine.world import World
from scaletrain.engine.zero_spec import ZeroSpec
from scaletrain.errors import UserError
from tests.distributed.engines import ENGINES, assert_close
from tests.launch import metrics, run, start
from tests.unit.test_guard import OBJECTIVE, POISON

processes = pytest.mark.distributed, pytest.mark.slow


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what sets accelerate's variables for DeepSpeed."""

    def set_variables(**variables: object) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name.upper()}", str(value))

    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    return set_variables


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_accelerates_variables(stage: int, ask: Any) -> None:
    ask(zero_stage=stage, offload_optimizer_device="none", offload_param_device="none", config_file="none")
    assert ZeroSpec.from_environment() == ZeroSpec(stage, {"zero_optimization": {"stage": stage}})
    assert not ZeroSpec.from_environment().offloads
    assert engine_name() == f"zero{stage}"


def test_accelerates_variables_for_offload(ask: Any) -> None:
    ask(zero_stage=3, offload_optimizer_device="cpu", offload_param_device="cpu")
    zero = ZeroSpec.from_environment().config["zero_optimization"]
    assert {name: zero[name]["device"] for name in ("offload_optimizer", "offload_param")} == {
        "offload_optimizer": "cpu",
        "offload_param": "cpu",
    }
    assert ZeroSpec.from_environment().offloads


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"zero_stage": 0}, r"zero_stage is 0: take 1, 2 or 3"),
        ({"zero_stage": 2, "offload_optimizer_device": "nvme"}, r"offload_optimizer_device is nvme: take cpu or none"),
        ({"zero_stage": 3, "offload_param_device": "nvme"}, r"offload_param_device is nvme: take cpu or none"),
        ({"zero_stage": 2, "offload_param_device": "cpu"}, r"offload_param_device needs zero_stage 3"),
        ({"config_file": "nowhere.json"}, r"nowhere\.json cannot be read"),
    ],
)
def test_what_is_asked_for_and_not_there(variables: dict[str, object], words: str, ask: Any) -> None:
    ask(**variables)
    with pytest.raises(UserError, match=words):
        engine_name()


def test_deepspeed_is_not_installed(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(zero_spec, "find_spec", lambda name: None if name == "deepspeed" else find(name))
    with pytest.raises(UserError, match=r"not installed: pip install 'scaletrain\[deepspeed\]'"):
        engine_name()


AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "optimizer": "auto",
    "scheduler": "auto",
    "bf16": "auto",
}


def test_a_deepspeed_file(ask: Any, tmp_path: Path) -> None:
    zero = {"stage": 3, "stage3_max_live_parameters": 1000, "reduce_bucket_size": "auto"}
    zero["offload_optimizer"] = {"device": "cpu"}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**AUTO, "zero_optimization": zero, "steps_per_print": 7}))
    ask(config_file=path, zero_stage=1)
    found = ZeroSpec.from_environment()
    del zero["reduce_bucket_size"]
    assert found == ZeroSpec(3, {"zero_optimization": zero, "steps_per_print": 7})
    assert found.offloads


@pytest.mark.parametrize(
    ("key", "value", "place"),
    [
        ("train_batch_size", 8, "train.global_batch"),
        ("train_micro_batch_size_per_gpu", 8, "train.micro_batch"),
        ("gradient_accumulation_steps", 2, "train.global_batch"),
        ("gradient_clipping", 1.0, "players.<name>.clip"),
        ("optimizer", {"type": "AdamW"}, "players.<name>.optimizer"),
        ("scheduler", {"type": "WarmupLR"}, "players.<name>.schedule"),
        ("fp16", {"enabled": True}, "train.precision"),
        ("bf16", {"enabled": True}, "train.precision"),
        ("torch_autocast", {"enabled": True}, "train.precision"),
    ],
)
def test_a_deepspeed_file_with_what_belongs_to_the_recipe(
    key: str, value: object, place: str, ask: Any, tmp_path: Path
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, key: value}))
    ask(config_file=path)
    with pytest.raises(UserError) as error:
        engine_name()
    assert f"{path}: `{key}` belongs to the recipe ({place})" in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        ("{}", r"zero_optimization\.stage is None: take 1, 2 or 3"),
        ('{"zero_optimization": {"stage": 0}}', r"zero_optimization\.stage is 0"),
        (
            '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/"}}}',
            r"zero_optimization\.offload_param\.device: take cpu or none",
        ),
    ],
)
def test_a_deepspeed_file_that_is_wrong(text: str, words: str, ask: Any, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    ask(config_file=path)
    with pytest.raises(UserError, match=words):
        engine_name()


def test_optimisers_that_step_one_element_at_a_time_alone_are_taken() -> None:
    engine = Zero(World(torch.device("cpu")), "fp32", ZeroSpec(2, {"zero_optimization": {"stage": 2}}))
    kinds = get_args(OptimizerSpec.model_fields["type"].annotation)
    taken = {kind for kind in kinds if engine.refuses(kind) is None}
    assert taken == {"sgd", "rmsprop", "adam", "adamw", "lion"}
    assert "muon cannot step the flat pieces that ZeRO holds" in str(engine.refuses("muon"))


# --- on two processes -------------------------------------------------------------------------------------------------


@pytest.fixture
def words(tmp_path: Path) -> list[object]:
    """A regression of whose rows one may be poisoned."""
    (tmp_path / "poisoned.py").write_text(OBJECTIVE)
    (tmp_path / "r.yaml").write_text(
        "{objective: {type: poisoned}, data: {train: 'sklearn:iris', workers: 0},"
        " train: {duration: 40 steps, global_batch: 60, micro_batch: 15},"
        " players: {model: {optimizer: {type: adamw, lr: 0.01, weight_decay: 0.1}, clip: 1.0, ema: {decay: 0.9}}},"
        " checkpoint: {every: 15 steps}, log: {every: 1}}"
    )
    return ["run", tmp_path / "r.yaml", "--code", tmp_path / "poisoned.py", "--root", tmp_path]


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [r for r in metrics(folder) if r["kind"] == kind]


def assert_same(folder: Path, expected: Path) -> None:
    """Compare losses, what was left out, and the end of two runs."""
    for key in ("loss", "grad_norm", "lr", "skipped", "scale"):
        theirs = [r[key] for r in records(expected, "train") if key in r]
        assert [r[key] for r in records(folder, "train") if key in r] == pytest.approx(theirs, rel=1e-5, nan_ok=True)
    assert_close(folder / "latest", expected / "latest", rtol=1e-4, atol=1e-6)


def offloaded(stage: int, *parts: str) -> dict[str, str]:
    return {**ENGINES[f"zero{stage}"], **{f"ACCELERATE_DEEPSPEED_OFFLOAD_{part}_DEVICE": "cpu" for part in parts}}


@pytest.mark.distributed
@pytest.mark.slow
def test_an_optimiser_that_is_refused_starts_nothing(words: list[object], tmp_path: Path) -> None:
    change = ["players.model.optimizer={type: muon}", "--run", "r"]
    codes, printed = start([*words, *change], 2, variables=ENGINES["zero1"]).finish()
    assert codes == [2, 2], printed
    assert "players.model.optimizer.type: muon cannot step the flat pieces" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "r").exists()


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "changes"),
    [
        ("skip", [POISON, "train.guard.spike=skip"]),
        ("skip", ["objective.poison=.nan", "train.guard.nonfinite=skip"]),
        ("rollback", [POISON, "train.guard.spike=rollback"]),
    ],
)
def test_updates_that_would_do_harm(policy: str, changes: list[str], words: list[object], tmp_path: Path) -> None:
    """They are left out, or undone, as under DDP."""
    for engine in ("ddp", "zero1", "zero3"):
        run([*words, *changes, "--run", engine], 2, variables=ENGINES[engine])
        assert len(records(tmp_path / engine, policy)) == 1
        assert_same(tmp_path / engine, tmp_path / "ddp")


@pytest.mark.distributed
@pytest.mark.slow
def test_offload(words: list[object], tmp_path: Path) -> None:
    """What is kept in host memory is trained all the same, on two processes and on one."""
    ways = {
        "ddp": ENGINES["ddp"],
        "optimizer": offloaded(2, "OPTIMIZER"),
        "optimizer-3": offloaded(3, "OPTIMIZER"),
        "all": offloaded(3, "OPTIMIZER", "PARAM"),
    }
    short = [*words, "train.duration=10 steps"]
    for name, variables in ways.items():
        run([*short, "--run", name], 2, variables=variables)
        assert_same(tmp_path / name, tmp_path / "ddp")
    run([*short, "--run", "alone"], 1, variables=ways["all"])
    assert_same(tmp_path / "alone", tmp_path / "ddp")
    assert json.loads((tmp_path / "alone" / "latest" / "manifest.json").read_text())["engine"] == "zero3"


@pytest.mark.distributed
@pytest.mark.slow
def test_fp16(words: list[object], tmp_path: Path) -> None:
    """Our scaler drives DeepSpeed's: it skips, shrinks and grows as under DDP."""
    changes = ["train.precision=fp16", "players.model.scaler={initial: 1.0e+6, interval: 5}", "train.duration=20 steps"]
    for engine in ("ddp", "zero1", "zero3"):
        run([*words, *changes, "--run", engine], 2, variables=ENGINES[engine])
    expected = records(tmp_path / "ddp", "train")
    assert expected[-1]["skipped"] > 0
    assert len({r["scale"] for r in expected}) > 2
    for engine in ("zero1", "zero3"):
        found = records(tmp_path / engine, "train")
        assert [r["scale"] for r in found] == [r["scale"] for r in expected]
        assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in expected], rel=1e-3)


STAGES = OBJECTIVE.replace(
    """    def counts(""",
    """    def after_update(self, player, networks):
        stage = self.recipe.networks["model"].config["hidden"][0]
        if not any(s == stage for s, _ in SEEN):
            gc.collect()
            with open(f"{os.environ['NOTES']}/{stage}", "w") as file:
                file.write(str(sum(other() is not None for _, other in SEEN)))
            SEEN.extend((stage, weakref.ref(p)) for p in networks["model"].parameters())

    def counts(""",
).replace("import torch\n", "import gc\nimport os\nimport weakref\n\nimport torch\n\nSEEN = []\n", 1)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero1", "zero3"])
def test_a_stage_that_ended_leaves_nothing_in_memory(engine: str, words: list[object], tmp_path: Path) -> None:
    (tmp_path / "poisoned.py").write_text(STAGES)
    stages = [f"{{name: n{n}, networks: {{model: {{path: null, config: {{hidden: [{n}]}}}}}}}}" for n in (8, 9)]
    changes = [f"stages=[{', '.join(stages)}]", "train.duration=3 steps", "--run", "r"]
    run([*words, *changes], 2, variables={**ENGINES[engine], "NOTES": str(tmp_path)})
    assert [(tmp_path / n).read_text() for n in ("8", "9")] == ["0", "0"]
