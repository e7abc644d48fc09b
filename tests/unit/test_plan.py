"""`scaletrain plan`: what it says against an allocator's own account, against arithmetic, and against itself."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from scaletrain.callbacks.base import Observer
from scaletrain.errors import UserError
from scaletrain.planning.ledger import ACTIVATIONS, COMMUNICATION, GRADIENTS, OPTIMISER, WEIGHTS, Ledger
from scaletrain.planning.plan import RESERVED, Needs, plan, read_memory
from scaletrain.planning.rehearse import Part, Rehearsal, batch_of, worst_example
from scaletrain.planning.report import as_text
from scaletrain.planning.share import Way
from scaletrain.planning.trial import Trials
from scaletrain.recipe import load, load_code
from scaletrain.runs import foresee, train
from tests.recipes.tiny import make_data, overrides

RECIPES = (
    "quickstart", "lm/pretrain", "lm/lora", "lm/dpo", "lm/kto", "lm/distill", "lm/qat", "text/classify",
    "text/regress", "text/tag", "text/distill", "encoder/roberta", "seq2seq/transformer", "vision/cnn",
    "vision/resnet18", "gan/dcgan", "distill/reflow_gmm", "distill/dmd2_gmm",
    "diffusion/latent",
)  # fmt: skip
ONE = Way("ddp", 1, False, False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


def needs_of(recipe: str, data: Path, way: Way, *changes: str, **options: Any) -> list[Needs]:
    return list(plan(load(recipe, [*overrides(recipe, data), *changes]), way, **options))


# --- the ledger -------------------------------------------------------------------------------------------------------


def test_ledger_counts_what_is_alive() -> None:
    kb = 4 * 1000
    with FakeTensorMode(), Ledger().watching() as ledger:
        x = torch.empty(1000)
        ledger.note([x], WEIGHTS)
        ledger.begin()
        y = torch.relu(x)  # + 4 kB
        z = torch.exp(y.view(10, 100))  # + 4 kB; a view is nothing
        assert ledger.totals[ACTIVATIONS] == 2 * kb
        del y
        assert ledger.totals[ACTIVATIONS] == kb
        z.mul_(2)
        assert (ledger.peak, ledger.totals[WEIGHTS]) == (3 * kb, kb)
        z.untyped_storage().resize_(0)
        assert sum(ledger.totals.values()) == kb
        assert ledger.largest == (kb, (1000,), "float32")


def test_ledger_knows_gradients_from_the_rest() -> None:
    ledger = Ledger()
    with FakeTensorMode(), ledger.watching():
        w = torch.nn.Parameter(torch.empty(1000))
        w.register_post_accumulate_grad_hook(lambda p: ledger.note([p.grad], GRADIENTS))
        ledger.note([w], WEIGHTS)
        (w * 2).sum().backward()
    assert ledger.totals == {**dict.fromkeys(ledger.totals, 0), WEIGHTS: 4000, GRADIENTS: 4000}


# --- against the allocator --------------------------------------------------------------------------------------------


class Profiled(Observer):
    """Has torch's profiler listen to the allocator from one step to the next. peak: bytes above the start."""

    def __init__(self) -> None:
        self.peak = 0

    def step(self, step: int, record: Any) -> None:
        if step == 2:
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.start()
        elif step == 3:
            self._profile.stop()
            held = 0
            events = self._profile.profiler.kineto_results.events()  # type: ignore[union-attr]
            for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
                held += event.nbytes()
                self.peak = max(self.peak, held)


LARGER = [
    "networks.model.config={model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 3, "
    "num_attention_heads: 4, max_position_embeddings: 64, vocab_size: 512, tie_word_embeddings: true}",
    "data.seq_len=64",
    "train.global_batch=8",
]


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("lm/pretrain", LARGER),
        ("lm/pretrain", [*LARGER, "train.micro_batch=2"]),
        ("lm/pretrain", [*LARGER, "train.recompute=full"]),
        ("lm/pretrain", [*LARGER, "train.precision=bf16"]),
        ("lm/pretrain", [*LARGER, "players.model.optimizer={type: muon, lr: 1e-3}", "players.model.ema={decay: 0.9}"]),
        ("vision/resnet18", ["networks.model.config.features=16", "train.global_batch=32", "train.micro_batch=32"]),
        ("gan/dcgan", ["networks.generator.config.features=64", "networks.critic.config.features=64"]),
    ],
    ids=["llama", "accumulated", "recomputed", "bf16", "muon and an average", "resnet", "gan"],
)
def test_a_step_takes_what_the_allocator_says(recipe: str, changes: list[str], data: Path, tmp_path: Path) -> None:
    whole = load(
        recipe,
        [*overrides(recipe, data), *changes, "train.duration=4 steps", "checkpoint.every=4 steps"],
    )
    observer = Profiled()
    saved = whole.model_copy(update={"checkpoint": whole.checkpoint.model_copy(update={"asynchronous": False})})
    train(saved, "r", tmp_path / "runs", observers=[observer])
    (found,) = foresee(whole, tmp_path / "foreseen")
    part, trials = Part(*found), Trials(Part(*found))
    layout = trials.layout(ONE)
    with trials.begun(ONE, part.stage.recipe.train) as trial:
        rehearsal = trial.rehearsal
        step = rehearsal.step(batch_of(trials.examples, trials.worst, layout.micro_batch), layout.accumulate)
    assert step.total - sum(rehearsal.held.values()) == pytest.approx(observer.peak, rel=0.05)


