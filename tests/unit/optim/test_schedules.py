from __future__ import annotations

import math

import pytest
import torch
import transformers
from torch.optim import lr_scheduler

from scaletrain.config import ScheduleSpec
from scaletrain.errors import UserError
from scaletrain.optim.schedules import build_schedule

TOTAL, WARMUP = 50, 8
TYPES = ["constant", "linear", "cosine", "wsd", "inverse_sqrt", "polynomial", "one_cycle", "plateau"]


def optimizer(lr=1.0):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def rates(make, total=TOTAL, lr=1.0):
    """The rates that a library's scheduler gives to updates 0, 1, ..."""
    opt = optimizer(lr)
    scheduler = make(opt)
    found = []
    for _ in range(total):
        found.append(opt.param_groups[0]["lr"] / lr)
        opt.step()
        scheduler.step()
    return found


def ours(total=TOTAL, **spec):
    schedule = build_schedule(ScheduleSpec(**spec), total)
    return [schedule.factor(u) for u in range(total)]


@pytest.mark.parametrize(
    ("spec", "make"),
    [
        (
            {"type": "linear"},
            lambda o: transformers.get_linear_schedule_with_warmup(o, WARMUP, TOTAL),
        ),
        (
            {"type": "cosine"},
            lambda o: transformers.get_cosine_schedule_with_warmup(o, WARMUP, TOTAL),
        ),
        (
            {"type": "cosine", "final": 0.1},
            lambda o: transformers.get_cosine_with_min_lr_schedule_with_warmup(o, WARMUP, TOTAL, min_lr_rate=0.1),
        ),
        (
            {"type": "polynomial", "final": 0.05, "power": 3.0},
            lambda o: transformers.get_polynomial_decay_schedule_with_warmup(o, WARMUP, TOTAL, lr_end=0.05, power=3.0),
        ),
        (
            {"type": "wsd", "final": 0.1, "decay_share": 0.4},
            lambda o: transformers.get_wsd_schedule(
                o, WARMUP, num_decay_steps=20, num_training_steps=TOTAL, decay_type="linear", min_lr_ratio=0.1
            ),
        ),
    ],
)
def test_after_the_warmup_equal_to_transformers(spec, make):
    assert ours(warmup_steps=WARMUP, **spec)[WARMUP:] == pytest.approx(rates(make)[WARMUP:], abs=1e-12)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd", "inverse_sqrt", "polynomial", "plateau"])
def test_warmup_is_torchs_linear_from_the_first_update(kind):
    found = ours(type=kind, warmup_steps=WARMUP)
    ramp = rates(lambda o: lr_scheduler.LinearLR(o, start_factor=1 / WARMUP, total_iters=WARMUP - 1), WARMUP)
    assert found[:WARMUP] == pytest.approx(ramp, abs=1e-12)
    assert found[0] == 1 / WARMUP
    assert found[WARMUP - 1] == 1.0


@pytest.mark.parametrize(("kind", "make"), [("linear", lr_scheduler.LinearLR), ("cosine", None)])
def test_without_warmup_equal_to_torch(kind, make):
    if make:
        reference = rates(lambda o: make(o, start_factor=1.0, end_factor=0.2, total_iters=TOTAL))
    else:
        reference = rates(lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=TOTAL, eta_min=0.2))
    assert ours(type=kind, final=0.2) == pytest.approx(reference, abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 15, 25])
def test_one_cycle_equal_to_torch(warmup):
    share = warmup / TOTAL or 0.3
    reference = rates(
        lambda o: lr_scheduler.OneCycleLR(
            o, max_lr=1.0, total_steps=TOTAL, pct_start=share, final_div_factor=0.4, cycle_momentum=False
        )
    )
    assert ours(type="one_cycle", warmup_steps=warmup, final=0.1) == pytest.approx(reference, abs=1e-12)


