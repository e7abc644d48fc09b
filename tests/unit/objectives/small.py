"""Students of a mixture of Gaussians, made small: objectives, one Gaussian's flow, and a training of some seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scaletrain.config import Recipe, SourceSpec
from scaletrain.data.sources import open_rows
from scaletrain.diffusion.path import Path
from scaletrain.evaluate.judges import Figures, ModesJudge
from scaletrain.explain import decode
from scaletrain.networks import mixture
from scaletrain.networks.point_denoiser import Config, PointDenoiser
from scaletrain.player import Player, Turn
from scaletrain.recipe import objective_of

TURN = Turn("train", "student")
MEAN, STD = torch.tensor([1.5, 0.0], dtype=torch.float64), 0.4
GAUSSIAN = {"count": 1, "radius": 1.5, "sigma": STD}


def recipe(options: Mapping[str, Any], teacher: Mapping[str, Any] | None = None, **student: Any) -> Recipe:
    networks = {"student": student, "teacher": {"type": "mixture", "config": dict(teacher or {})}}
    return decode(Recipe, {"objective": dict(options), "networks": networks, "data": {"train": "noise:64"}})


def made(options: Mapping[str, Any], teacher: Mapping[str, Any] | None = None, **student: Any) -> Any:
    """Return an objective whose teacher is a mixture, by default the ring, prepared."""
    objective = objective_of(recipe(options, teacher, **student))
    objective.prepare(open_rows([SourceSpec(path="noise:64")]), None)
    return objective


def networks(objective: Any, seed: int = 0, width: int = 64, noisy: bool = False) -> dict[str, nn.Module]:
    """Return a student and the teacher. noisy: the student's last layer is not 0."""
    torch.manual_seed(seed)
    student = PointDenoiser(
        Config(dim=2, hidden=[width, width], fastest=10, classes=8 if objective.signature.condition else 0)
        if not objective.signature.guidance
        else Config(dim=2, hidden=[width, width], classes=8, guidance=True)
    )
    if noisy:
        nn.init.normal_(student.last.weight, std=0.1)
    teacher = mixture.Mixture(decode(mixture.Config, objective.recipe.networks["teacher"].config))
    return {"student": student, "teacher": teacher}


def draws(count: int) -> dict[str, Tensor]:
    """Return a batch that holds nothing."""
    return {"draw": torch.arange(count)}


def flowed(path: Path, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Return where the probability flow of N(MEAN, STD²) leads from z at t by s: as many deviations from the mean."""
    (alpha, sigma), (alpha_s, sigma_s) = path.at(t, z), path.at(s, z)
    apart = (z - alpha * MEAN) / torch.sqrt((alpha * STD) ** 2 + sigma**2)
    return alpha_s * MEAN + torch.sqrt((alpha_s * STD) ** 2 + sigma_s**2) * apart


def trained(
    options: Mapping[str, Any],
    steps: int,
    batch: int = 256,
    broken: Callable[[Any], None] = lambda objective: None,
    teacher: Mapping[str, Any] | None = None,
) -> Figures:
    """Train a small student of few modes; return what its samples of one step score."""
    objective = made(options, teacher or {"count": 3, "radius": 2.0})
    broken(objective)
    nets = networks(objective, width=96)
    optimizer = torch.optim.Adam(nets["student"].parameters(), 4e-3, betas=(0.9, 0.99))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / steps)
        torch.manual_seed(step)
        optimizer.zero_grad()
        (objective.loss(TURN, nets, draws(batch))["loss"].sum / batch).backward()
        nn.utils.clip_grad_norm_(nets["student"].parameters(), 1.0)
        optimizer.step()
        objective.after_update(Player("student", {}, {}, optimizer, None, updates=step + 1), nets)  # type: ignore[arg-type]
    torch.manual_seed(0)
    with torch.no_grad():
        samples = objective.sampler(nets["student"])(torch.randn(4000, 2), 1, {})
    return ModesJudge(nets["teacher"], 0).figures(samples, {})  # type: ignore[arg-type]