# --- against arithmetic -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_shipped_recipes(recipe: str, data: Path) -> None:
    for way in (ONE, Way("fsdp2", 2, False, False)):
        for needs in needs_of(recipe, data, way):
            assert needs.unknown is None
            assert needs.memory.step > 0
            if needs.plan.eval_examples:
                assert needs.memory.evaluation > 0


@pytest.mark.parametrize(
    "changes",
    [
        ["networks.model.quantize=int8"],
        ["networks.model.adapter={type: loftq, r: 4}"],
        ["networks.model.adapter={type: prompt}", "data.packing=false"],
    ],
    ids=str,
)
def test_quantised_bases(changes: list[str], data: Path) -> None:
    (needs,) = needs_of("lm/qlora", data, ONE, *changes)
    assert needs.unknown is None
    (whole,) = needs_of(
        "lm/qlora", data, ONE, *changes[1:], "networks.model.quantize=null", "networks.model.adapter=null"
    )
    assert needs.plan.parameters - needs.plan.trainable == whole.plan.parameters
    assert needs.memory.kinds[WEIGHTS] < 4 * needs.plan.parameters


@pytest.mark.parametrize("engine", ["fsdp2", "zero1", "zero3"])
def test_what_an_engine_cannot_hold(engine: str, data: Path) -> None:
    with pytest.raises(
        UserError, match=rf"networks\.model: {engine} holds .* in parts, and weights in nf4 are held whole"
    ):
        needs_of("lm/qlora", data, Way(engine, 2, False, False))


def test_what_an_engine_cannot_do(data: Path) -> None:
    with pytest.raises(UserError, match=r"objective\.type: scm differentiates networks forward, which zero3 cannot"):
        needs_of("distill/scm_gmm", data, Way("zero3", 2, False, False))


def test_what_is_held_by_adamw(data: Path) -> None:
    (needs,) = needs_of("lm/pretrain", data, ONE)
    size = 4 * needs.plan.parameters
    kinds = needs.memory.kinds
    assert needs.plan.parameters == needs.plan.trainable
    assert kinds[WEIGHTS] == pytest.approx(size, rel=0.01)  # and a buffer
    assert kinds[OPTIMISER] == pytest.approx(2 * size, rel=0.01)
    assert kinds[COMMUNICATION] == 0


def held(recipe: str, data: Path, tmp_path: Path, way: Way) -> tuple[Rehearsal, dict[str, int]]:
    changes = [*overrides(recipe, data), "train.global_batch=16", "train.micro_batch=1"]
    (found,) = foresee(load(recipe, changes), tmp_path / f"{way.engine}{way.processes}")
    trials = Trials(Part(*found))
    with trials.begun(way, trials.part.stage.recipe.train) as trial:
        return trial.rehearsal, trial.memory(1).kinds


def test_fsdp2_holds_a_part(data: Path, tmp_path: Path) -> None:
    whole, _ = held("lm/pretrain", data, tmp_path, ONE)
    for n in (2, 4):
        part, kinds = held("lm/pretrain", data, tmp_path, Way("fsdp2", n, False, False))
        assert part.trained == pytest.approx(whole.trained / n, rel=0.02)
        assert part.held[OPTIMISER] == pytest.approx(whole.held[OPTIMISER] / n, rel=0.02)
        assert part.saved == whole.saved
        assert kinds[COMMUNICATION] > 0


def test_hsdp_holds_the_parts_of_a_node(data: Path, tmp_path: Path) -> None:
    parts, _ = held("lm/pretrain", data, tmp_path, Way("fsdp2", 8, False, False))
    nodes, _ = held("lm/pretrain", data, tmp_path, Way("hsdp", 16, False, False))
    assert nodes.held == parts.held


