"""Working on a module's parameters."""

from __future__ import annotations

import torch
from torch import nn

from scaletrain.parameters import align


def test_weights_begin_where_new_ones_would() -> None:
    module = nn.Sequential(nn.Embedding(6, 5), nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6))
    module[1].weight = module[0].weight
    shifted = torch.empty(6 * 5 + 1)[1:].view(6, 5)  # as a weight in a mapped file may lie
    module[0].weight.data = shifted.copy_(torch.arange(30.0).view(6, 5))
    module[2].running_mean = torch.zeros(7)[1:]
    assert module[0].weight.data_ptr() % 64
    align(module)
    assert all(t.data_ptr() % 64 == 0 for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())
    assert module[1].weight is module[0].weight
    assert torch.equal(module[0].weight, torch.arange(30.0).view(6, 5))
