from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from scaletrain.config import AdapterSpec, Duration, EvaluateSpec, NetworkSpec, OptimizerSpec, QuantizeSpec, Recipe

SMALLEST = {"objective": {"type": "any"}, "data": {"train": "rows.csv"}}


def recipe(**parts):
    return Recipe.model_validate({**SMALLEST, **parts})


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("2_000 steps", 2000, "steps"),
        ("1 step", 1, "steps"),
        ("3 epochs", 3, "epochs"),
        ("0.5 epochs", 0.5, "epochs"),
        ("1e9 tokens", 1e9, "tokens"),
        ("1.5e-1 epochs", 0.15, "epochs"),
        ("50_000samples", 50000, "samples"),
    ],
)
def test_durations_have_a_unit(text, value, unit):
    assert Duration.parse(text) == Duration(value, unit)
    assert Duration.parse(str(Duration.parse(text))) == Duration(value, unit)


@pytest.mark.parametrize(
    "text", ["5", 5, "steps", "-3 steps", "0 steps", "1e999 steps", "3 miles", "3 steps more", None]
)
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match=r"write a number and a unit|more than 0"):
        Duration.parse(text)


def test_intervals_are_steps_or_epochs():
    assert recipe(checkpoint={"every": 500}).checkpoint.every == Duration(500, "steps")
    assert recipe(evaluate={"every": "1 epoch"}).evaluate.every == Duration(1, "epochs")
    for wrong in ("1e6 tokens", True, 0):
        with pytest.raises(ValidationError):
            recipe(checkpoint={"every": wrong})


@pytest.mark.parametrize(
    ("given", "paths"),
    [
        ("a.csv", ["a.csv"]),
        ({"path": "a.csv"}, ["a.csv"]),
        (["a.csv", {"path": "b.csv"}], ["a.csv", "b.csv"]),
    ],
)
def test_a_source_may_be_written_short(given, paths):
    assert [s.path for s in recipe(data={"train": given, "eval": given}).data.train] == paths
    assert [s.path for s in recipe(data={"train": given, "eval": given}).data.eval] == paths


@pytest.mark.parametrize(
    "parts",
    [
        {"trian": {}},
        {"train": {"lr": 1}},
        {"data": {"train": {"path": "a", "shuffle": True}}},
        {"players": {"model": {"optimizer": {"learning_rate": 1}}}},
        {"players": {"model": {"ema": {"beta": 1}}}},
        {"networks": {"model": {"adapter": {"rank": 3}}}},
        {"log": {"trackers": ["mlflow"]}},
        {"players": {"model": {"optimizer": {"lr": 0}}}},
        {"stages": [{"name": "a"}, {"name": "a"}]},
        {"stages": [{"name": "a/b"}]},
        {"stages": [{"train": {}}]},
    ],
)
def test_what_nobody_knows_is_refused_at_any_depth(parts):
    with pytest.raises(ValidationError):
        recipe(**parts)


def test_an_objective_keeps_its_own_options():
    objective = recipe(objective={"type": "gan", "latent": 8, "loss": {"kind": "hinge"}}).objective
    assert (objective.type, objective.options) == ("gan", {"latent": 8, "loss": {"kind": "hinge"}})


@pytest.mark.parametrize("source", ["stage:head/model", "run:checkpoints/a/model"])
def test_a_network_comes_from_a_stage_or_a_run(source):
    assert NetworkSpec.model_validate({"from": source}).source == source
    with pytest.raises(ValidationError):
        NetworkSpec.model_validate({"from": source.partition(":")[2]})


def test_values_do_not_change_after_decoding():
    with pytest.raises(ValidationError):
        recipe().train.global_batch = 3
    with pytest.raises(ValidationError):
        OptimizerSpec().lr = 3


@pytest.mark.parametrize("metric", ["loss", "eval_perplexity", "energy_distance", "rmse_to_teacher"])
def test_losses_and_distances_are_better_lower(metric):
    assert EvaluateSpec.better(metric, 1.0, 2.0)
    assert not EvaluateSpec.better(metric, 2.0, 1.0)
    assert not EvaluateSpec.better(metric, 1.0, 1.0)


def test_accuracy_is_better_higher():
    assert EvaluateSpec.better("accuracy", 0.9, 0.8)
    assert not EvaluateSpec.better("accuracy", 0.8, 0.8)


def test_nothing_heavy_is_imported():
    code = "import sys, scaletrain.config; print([m for m in ('torch', 'numpy', 'yaml') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("metric", "new", "old", "better"),
    [
        ("loss", 1.0, 2.0, True),
        ("critic_loss", 2.0, 1.0, False),
        ("accuracy", 0.9, 0.8, True),
        ("confident", 0.9, 0.8, True),
        ("mse", 0.1, 0.2, True),
        ("energy_distance", 0.1, 0.2, True),
        ("loss", float("nan"), 2.0, False),
        ("loss", 5.0, float("nan"), True),
        ("accuracy", 0.1, float("nan"), True),
        ("accuracy@loss", 0.9, 0.8, True),
        ("loss@error", 1.0, 2.0, True),
    ],
)
def test_which_of_two_metrics_is_better(metric: str, new: float, old: float, better: bool) -> None:
    assert EvaluateSpec.better(metric, new, old) is better


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "ia3", "r": 8}, "ia3 has no `r`"),
        ({"type": "ia3", "alpha": 8.0}, "ia3 has no `alpha`"),
        ({"type": "vera", "alpha": 8.0}, "vera has no `alpha`"),
        ({"type": "prompt", "targets": ["q"]}, "prompt has no `targets`"),
        ({"type": "prompt", "train_also": ["q"]}, "prompt has no `train_also`"),
        ({"niter": 4}, "lora has no `niter`"),
        ({"type": "olora", "niter": 4}, "olora has no `niter`"),
        ({"virtual_tokens": 4}, "lora has no `virtual_tokens`"),
        ({"feedforward": ["fc"]}, "lora has no `feedforward`"),
        ({"path": "a", "r": 4}, "the adapter in `path` has its own `r`"),
        ({"path": "a", "type": "dora"}, "leave `type` out"),
    ],
)
def test_adapters_have_only_their_own_options(options, message):
    with pytest.raises(ValidationError, match=message):
        AdapterSpec(**options)


def test_quantisation_may_be_written_short_and_int8_has_no_options():
    assert NetworkSpec(quantize="nf4").quantize == QuantizeSpec(type="nf4")
    with pytest.raises(ValidationError, match="int8 has no `double`"):
        QuantizeSpec(type="int8", double=True)
    with pytest.raises(ValidationError, match="int8 has no `compute`"):
        QuantizeSpec(type="int8", compute="bfloat16")