def test_engines_that_are_not_rehearsed(data: Path, tmp_path: Path) -> None:
    whole, one = held("lm/pretrain", data, tmp_path, ONE)
    weights, trained, optimiser = whole.held[WEIGHTS], whole.trained, whole.held[OPTIMISER]
    assert one[GRADIENTS] <= trained
    _, ddp = held("lm/pretrain", data, tmp_path, Way("ddp", 4, False, False))
    assert (ddp[WEIGHTS], ddp[GRADIENTS], ddp[OPTIMISER]) == (weights, trained, optimiser)
    for stage in (1, 2, 3):
        _, zero = held("lm/pretrain", data, tmp_path, Way(f"zero{stage}", 4, False, False))
        working = weights if stage < 3 else weights - trained + trained // 4
        assert zero[WEIGHTS] == working + trained // 4
        assert zero[OPTIMISER] == optimiser // 4
        assert zero[GRADIENTS] == (trained if stage == 1 else trained // 4)
    _, far = held("lm/pretrain", data, tmp_path, Way("zero3", 4, True, True))
    assert far[OPTIMISER] == far[GRADIENTS] == 0
    assert far[WEIGHTS] == pytest.approx(weights - trained, abs=1024)


def test_a_lora_is_a_small_part(data: Path) -> None:
    (needs,) = needs_of("lm/lora", data, ONE)
    assert needs.plan.trainable < needs.plan.parameters
    assert needs.memory.kinds[OPTIMISER] == pytest.approx(8 * needs.plan.trainable, rel=0.01)


def test_every_stage_is_planned(data: Path) -> None:
    found = needs_of("quickstart", data, ONE)
    assert [needs.plan.stage for needs in found] == ["teacher", "steps-8", "steps-4", "steps-2", "steps-1"]
    teacher, student = found[0].plan, found[1].plan
    assert (student.parameters, student.trainable) == (2 * teacher.parameters, teacher.parameters)


def test_hours_and_what_is_seen(data: Path) -> None:
    (needs,) = needs_of("lm/pretrain", data, ONE, "train.duration=90 steps", throughput=32.0)
    samples = 90 * needs.plan.micro_batch * needs.plan.accumulate
    assert needs.seen["samples"] == samples
    assert needs.seen["tokens"] == pytest.approx(samples * 32, rel=0.05)  # data.seq_len
    assert needs.hours == pytest.approx(needs.seen["tokens"] / 32 / 3600)


def test_the_longest_texts_are_planned_for(data: Path, tmp_path: Path) -> None:
    rows = [{"text": "a cat" if i else "a cat " * 40, "label": i % 2} for i in range(60)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = [*overrides("text/classify", data), f"data.train={path}", "data.holdout=0"]
    (found,) = foresee(load("text/classify", changes), tmp_path / "f")
    dataset, example = worst_example(found[2])
    assert batch_of(dataset, example, 3)["input_ids"].shape == (3, 88)  # padded to a multiple of 8


# --- what fits, and what to do ----------------------------------------------------------------------------------------


def test_the_largest_micro_batch(data: Path) -> None:
    changes = [*LARGER, "train.global_batch=16", "train.micro_batch=4", "data.holdout=0"]
    peaks = {}
    for micro in (1, 2, 4, 8, 16):
        (needs,) = needs_of("lm/pretrain", data, ONE, *changes, f"train.micro_batch={micro}")
        peaks[micro] = needs.memory.peak
    for micro in (1, 2, 4, 8):
        (needs,) = needs_of("lm/pretrain", data, ONE, *changes, device_memory=(peaks[micro] + peaks[2 * micro]) // 2)
        assert needs.best == micro
        assert needs.fits is (micro >= 4)


HEAVY = [LARGER[0].replace("hidden_size: 64", "hidden_size: 256"), "data.seq_len=16", "train.global_batch=8"]


@pytest.mark.parametrize(
    ("shape", "share", "word"), [(LARGER, 0.9, "train.recompute="), (HEAVY, 0.75, "--engine fsdp2")]
)
def test_following_the_advice_makes_it_fit(shape: list[str], share: float, word: str, data: Path) -> None:
    way, changes = Way("ddp", 2, False, False), [*shape, "data.holdout=0", "checkpoint.asynchronous=false"]
    (needs,) = needs_of("lm/pretrain", data, way, *changes, "train.micro_batch=1")
    memory = int(share * needs.memory.peak)
    (needs,) = needs_of("lm/pretrain", data, way, *changes, device_memory=memory)
    assert needs.best is None
    assert not needs.fits
    assert any(w.startswith(word) for w in needs.advice), needs.advice
    settings = [w for w in needs.advice if not w.startswith("--")]
    flags = dict(w.removeprefix("--").split(" ") for w in needs.advice if w.startswith("--"))
    way = replace(way, engine=flags.get("engine", "ddp"), processes=int(flags.get("processes", 2)))
    (after,) = needs_of("lm/pretrain", data, way, *changes, *settings, device_memory=memory)
    assert after.fits, as_text(after)
    assert " ".join(needs.advice) in as_text(needs)


def test_nothing_helps(data: Path) -> None:
    (needs,) = needs_of("lm/pretrain", data, ONE, device_memory=10)
    assert (needs.fits, needs.best, needs.advice) == (False, None, ())
    assert "larger device" in as_text(needs)


def test_a_gpu_is_not_filled_to_the_brim(data: Path) -> None:
    (needs,) = needs_of("lm/pretrain", data, replace(ONE, cuda=True), device_memory=10**9)
    assert needs.usable == pytest.approx((1 - RESERVED) * 10**9)
    assert needs.memory.host > 0  # a copy of what is saved, which is not on the GPU


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80e9), ("24GiB", 24 * 2**30), ("80e9", 80e9), ("512 MB", 512e6), ("1.5T", 1.5e12)]
)
def test_sizes(text: str, size: float) -> None:
    assert read_memory(text) == int(size)


