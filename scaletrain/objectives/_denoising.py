"""What diffusion and all ways to distil it do with a trained network: samples, a pipeline, and the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from scaletrain.data.dataset import Dataset
from scaletrain.data.order import key_of
from scaletrain.data.stream import Stream
from scaletrain.diffusion import pipelines
from scaletrain.diffusion.signature import Space
from scaletrain.diffusion.solvers import Solver, sample
from scaletrain.evaluate.few_steps import Sampler, compare
from scaletrain.evaluate.judges import Classifier, Judging, ModesJudge, PictureJudge, Real
from scaletrain.objectives import _denoisers, _latents
from scaletrain.objectives._denoisers import Config as Config
from scaletrain.objectives.base import Networks, Report, Request, RunView, Samples

_BATCH = 1024  # samples drawn at a time for the report

C = TypeVar("C", bound=Config)


class Objective(_denoisers.Denoisers[C], Generic[C]):
    """Draws samples from the network `trained`, and compares them with its teacher's."""

    steps: int
    """Of a sample, by default."""

    def sampler(self, network: nn.Module) -> Sampler:
        """Return how samples are drawn from the trained network: by default, by the solver along its path.

        A network that learns from no teacher is guided itself.
        """
        denoiser, solver = self.drawing(network), self.drawn_by
        assert solver is not None
        if not self.needs_teacher and self.config.guidance != 1:
            denoiser = self.guided(denoiser)

        def draw(noise: Tensor, steps: int, told: Mapping[str, Tensor]) -> Tensor:
            return sample(denoiser.given(**told), noise, steps, solver)

        return draw

    @property
    def drawn_by(self) -> Solver | None:
        """The solver that `sampler` draws by, along the path's grid; None where it draws in another way."""
        return self.config.solver

    def sample(self, networks: Networks, request: Request) -> Samples:
        """Draw pictures or points; with classes, each in turn."""
        signature, generator = self.signature, request.generator
        noise = torch.randn(request.count, *signature.shape, generator=generator, device=generator.device)
        found = self.sampler(networks[self.trained])(noise, self.steps, self.conditions(noise))
        return self.shown(self._ending(networks.get(_latents.NAME))(found))

    def _ending(self, autoencoder: nn.Module | None) -> Callable[[Tensor], Tensor]:
        """Return what becomes of samples: pictures stay in [-1, 1], latents become such where that is possible."""
        if self.signature.space == "image":
            return lambda x0: x0.clamp(-1, 1)
        if self.signature.space == "latent" and autoencoder is not None:
            return partial(_latents.pictures_of, autoencoder)
        return lambda x0: x0

    def shown(self, x0: Tensor) -> Samples:
        """Return x₀ as samples."""
        if x0.dim() == 2:
            return Samples(points=x0)
        return Samples(images=x0[:, : 3 if x0.shape[1] >= 3 else 1] / 2 + 0.5)  # of latents, some channels

    # --- as a pipeline of diffusers -----------------------------------------------------------------------------------

    def scheduler(self, known: dict[str, Any]) -> dict[str, Any] | None:
        """Return the configuration of the scheduler of diffusers that samples as `sampler` does; None if none does.

        known: that of the pipeline that the first teacher came from.
        """
        clips = self.config.clip and (self.signature.condition or self.signature.space != "image")
        if self.drawn_by is None or clips:
            return None
        return pipelines.scheduler_of(self.signature.reading, self.config.clip, known, self.drawn_by, self.steps)

    def pipeline(self, network: str) -> pipelines.Plan | None:
        """Return the pipeline that the trained network belongs to."""
        signature = self.signature
        if network != self.trained or len(signature.shape) != 3:
            return None
        source = pipelines.Pipeline.open(signature.pipeline) if signature.pipeline else None
        scheduler = self.scheduler(source.part("scheduler") if source else {})
        if scheduler is None:
            return None
        plain = signature.condition is None and signature.space == "image"
        if source is None and not (plain and scheduler["_class_name"] in pipelines.ALONE):
            return None
        called, config = (source, scheduler, signature, self.steps, self.conditions, self.sampler), self.config
        if self.needs_teacher or signature.guidance or config.guidance == 1:
            return pipelines.Plan(*called)
        if config.guidance < 1 or config.guidance_interval:  # which pipelines do not have
            return None
        return pipelines.Plan(*called, config.guidance, {k: self._null[k] for k in signature.texts})

    # --- the table ----------------------------------------------------------------------------------------------------

    def samplers(self, view: RunView, stage: str) -> dict[int, Sampler]:
        """Return what a stage of this objective has to show in the table, by the number of steps."""
        sampler = self.sampler(view.network(stage, self.trained))
        return dict.fromkeys(self.config.compare_at, sampler)

    teacher_steps: int | None = None
    """Of the teacher in the table, beside those of `compare_at`."""

    def report(self, view: RunView) -> Report | None:
        """Compare the first teacher of the run and all students, from the same noise, with real samples."""
        if not self.needs_teacher:
            return None
        stage = view.stages[-1]
        ending = self._ending(view.network(stage, _latents.NAME) if _latents.NAME in self.recipe.networks else None)
        judge = self._judge(view, ending)
        if judge is None:
            return Report("No held-out samples to compare with: set data.eval or data.holdout.")
        stages = {name: found for name in view.stages if isinstance(found := view.objective(name), Objective)}
        stages = {name: found for name, found in stages.items() if found.needs_teacher}
        first = next(iter(stages))
        learned, network = stages[first], view.network(first, "teacher")

        def teacher(noise: Tensor, steps: int, told: Mapping[str, Tensor]) -> Tensor:
            return sample(learned.teacher({"teacher": network}, told), noise, steps, learned.config.solver)

        students: dict[int, Sampler] = {}
        for name, found in stages.items():
            students |= found.samplers(view, name)
        own = next((o.teacher_steps for o in stages.values() if o.teacher_steps), 64)
        shape = self.signature.shape
        count = self._count
        generator = torch.Generator(view.device).manual_seed(view.seed)
        noise = torch.randn(count, *shape, generator=generator, device=view.device)
        told = self.conditions(noise)
        size = _BATCH if self.signature.space == "point" else self.recipe.evaluation_batch
        wrap = _in_parts(ending, size, key_of(view.seed, "draws"))
        by_steps = {n: wrap(sampler) for n, sampler in students.items()}
        return compare(wrap(teacher), own, by_steps, self.config.compare_at, noise, told, judge, self.shown)

    @property
    def _count(self) -> int:
        return self.config.compare_samples or (12_000 if self._source else 2048)

    def _judge(self, view: RunView, ending: Callable[[Tensor], Tensor]) -> Judging | None:
        if self._source is not None:
            return ModesJudge(self._source.to(view.device), view.seed)
        parts = view.data.train, view.data.eval
        size, space = self.recipe.evaluation_batch, self.signature.space
        train, held = (_real(part, space, size, ending, view.device) if part else None for part in parts)
        if held is None:
            return None
        train, held = (train, held) if train else held.halves()
        source = self.config.judge
        return PictureJudge(train, held, Classifier(view.other(source)) if source else None, self._count)


