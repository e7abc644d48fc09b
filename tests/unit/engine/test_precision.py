import pytest
import torch

from scaletrain.config import ScalerSpec
from scaletrain.engine.precision import LossScaler, build_scaler, check_precision
from scaletrain.errors import UserError


def test_scaling_follows_torch_grad_scaler() -> None:
    """The same scales as torch's GradScaler over a mixed sequence of overflows and good updates."""
    ours = LossScaler(ScalerSpec(initial=1024.0, interval=3))
    theirs = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3, growth_factor=2.0, backoff_factor=0.5)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    for overflow in [False, False, True, False, False, False, False, True, True, False, False, False]:
        assert theirs.get_scale() == ours.scale
        optimizer.zero_grad()
        theirs.scale(parameter.sum() * (torch.inf if overflow else 1.0)).backward()
        theirs.step(optimizer)
        theirs.update()
        ours.advance(overflow)
    assert theirs.get_scale() == ours.scale


def test_state_goes_on_where_it_was() -> None:
    first = LossScaler(ScalerSpec(initial=8.0, interval=4))
    for overflow in [False, True, False, False]:
        first.advance(overflow)
    second = LossScaler(ScalerSpec(initial=8.0, interval=4))
    second.load_state_dict(first.state_dict())
    for scaler in (first, second):
        scaler.advance(False)
        scaler.advance(False)
    assert first.state_dict() == second.state_dict() == {"scale": 8.0, "good": 0}


def test_static_holds_and_only_fp16_is_scaled() -> None:
    scaler = build_scaler(ScalerSpec(type="static", initial=16.0), "fp16")
    assert scaler is not None
    scaler.advance(True)
    assert scaler.scale == 16.0
    assert scaler.exhausted
    assert build_scaler(ScalerSpec(), "bf16") is None
    assert build_scaler(ScalerSpec(type="off"), "fp16") is None


def test_the_scale_stops_at_its_minimum() -> None:
    scaler = LossScaler(ScalerSpec(initial=4.0, minimum=1.0))
    with_room = []
    for _ in range(4):
        with_room.append(scaler.exhausted)
        scaler.advance(True)
    assert with_room == [False, False, True, True]
    assert scaler.scale == pytest.approx(1.0)


def test_bf16_is_refused_where_a_gpu_would_emulate_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    gpu = torch.device("cuda", 0)
    with pytest.raises(UserError, match=r"train\.precision is bf16, which Tesla T4 does not compute in: take fp16"):
        check_precision("bf16", gpu)
    check_precision("fp16", gpu)
    check_precision("bf16", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    check_precision("bf16", gpu)
