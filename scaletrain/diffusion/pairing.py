"""Pairs of noise and data that lie close to each other."""

from __future__ import annotations

import torch
from torch import Tensor


def optimal_pairs(x0: Tensor, eps: Tensor) -> Tensor:
    """Return eps (B, ...) in the order that makes Σ |x₀ − ε|² least: the assignment of optimal transport between the
    two batches (Pooladian et al., 2023, section 3; Tong et al., 2024). O(B³), on the CPU.
    """
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(x0.flatten(1).float(), eps.flatten(1).float()).square()
    _, columns = linear_sum_assignment(cost.cpu().numpy())
    return eps[torch.as_tensor(columns, device=eps.device)]
