"""Memory savers, options of FSDP2 and optimisers for few bytes: the losses are those of one plain process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch import metrics, run, start, steps
from tests.recipes.tiny import make_data, overrides

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
HSDP = {**FSDP2, "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}
LAYERS = {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer"}
EMA = "players.model.ema={decay: 0.9}"
Losses = Callable[..., list[float]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


def losses(folder: Path, *others: str) -> list[float]:
    """Return every loss of the run, of training and of evaluations with averaged weights, in order; and others."""
    wanted = ("loss", *others)
    return [v for r in metrics(folder) for k, v in sorted(r.items()) if k.rpartition("/")[2] in wanted]


@pytest.fixture(scope="module")
def plain(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """Return what gives the losses of one process without any of it."""
    known: dict[tuple[str, tuple[str, ...]], Path] = {}

    def of(name: str, *changes: str, others: tuple[str, ...] = ()) -> list[float]:
        if (name, changes) not in known:
            folder = tmp_path_factory.mktemp("plain")
            run(["run", name, *overrides(name, data), *changes, "--root", folder, "--run", "r"])
            known[name, changes] = folder / "r"
        return losses(known[name, changes], *others)

    return of


DROPOUT = ("lm/pretrain", EMA, "networks.model.config.attention_dropout=0.1")


@pytest.mark.parametrize(
    ("recipe", "savers", "processes", "variables", "tolerance"),
    [
        (DROPOUT, ["train.recompute=selective"], 1, {}, 1e-6),
        (
            DROPOUT,
            ["train.recompute=full", "train.offload_activations=true"],
            2,
            {**FSDP2, "FSDP_RESHARD_AFTER_FORWARD": "false"},
            1e-6,
        ),
        (DROPOUT, ["train.recompute=selective"], 2, {**FSDP2, **LAYERS, "FSDP_OFFLOAD_PARAMS": "true"}, 1e-6),
        (("lm/pretrain", EMA), ["train.compile=blocks", "train.recompute=selective"], 2, FSDP2, 1e-6),
        (("lm/lora", "networks.model.dtype=bfloat16"), ["train.recompute=full"], 2, FSDP2, 1e-5),
        (("lm/pretrain", "players.model.optimizer.type=muon"), [], 2, FSDP2, 1e-5),
        (("lm/pretrain", "players.model.optimizer.type=adamw8bit"), [], 2, {}, 1e-6),
    ],
)
def test_losses_are_those_of_one_plain_process(
    recipe: tuple[str, ...], savers: list[str], processes: int, variables: dict[str, str], tolerance: float,
    plain: Losses, data: Path, tmp_path: Path,
) -> None:  # fmt: skip
    name, *changes = recipe
    words = ["run", name, *overrides(name, data), *changes, *savers, "--root", tmp_path, "--run", "r"]
    run(words, processes, variables=variables)
    expected = plain(*recipe)
    assert len(expected) >= 30
    assert losses(tmp_path / "r") == pytest.approx(expected, rel=tolerance)


def test_a_frozen_teacher_in_parts_teaches_the_same(plain: Losses, data: Path, tmp_path: Path) -> None:
    students = [f"stages.steps-{n}.networks.teacher.shard=true" for n in (8, 4, 2, 1)]
    recipe = ("quickstart", "train.micro_batch=2")
    words = ["run", recipe[0], *overrides(recipe[0], data), recipe[1], *students, "--root", tmp_path, "--run", "r"]
    run(words, 2, variables=FSDP2)
    assert losses(tmp_path / "r") == pytest.approx(plain(*recipe), rel=1e-5)


def test_replicas_of_parts_save_for_one_process_and_go_on_from_it(plain: Losses, data: Path, tmp_path: Path) -> None:
    """Two groups of two processes, then one process, then the four again: as one process all along."""
    words = ["run", "lm/pretrain", *overrides("lm/pretrain", data), EMA, "checkpoint.every=1 steps", "--root", tmp_path]
    parts = tmp_path / "parts"
    for processes, until in ((4, 8), (1, 16)):
        life = start([*words, "--run", "parts"], processes, variables=HSDP if processes > 1 else {})
        life.stop_when(lambda until=until: max(steps(parts), default=0) >= until)
    run([*words, "--run", "parts"], 4, variables=HSDP)
    expected = plain("lm/pretrain", EMA, others=("grad_norm",))
    assert losses(parts, "grad_norm") == pytest.approx(expected, rel=1e-5)
    assert json.loads((parts / "latest" / "manifest.json").read_text())["engine"] == "fsdp2"


def test_moments_of_eight_bits_are_saved(plain: Losses, data: Path, tmp_path: Path) -> None:
    recipe = ("lm/pretrain", "players.model.optimizer.type=adamw8bit")
    words = ["run", recipe[0], *overrides(recipe[0], data), recipe[1], "checkpoint.every=1 steps"]
    life = start([*words, "--root", tmp_path, "--run", "r"])
    life.stop_when(lambda: max(steps(tmp_path / "r"), default=0) >= 12)
    run([*words, "--root", tmp_path, "--run", "r"])
    assert losses(tmp_path / "r") == plain(*recipe)


def test_a_new_head_is_the_same_on_all_processes_as_accelerate_launches_them(
    plain: Losses, data: Path, tmp_path: Path
) -> None:
    """accelerate asks transformers to read weights on rank 0 alone, and others would have none for a new head."""
    words = ["run", "text/classify", *overrides("text/classify", data), "--root", tmp_path, "--run", "r"]
    run(words, 2, variables={**FSDP2, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"})
    assert losses(tmp_path / "r") == pytest.approx(plain("text/classify"), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "variables", "words"),
    [
        (
            "players.model.optimizer={type: adafactor, lr: 0.01}",
            FSDP2,
            "adafactor cannot step weights that are held in",
        ),
        ("players.model.optimizer.type=paged_adamw8bit", FSDP2, "take adamw, or launch DDP"),
        ("seed=0", {**HSDP, "PARALLELISM_CONFIG_DP_SHARD_SIZE": "4"}, "2 x 4 = 8, but there are 2 process(es)"),
        ("seed=0", {**FSDP2, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "train.recompute=full"),
    ],
)
def test_what_fsdp2_cannot_do_is_refused_before_the_start(
    change: str, variables: dict[str, str], words: str, data: Path, tmp_path: Path
) -> None:
    command = ["run", "lm/pretrain", *overrides("lm/pretrain", data), change, "--root", tmp_path / "r"]
    codes, printed = start(command, 2, variables=variables).finish()
    assert codes == [2, 2], printed
    assert words in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "r").exists()