@pytest.mark.parametrize("text", ["much", "80 apples", "", "-3GB", "1.2.3GB", "0GB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="80GB, 24GiB or 80e9"):
        read_memory(text)


def test_an_engine_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"zero33.*zero3"):
        Way("zero33", 2, False, True)
    with pytest.raises(UserError, match="2 or more nodes"):
        Way("hsdp", 8, False, True)


def test_what_the_run_refuses(data: Path) -> None:
    with pytest.raises(UserError, match=r"train.global_batch=8 does not divide over 3 processes"):
        needs_of("lm/pretrain", data, replace(ONE, processes=3), "train.micro_batch=null")
    with pytest.raises(UserError, match="only 3 example"):
        needs_of(
            "vision/cnn",
            data,
            replace(ONE, processes=64),
            "data.train.rows=3",
            "data.holdout=0",
            "train.global_batch=64",
        )
    with pytest.raises(UserError, match="adafactor cannot step"):
        needs_of("vision/cnn", data, Way("zero2", 2, False, False), "players.model.optimizer.type=adafactor")


DEPENDS = """
from typing import final
from scaletrain.objectives.image_classification import Config, Objective as Base
from scaletrain.objectives import base

@final
class Objective(Base):
    def loss(self, turn, networks, batch):
        terms = super().loss(turn, networks, batch)
        terms["loss"].sum.item()
        return terms
"""


def test_an_operation_that_depends_on_values_is_named(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "depends.py"
    path.write_text(DEPENDS)
    load_code(path)
    (needs,) = needs_of(
        "vision/cnn", data, ONE, "objective={type: depends, size: 28, channels: 1}", device_memory=10**9
    )
    assert needs.unknown == "aten._local_scalar_dense.default"
    assert needs.memory.kinds[OPTIMISER] > 0
    assert "`aten._local_scalar_dense.default` depends on values" in as_text(needs)


# --- the command ------------------------------------------------------------------------------------------------------

LLAMA_8B = (
    "networks.model.config={model_type: llama, hidden_size: 4096, intermediate_size: 14336, num_hidden_layers: 32, "
    "num_attention_heads: 32, num_key_value_heads: 8, vocab_size: 128256, max_position_embeddings: 8192, "
    "tie_word_embeddings: false}"
)


def command(*arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run it. Returns what it said, and its seconds on a core: others may use this machine."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = subprocess.run(
        [sys.executable, "-m", "scaletrain", "plan", *arguments], capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_the_command(data: Path) -> None:
    own = overrides("lm/pretrain", data)
    found, _ = command("lm/pretrain", *own, "--device-memory", "1GB", "--throughput", "1000")
    assert found.returncode == 0, found.stderr
    for word in ("optimiser", "peak: a step", "a save", "train.micro_batch=8", " hours", "fits: "):
        assert word in found.stdout
    found, _ = command("lm/pretrain", *own, "--device-memory", "lots")
    assert (found.returncode, found.stdout) == (2, "")
    assert "80GB" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.slow
def test_eight_billion_parameters(data: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(10 * (data / "text.txt").read_text())
    own = [f"data.train={tmp_path}/text.txt", "objective.tokenizer.vocab_size=270", LLAMA_8B, "data.seq_len=4096"]
    words = [*own, "train.global_batch=8", "train.micro_batch=1", "train.precision=bf16"]
    found, seconds = command("lm/pretrain", *words, "--processes", "8", "--engine", "fsdp2", "--json")
    assert found.returncode == 0, found.stderr
    (needs,) = json.loads(found.stdout)
    assert needs["plan"]["parameters"] == 8_030_261_248  # Meta's Llama 3 8B
    kinds = needs["memory"]["kinds"]
    assert kinds["weights"] == pytest.approx(4 * 8.03e9 / 8, rel=0.01)
    assert needs["memory"]["largest"][1] == [128256, 4096]  # of the head; logits are never whole
    assert seconds < 60
