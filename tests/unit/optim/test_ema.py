from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from scaletrain.config import EMASpec
from scaletrain.optim.ema import EMA


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def walk(model, n):
    torch.manual_seed(100 + n)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))


def test_equal_to_torchs_averaged_model():
    model, reference = net(), net()
    ema = EMA(dict(model.named_parameters()), EMASpec(decay=0.9, warmup=False))
    averaged = AveragedModel(reference, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(reference)  # the first call copies
    for n in range(5):
        walk(model, n)
        ema.update(n + 1)
        walk(reference, n)
        averaged.update_parameters(reference)
    for name, p in averaged.module.named_parameters():
        torch.testing.assert_close(ema.shadow[name], p.detach())


def test_warmup_is_the_formula():
    model = nn.Linear(1, 1, bias=False)
    ema = EMA(dict(model.named_parameters()), EMASpec(decay=0.75))
    expected = model.weight.item()
    for n in range(1, 60):
        walk(model, n)
        decay = min(0.75, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model.weight.item()
        ema.update(n)
    assert ema.shadow["weight"].item() == pytest.approx(expected, rel=1e-5)
    assert ema.decay(1) == pytest.approx(2 / 11)


def test_swapping_gives_the_average_and_everything_back_bit_for_bit():
    model = net()
    storage = {n: p.data_ptr() for n, p in model.named_parameters()}
    ema = EMA(dict(model.named_parameters()), EMASpec(decay=0.9))
    walk(model, 0)
    ema.update(1)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    average = {n: t.clone() for n, t in ema.shadow.items()}

    def fails():
        with ema.swapped():
            assert all(torch.equal(p, average[n]) for n, p in model.named_parameters())
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert all(torch.equal(t, average[n]) for n, t in ema.shadow.items())
    assert not any(torch.equal(weights[n], average[n]) for n in weights)
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == storage


def test_nothing_is_saved_or_updated_while_swapped():
    model = net()
    ema = EMA(dict(model.named_parameters()), EMASpec())
    state = ema.state_dict()
    for call in (ema.state_dict, lambda: ema.update(1), lambda: ema.load_state_dict(state)):
        with ema.swapped(), pytest.raises(RuntimeError, match="leave `swapped` first"):
            call()


def test_continues_from_its_state():
    model, other = net(), net()
    ema = EMA(dict(model.named_parameters()), EMASpec(decay=0.8))
    walk(model, 0)
    ema.update(1)
    again = EMA(dict(other.named_parameters()), EMASpec(decay=0.8))
    again.load_state_dict({n: t.clone() for n, t in ema.state_dict().items()})
    other.load_state_dict(model.state_dict())
    for m, e in ((model, ema), (other, again)):
        walk(m, 1)
        e.update(2)
    assert all(torch.equal(again.shadow[n], t) for n, t in ema.shadow.items())


def test_a_state_of_other_parameters_is_refused():
    ema = EMA(dict(nn.Linear(2, 2).named_parameters()), EMASpec())
    with pytest.raises(ValueError, match="bias"):
        ema.load_state_dict({"weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"weight: \(1, 2\) is not \(2, 2\)"):
        ema.load_state_dict({"weight": torch.zeros(1, 2), "bias": torch.zeros(2)})


def test_half_precision_masters_are_refused():
    with pytest.raises(ValueError, match=r"weight is torch\.bfloat16"):
        EMA(dict(nn.Linear(2, 2).bfloat16().named_parameters()), EMASpec())
