"""Progressive distillation: a student learns to do in one step of DDIM what its teacher does in several.

Salimans & Ho (2022), algorithm 2. As stages of a run, each with the student of the one before as its teacher, 32 steps
become 16, 8, 4, 2 and 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, final

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from scaletrain.config import NetworkSpec, Recipe
from scaletrain.data.classes import Classes
from scaletrain.data.dataset import Dataset
from scaletrain.data.images import ImageOptions
from scaletrain.data.sources import Rows
from scaletrain.data.stream import Stream
from scaletrain.diffusion.denoiser import Denoiser
from scaletrain.diffusion.options import DiffusionOptions
from scaletrain.diffusion.path import stratified
from scaletrain.diffusion.pictures import draw, stored_shape
from scaletrain.diffusion.solvers import ddim_step, implied_x0, sample
from scaletrain.errors import UserError
from scaletrain.evaluate.few_steps import Real, Sampler, compare
from scaletrain.objectives import base
from scaletrain.objectives.base import Networks, Report, Request, RunView, Samples, completed
from scaletrain.player import Batch, Term, Turn

_BATCH = 1024  # pictures drawn at a time for the report


class Config(ImageOptions, DiffusionOptions):
    """Options of `objective` for `type: progressive`. Student and teacher are read in the same way."""

    steps: int = Field(ge=1)
    """Of the student, for a sample."""
    teacher_steps: int = Field(ge=2)
    """Of the teacher; a multiple of the student's."""
    compare_at: list[int] = Field([1, 2, 4, 8], min_length=1)
    """Steps at which the report has the teacher too, besides its own."""
    compare_samples: int = Field(2048, ge=64)
    """Pictures behind each figure of the report."""


@final
class Objective(base.Objective[Config]):
    """Train `student` on what `teacher`, which is frozen, does to noisy pictures of the column `image`.

    With a column `label`, the report at the end of the run has a classifier of real pictures judge the made ones.
    """

    turns = (Turn("train", "student"),)
    throughput: ClassVar[str] = "images"

    def __init__(self, config: Config, recipe: Recipe):
        super().__init__(config, recipe)
        if config.teacher_steps % config.steps or config.teacher_steps == config.steps:
            raise UserError(
                f"objective.teacher_steps ({config.teacher_steps}) must be 2 or more times objective.steps "
                f"({config.steps})"
            )
        teacher = recipe.networks.get("teacher", NetworkSpec())
        if not teacher.frozen or teacher.source is teacher.path is None:
            raise UserError("networks.teacher must have `frozen: true`, and `from` or `path` for its weights")

    def prepare(self, train: Rows, eval: Rows | None) -> None:
        """Find the shape of a picture, and the classes where there are labels. Raises UserError that names the row."""
        self._classes = Classes.find(train, "label") if "label" in train.columns else None
        self._shape = self.config.shape(train)

    def examples(self, rows: Rows, training: bool, window: bool = False) -> Dataset:
        """Return pictures, with their classes where there are labels."""
        return self.config.pictures(rows, training, self._shape, self._classes)

    def restore(self, folders: Mapping[str, Path]) -> None:
        """Take the shape of a picture from the stored network."""
        if "student" in folders:
            self._shape = stored_shape(folders["student"])

    def networks(self) -> dict[str, NetworkSpec]:
        """Return both networks, which are told the shape of a picture."""
        channels, height, width = self._shape
        shape = {"channels": channels, "height": height, "width": width}
        return {name: completed(self.recipe, name, "unet", **shape) for name in ("student", "teacher")}

    def counts(self, turn: Turn, batch: Batch) -> dict[str, int]:
        """Count pictures."""
        return {"images": len(batch["image"])}

    def loss(self, turn: Turn, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the weighted squared error to the teacher, at times that are spread over the student's steps."""
        student, x0 = self.config.denoiser(networks["student"]), batch["image"]
        steps = self.config.steps
        t = (torch.floor(stratified(len(x0), x0.device) * steps) + 1) / steps
        z = student.path.noisy(x0, torch.randn_like(x0), t)
        with torch.no_grad():
            target = self._target(self.config.denoiser(networks["teacher"]), z, t)
        return {"loss": Term(student.loss(z, t, target, self.config.weighting).sum(), "images")}

    def _target(self, teacher: Denoiser, z: Tensor, t: Tensor) -> Tensor:
        """Return the x₀ with which the student would get in one step to where the teacher gets from z at t."""
        reached, s = z, t
        for _ in range(self.config.teacher_steps // self.config.steps):
            now, s = s, s - 1 / self.config.teacher_steps
            reached = ddim_step(teacher, reached, now, s)
        return implied_x0(teacher.path, z, t, reached, s)

    def sample(self, networks: Networks, request: Request) -> Samples:
        """Draw pictures."""
        return draw(self.config.denoiser(networks["student"]), self._shape, self.config.steps, request)

    def report(self, view: RunView) -> Report | None:
        """Compare the first teacher of the run and all its students, from the same noise, with held-out pictures."""
        if view.data.eval is None:
            return Report("No held-out pictures to compare with: set data.eval or data.holdout.")
        parts = {stage: dict(view.options(stage)) for stage in view.stages}
        stages = {stage: Config.model_validate(o) for stage, o in parts.items() if o.pop("type") == "progressive"}
        first = next(iter(stages))
        teacher = _sampler(stages[first], view.network(first, "teacher"))
        students = {c.steps: _sampler(c, view.network(stage, "student")) for stage, c in stages.items()}
        generator = torch.Generator(view.device).manual_seed(view.seed)
        noise = torch.randn(self.config.compare_samples, *self._shape, generator=generator, device=view.device)
        real = (_real(part, view.device) for part in (view.data.train, view.data.eval))
        return compare(teacher, stages[first].teacher_steps, students, self.config.compare_at, noise, *real)


def _sampler(config: Config, network: nn.Module) -> Sampler:
    denoiser = config.denoiser(network)

    def pictures(noise: Tensor, steps: int) -> Tensor:
        return torch.cat([sample(denoiser, part, steps) for part in noise.split(_BATCH)]).clamp(-1, 1)

    return pictures


def _real(dataset: Dataset | Stream, device: torch.device) -> Real:
    assert isinstance(dataset, Dataset)  # one picture a row
    batch = dataset.batch(range(len(dataset)), np.arange(len(dataset), dtype=np.uint64))
    return Real(batch["image"].to(device), batch.get("label"))
