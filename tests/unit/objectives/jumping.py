"""Students that jump, made small: an objective over a mixture, the flow of a Gaussian, and a few seconds' training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scaletrain.config import Recipe, SourceSpec
from scaletrain.data.sources import open_rows
from scaletrain.diffusion.path import Path, beside
from scaletrain.evaluate.distances import energy_distance
from scaletrain.explain import decode
from scaletrain.networks import mixture, point_denoiser
from scaletrain.recipe import objective_of

GAUSSIAN = {"modes": "ring", "count": 1, "radius": 1.5, "sigma": 0.4}
MEAN, STD = torch.tensor([1.5, 0.0]), 0.4
TWO = {"modes": "ring", "count": 2, "radius": 2.0, "sigma": 0.2}


def made(options: Mapping[str, Any], teacher: Mapping[str, Any] | None = GAUSSIAN, data: str = "noise:64") -> Any:
    """Return a prepared objective; its teacher, if there is one, is a mixture."""
    networks: dict[str, Any] = {"student": {}}
    if teacher:
        networks["teacher"] = {"type": "mixture", "config": teacher}
    objective = objective_of(
        decode(Recipe, {"objective": dict(options), "networks": networks, "data": {"train": data}})
    )
    objective.prepare(open_rows([SourceSpec(path=data)]), None)
    return objective


def teacher_of(objective: Any) -> mixture.Mixture:
    """Return the mixture."""
    return mixture.Mixture(decode(mixture.Config, objective.recipe.networks["teacher"].config))


def small(objective: Any, width: int = 64) -> Any:
    """Return a small student with the seed that there is."""
    config = {**objective.networks()["student"].config, "hidden": [width, width], "fastest": 6.0}
    return point_denoiser.build(decode(point_denoiser.Config, config))


def draws(count: int) -> dict[str, Tensor]:
    """Return a batch that has nothing."""
    return {"draw": torch.zeros(count)}


def flowed(path: Path, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Return where the flow of N(MEAN, STD²) leads from z at t to at s: as far from the mean, in its deviations."""
    (alpha, sigma), (alpha_s, sigma_s) = path.at(t, z), path.at(s, z)
    mean, there = alpha * MEAN.to(z), alpha_s * MEAN.to(z)
    return there + torch.hypot(alpha_s * STD, sigma_s) / torch.hypot(alpha * STD, sigma) * (z - mean)


class Knows(nn.Module):
    """The velocity of the flow of N(MEAN, STD²) on a path, average from t to the target, in closed form.

    wrong: a part of what it leaves out, between 0 and 1.
    """

    def __init__(self, path: Path, wrong: float = 0.0):
        super().__init__()
        self.path, self.wrong = path, wrong

    def forward(self, z: Tensor, t: Tensor, target: Tensor) -> Tensor:
        z64, t64, s64 = z.double(), t.double(), target.double()
        (alpha, sigma), (da, ds) = self.path.at(t64, z64), (beside(v, z64) for v in self.path.slopes(t64))
        variance = (alpha * STD) ** 2 + sigma**2
        now = da * MEAN + (alpha * da * STD**2 + sigma * ds) / variance * (z64 - alpha * MEAN)
        step = beside(t64 - s64, z64)
        average = (z64 - flowed(self.path, z64, t64, s64)) / torch.where(step == 0, 1, step)
        return (1 - self.wrong) * torch.where(step == 0, now, average)


def trained(objective: Any, steps: int = 500, batch: int = 256, lr: float = 4e-3) -> tuple[nn.Module, float]:
    """Train a small student; return it and the energy distance of its samples in one step."""
    torch.manual_seed(0)
    networks: dict[str, Any] = {"student": small(objective), "teacher": teacher_of(objective)}
    optimizer = torch.optim.Adam(networks["student"].parameters(), lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(step / 50, (1 + math.cos(math.pi * step / steps)) / 2)
        loss = objective.loss(objective.turns[0], networks, draws(batch))["loss"].sum / batch
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        samples = objective.sampler(networks["student"])(torch.randn(2000, 2), 1, {})
    return networks["student"], float(energy_distance(samples, networks["teacher"].draw(2000)))