def _in_parts(ending: Callable[[Tensor], Tensor], size: int, seed: int) -> Callable[[Sampler], Sampler]:
    """Have a sampler take some samples at a time.

    ending: what becomes of its samples. seed: of what it draws itself: the same for all samplers, and not that of the
    noise that they begin with.
    """

    def wrap(sampler: Sampler) -> Sampler:
        def draw(noise: Tensor, steps: int, told: Mapping[str, Tensor]) -> Tensor:
            torch.manual_seed(seed)
            parts = [
                ending(sampler(part, steps, {k: v[i * size :][: len(part)] for k, v in told.items()}))
                for i, part in enumerate(noise.split(size))
            ]
            return torch.cat(parts)

        return draw

    return wrap


def _real(
    dataset: Dataset | Stream, space: Space, size: int, ending: Callable[[Tensor], Tensor], device: torch.device
) -> Real | None:
    """Return some samples of the data; None where rows hold nothing. Latents come through the autoencoder, too."""
    assert isinstance(dataset, Dataset)  # one sample a row
    count = min(len(dataset), 10_000)
    spread = np.linspace(0, len(dataset) - 1, count).astype(int).tolist()  # files may stand class by class
    batch = dataset.batch(spread, np.arange(count, dtype=np.uint64))
    if space not in batch:
        return None
    return Real(torch.cat([ending(part.to(device)) for part in batch[space].split(size)]), batch.get("label"))
