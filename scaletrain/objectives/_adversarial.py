"""The losses of a critic that tells real samples from made ones, and of whom it judges: sums over logits (B,)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Contest = Literal["non_saturating", "hinge"]
"""Goodfellow et al. (2014), section 3, or Lim and Ye (2017)."""


def tell_apart(contest: Contest, real: Tensor, made: Tensor, real_target: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the critic's losses on real and on made samples: two sums.

    real_target: of non_saturating, what the critic is to answer for real ones (Salimans et al., 2016, section 3.4).
    """
    real, made = real.float(), made.float()
    if contest == "hinge":
        return F.relu(1 - real).sum(), F.relu(1 + made).sum()
    target = torch.full_like(real, real_target)
    return F.binary_cross_entropy_with_logits(real, target, reduction="sum"), F.softplus(made).sum()


def mislead(contest: Contest, made: Tensor) -> Tensor:
    """Return the loss of who made the samples: a sum."""
    return -made.float().sum() if contest == "hinge" else F.softplus(-made.float()).sum()
