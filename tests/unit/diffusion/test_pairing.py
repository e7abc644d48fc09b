"""Optimal pairs against all permutations."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from scaletrain.diffusion.pairing import optimal_pairs


@pytest.mark.parametrize("shape", [(2,), (1, 3, 3)])
def test_no_permutation_is_closer(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    for _ in range(5):
        x0, eps = torch.randn(6, *shape), torch.randn(6, *shape)
        paired = optimal_pairs(x0, eps)
        costs = {p: float((x0 - eps[list(p)]).square().sum()) for p in permutations(range(6))}
        best = min(costs, key=costs.__getitem__)
        torch.testing.assert_close(paired, eps[list(best)], rtol=0, atol=0)
        assert best != tuple(range(6))
