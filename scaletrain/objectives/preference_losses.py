"""Losses of preferences, of the log-probabilities of whole answers. Each has its own options.

Shapes: P pairs, columns chosen and rejected; S judged answers. log π(y|x) is the sum over an answer's tokens, |y| their
number, π_ref the reference. A reward is what a loss takes for how much the network prefers an answer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from scaletrain.config import Strict


class Judged(NamedTuple):
    """What a loss makes of P pairs."""

    losses: Tensor
    """(P,)"""
    rewards: Tensor
    """(P, 2)"""


class Pairwise(Strict, ABC):
    """A loss over pairs. Subclasses are final."""

    refers: ClassVar[bool]
    """Whether it takes a reference."""
    beta: float = Field(gt=0)

    @property
    @abstractmethod
    def likelihood(self) -> float:
        """The weight of -log π(y_w|x), a mean over the tokens of all chosen answers."""

    @abstractmethod
    def __call__(self, logps: Tensor, lengths: Tensor, reference: Tensor | None) -> Judged:
        """Judge pairs. logps, reference: (P, 2) log-probabilities of answers; lengths: (P, 2) their tokens."""


class Anchored(Pairwise):
    """One that may have a likelihood term beside it, which keeps the chosen answers' probability from falling."""

    sft_weight: float = Field(0.0, ge=0)

    @property
    def likelihood(self) -> float:
        """What the recipe says."""
        return self.sft_weight


@final
class DPO(Anchored):
    """-(1 - ε) log σ(h) - ε log σ(-h), h = β (log π/π_ref (y_w|x) - log π/π_ref (y_l|x)).

    Rafailov et al., 2023, equation 7; with ε > 0, labels that are wrong so often: Mitchell, 2023, equation 3 (cDPO).
    """

    type: Literal["dpo"]
    refers: ClassVar[bool] = True
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)

    def __call__(self, logps: Tensor, lengths: Tensor, reference: Tensor | None) -> Judged:
        """Judge pairs."""
        assert reference is not None
        rewards = self.beta * (logps - reference)
        h = rewards[:, 0] - rewards[:, 1]
        wrong = self.label_smoothing
        losses = -(1 - wrong) * F.logsigmoid(h) - wrong * F.logsigmoid(-h) if wrong else -F.logsigmoid(h)
        return Judged(losses, rewards)


@final
class IPO(Anchored):
    """(h - 1 / 2β)², h = log π/π_ref (y_w|x) / |y_w| - log π/π_ref (y_l|x) / |y_l|.

    Azar et al., 2023, equation 17, whose τ is β, with log-probabilities by the token, as its authors advise for answers
    of different lengths; the paper has their sums.
    """

    type: Literal["ipo"]
    refers: ClassVar[bool] = True

    def __call__(self, logps: Tensor, lengths: Tensor, reference: Tensor | None) -> Judged:
        """Judge pairs."""
        assert reference is not None
        ratios = (logps - reference) / lengths
        return Judged((ratios[:, 0] - ratios[:, 1] - 0.5 / self.beta).square(), self.beta * ratios)


@final
class ORPO(Pairwise):
    """-β log σ(log odds(y_w|x) - log odds(y_l|x)) beside -log π(y_w|x); odds = p / (1 - p), log p = log π(y|x) / |y|.

    Hong et al., 2024, equations 6 and 7, whose λ is β.
    """

    type: Literal["orpo"]
    refers: ClassVar[bool] = False

    @property
    def likelihood(self) -> float:
        """It is half of the loss."""
        return 1.0

    def __call__(self, logps: Tensor, lengths: Tensor, reference: Tensor | None) -> Judged:
        """Judge pairs."""
        mean = logps / lengths
        odds = mean - _log1mexp(mean)
        return Judged(-self.beta * F.logsigmoid(odds[:, 0] - odds[:, 1]), self.beta * mean)


@final
class SimPO(Anchored):
    """-log σ(β log π(y_w|x) / |y_w| - β log π(y_l|x) / |y_l| - γ).

    Meng et al., 2024, equation 6.
    """

    type: Literal["simpo"]
    refers: ClassVar[bool] = False
    gamma: float = Field(ge=0)

    def __call__(self, logps: Tensor, lengths: Tensor, reference: Tensor | None) -> Judged:
        """Judge pairs."""
        rewards = self.beta * logps / lengths
        return Judged(-F.logsigmoid(rewards[:, 0] - rewards[:, 1] - self.gamma), rewards)


@final
class KTO(Strict):
    """λ_D (1 - σ(β (r - z))) of desirable answers, λ_U (1 - σ(β (z - r))) of others, r = log π/π_ref (y|x).

    z = max(0, mean of log π/π_ref (y'|x)) estimates the divergence from the reference by answers y' to other prompts;
    no gradient goes through it. Ethayarajh et al., 2024, equation 8.
    """

    type: Literal["kto"]
    refers: ClassVar[bool] = True
    beta: float = Field(gt=0)
    desirable_weight: float = Field(1.0, gt=0)
    undesirable_weight: float = Field(1.0, gt=0)

    def __call__(self, ratios: Tensor, desirable: Tensor, divergence: Tensor) -> Tensor:
        """Return losses (S,). ratios: (S,) log π/π_ref; desirable: (S,) bool; divergence: () before it is clamped."""
        value = signed(ratios - divergence.clamp(min=0), desirable)
        weights = torch.where(desirable, self.desirable_weight, self.undesirable_weight)
        return weights * torch.sigmoid(-self.beta * value)


Loss = Annotated[DPO | IPO | ORPO | SimPO | KTO, Field(discriminator="type")]


def signed(values: Tensor, desirable: Tensor) -> Tensor:
    """Turn the sign of what is not desirable."""
    return torch.where(desirable, values, -values)


def _log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - e^x) of x < 0, exact near 0 and far from it (Mächler, 2012); of 0, which rounds up to it, as of a
    probability next to 1.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near = x > -0.6931471805599453
    # Each branch has arguments that are its own: the other's gradient would be 0 times infinity.
    return torch.where(near, torch.log(-torch.expm1(torch.where(near, x, -1.0))), torch.log1p(-torch.exp(x)))
