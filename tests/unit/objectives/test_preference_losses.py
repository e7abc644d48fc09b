"""Losses of preferences against the papers' formulas, written out in numpy over probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from scaletrain.objectives.preference_losses import DPO, IPO, KTO, ORPO, Loss, SimPO, signed

PAIRS = 7


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


@pytest.fixture
def given() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities (P, 2) of answers of `lengths` tokens, by the network and by the reference."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 9, (PAIRS, 2))
    logps, reference = (np.log(draw.uniform(0.2, 0.9, (PAIRS, 2))) * lengths for _ in range(2))
    return torch.tensor(logps), torch.tensor(lengths), torch.tensor(reference)


def dpo(p: Any, ref: Any, n: Any, wrong: float = 0.0) -> Any:
    def loss(w: int, l: int) -> Any:  # noqa: E741
        return -np.log(sigmoid(0.3 * np.log(p[:, w] / ref[:, w]) - 0.3 * np.log(p[:, l] / ref[:, l])))

    return (1 - wrong) * loss(0, 1) + wrong * loss(1, 0)


def ipo(p: Any, ref: Any, n: Any) -> Any:
    h = np.log((p / ref) ** (1 / n))
    return (h[:, 0] - h[:, 1] - 1 / (2 * 0.3)) ** 2


def orpo(p: Any, ref: Any, n: Any) -> Any:
    mean = p ** (1 / n)
    odds = mean / (1 - mean)
    return -0.3 * np.log(sigmoid(np.log(odds[:, 0] / odds[:, 1])))


def simpo(p: Any, ref: Any, n: Any) -> Any:
    mean = 0.3 / n * np.log(p)
    return -np.log(sigmoid(mean[:, 0] - mean[:, 1] - 0.7))


CASES = {
    "dpo": (DPO(type="dpo", beta=0.3), dpo),
    "cdpo": (DPO(type="dpo", beta=0.3, label_smoothing=0.2), lambda p, ref, n: dpo(p, ref, n, 0.2)),
    "ipo": (IPO(type="ipo", beta=0.3), ipo),
    "orpo": (ORPO(type="orpo", beta=0.3), orpo),
    "simpo": (SimPO(type="simpo", beta=0.3, gamma=0.7), simpo),
}


@pytest.mark.parametrize("name", CASES)
def test_pairs(name: str, given: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    loss, formula = CASES[name]
    logps, lengths, reference = given
    losses, rewards = loss(logps, lengths, reference if loss.refers else None)
    expected = formula(np.exp(logps.numpy()), np.exp(reference.numpy()), lengths.numpy())
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-12)
    assert rewards.shape == (PAIRS, 2)

    logps.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, lengths, reference)[0], logps)
    (by_logps,) = torch.autograd.grad(loss(logps, lengths, reference).losses.sum(), logps)
    if name not in ("ipo", "cdpo"):  # which have an optimum that may have been passed
        assert (by_logps[:, 0] < 0).all()
        assert (by_logps[:, 1] > 0).all()


def test_the_gradient_of_dpo_is_that_of_the_paper(given: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    """Rafailov et al., 2023, section 4: weighted by how wrongly the rewards order the answers."""
    logps, lengths, reference = given
    logps.requires_grad_()
    loss = DPO(type="dpo", beta=0.3)
    losses, rewards = loss(logps, lengths, reference)
    (by_logps,) = torch.autograd.grad(losses.sum(), logps)
    weight = 0.3 * sigmoid((rewards[:, 1] - rewards[:, 0]).detach().numpy())
    np.testing.assert_allclose(by_logps.numpy(), np.stack([-weight, weight], 1), rtol=1e-12)


def test_odds_of_probabilities_next_to_0_and_1() -> None:
    loss = ORPO(type="orpo", beta=1.0)
    logps = torch.tensor([[-1e-12, -1e-3], [-50.0, -0.5], [0.0, -100.0]], requires_grad=True)
    losses, _ = loss(logps, torch.ones(3, 2), None)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert logps.grad is not None
    assert logps.grad.isfinite().all()
    exact = -50.0 - np.log1p(-np.exp(-50.0)) - (-0.5 - np.log1p(-np.exp(-0.5)))
    assert losses[1].item() == pytest.approx(-np.log(sigmoid(exact)), rel=1e-6)


@pytest.mark.parametrize("divergence", [-1.0, 0.4])
def test_kto(divergence: float) -> None:
    loss = KTO(type="kto", beta=0.3, desirable_weight=1.0, undesirable_weight=1.5)
    ratios = torch.tensor([0.5, -2.0, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    desirable = torch.tensor([True, True, False, False])
    z, r = max(0.0, divergence), ratios.detach().numpy()
    value = np.concatenate([sigmoid(0.3 * (r[:2] - z)), 1.5 * sigmoid(0.3 * (z - r[2:]))])
    expected = np.array([1, 1, 1.5, 1.5]) - value
    found = loss(ratios, desirable, torch.tensor(divergence, dtype=torch.float64))
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-7)
    assert torch.autograd.gradcheck(lambda x: loss(x, desirable, torch.tensor(divergence)), ratios)
    assert signed(ratios, desirable).tolist() == [0.5, -2.0, -1.0, -3.0]


@pytest.mark.parametrize(
    "options",
    [
        {"type": "dpo"},
        {"type": "dpo", "beta": 0},
        {"type": "dpo", "beta": 0.1, "label_smoothing": 0.5},
        {"type": "orpo", "beta": 0.1, "sft_weight": 1.0},
        {"type": "simpo", "beta": 2.0},
        {"type": "kto", "beta": 0.1, "sft_weight": 1.0},
        {"beta": 0.1},
    ],
)
def test_options_that_a_loss_does_not_have_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Loss).validate_python(options)