def test_inverse_sqrt_is_the_transformers_formula():
    width = 512
    noam = [width**-0.5 * min(n**-0.5, n * WARMUP**-1.5) for n in range(1, TOTAL + 1)]
    peak = width**-0.5 * WARMUP**-0.5
    assert ours(type="inverse_sqrt", warmup_steps=WARMUP) == pytest.approx([f / peak for f in noam], abs=1e-12)
    assert ours(type="inverse_sqrt")[3] == pytest.approx(1 / math.sqrt(4))


def test_plateau_equal_to_torch():
    """torch waits until MORE than its patience have passed: ours of 2 is its 1."""
    losses = [5.0, 4.0, 4.5, 4.2, 4.1, 4.0, 3.0, 3.5, 3.6, 3.7, 3.8, 3.9, 4.0, 4.1, 4.2, 4.3, 4.4]
    opt = optimizer()
    reference = lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=1, threshold=0.0, min_lr=0.1)
    schedule = build_schedule(ScheduleSpec(type="plateau", factor=0.5, patience=2, final=0.1), 100)
    best, seen = math.inf, []
    for n, loss in enumerate(losses):
        reference.step(loss)
        schedule.observe(loss < best)
        best = min(best, loss)
        assert schedule.factor(n) == pytest.approx(opt.param_groups[0]["lr"])
        seen.append(schedule.factor(n))
    assert {1.0, 0.5, 0.25, 0.125, 0.1} == set(seen)


def test_plateau_continues_from_its_state():
    spec = ScheduleSpec(type="plateau", patience=3)
    first = build_schedule(spec, 100)
    for _ in range(5):
        first.observe(False)
    second = build_schedule(spec, 100)
    second.load_state_dict(first.state_dict())
    second.observe(False)
    assert second.factor(50) == 0.25


@pytest.mark.parametrize("kind", TYPES)
def test_past_the_end_the_factor_stays(kind):
    schedule = build_schedule(ScheduleSpec(type=kind, warmup_steps=5), TOTAL)
    assert schedule.factor(TOTAL + 1000) == schedule.factor(TOTAL)
    assert 0 <= schedule.factor(TOTAL) <= 1


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("total", [1, 2, 3, 7])
def test_short_runs_have_factors_too(kind, total):
    for warmup in range(total if kind != "wsd" else 1):
        found = ours(total, type=kind, warmup_steps=warmup)
        assert all(0 <= f <= 1 for f in found)
        assert found[0] > 0


@pytest.mark.parametrize("kind", TYPES)
def test_a_warmup_longer_than_the_run_is_refused(kind):
    with pytest.raises(UserError, match=r"`players\.a\.schedule\.warmup_steps` is 11.*10 updates"):
        build_schedule(ScheduleSpec(type=kind, warmup_steps=11), 10, "players.a.schedule")


def test_a_decay_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"`schedule\.decay_share`.*do not fit"):
        build_schedule(ScheduleSpec(type="wsd", warmup_steps=60, decay_share=0.5), 100)


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [("constant", "final", 0.1), ("cosine", "power", 1.0), ("linear", "decay_share", 0.5), ("cosine", "patience", 9)],
)
def test_a_figure_that_the_type_does_not_use_is_refused(kind, key, value):
    with pytest.raises(UserError, match=rf"`schedule\.{key}`: {kind} does not use it"):
        build_schedule(ScheduleSpec(type=kind, **{key: value}), 100)


def test_a_warmup_as_a_share_is_the_same_warmup_in_updates() -> None:
    by_share = build_schedule(ScheduleSpec(type="cosine", warmup_share=0.1), 200)
    by_steps = build_schedule(ScheduleSpec(type="cosine", warmup_steps=20), 200)
    assert [by_share.factor(u) for u in range(200)] == [by_steps.factor(u) for u in range(200)]
    with pytest.raises(UserError, match="not both"):
        build_schedule(ScheduleSpec(warmup_share=0.1, warmup_steps=3), 100)
