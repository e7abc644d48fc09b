"""Reflow: a student learns from pairs of noise and what its teacher makes of it, which are made once and kept.

Liu et al. (2023), algorithm 1. A flow that is fitted to the pairs (their equation 1), at all times of the path between
noise and sample, is straighter than its teacher's. On a path other than `flow`, what becomes straight is not z but what
DDIM follows in one step: the lines on which x₀ and ε do not change (Wang et al., 2024, "Rectified Diffusion"). With
`one_step`, their distillation: the student learns to make a pair's sample of its noise at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, final

import torch
from pydantic import Field
from torch import Tensor

from scaletrain.config import NetworkSpec, Recipe
from scaletrain.data.dataset import Dataset, TensorDataset
from scaletrain.data.encoded import EncodedDataset
from scaletrain.data.order import key_of
from scaletrain.data.pairs import Labels, Pairs, WithPairs, drawn_labels, drawn_scales
from scaletrain.data.sources import Rows
from scaletrain.diffusion.prediction import Weighting
from scaletrain.diffusion.solvers import sample, times
from scaletrain.diffusion.times import Times, Uniform
from scaletrain.errors import UserError
from scaletrain.evaluate.few_steps import Sampler
from scaletrain.objectives import _denoising
from scaletrain.objectives._identity import identity
from scaletrain.objectives.base import Ahead, Networks, RunView, ahead_of, together
from scaletrain.player import Batch, Term, Turn


class Config(_denoising.Config):
    """Options of `objective` for `type: reflow`."""

    teacher_steps: int = Field(64, ge=1)
    """Of the teacher, with `solver`, for the sample of a pair."""
    stored: Literal["float32", "float16"] = "float32"
    """How samples are kept on disk."""
    one_step: bool = False
    """Learn to make the sample at once, at the last time alone."""
    steps: int = Field(1, ge=1)
    """Of the student, for a sample."""
    times: Times = Uniform()
    """At which a straight flow is fitted."""
    weighting: Weighting = "plain"
    huber: float | None = Field(None, gt=0)
    """c of the pseudo-Huber loss √(error + c²) − c, in place of the squared error of a sample (Lee et al., 2024)."""


_ONE: Weighting = "plain"
"""Of one time, which has one weight."""


@final
class Objective(_denoising.Objective[Config]):
    """Train `student` on as many pairs as the data have rows; what is in the rows, but for their label, is not used."""

    def __init__(self, config: Config, recipe: Recipe):
        super().__init__(config, recipe)
        self.steps, self.teacher_steps = config.steps, config.teacher_steps
        self._folders: Mapping[str, Path] = {}
        self._pairs: dict[str, list[Pairs]] = {"train": [], "held": []}
        if config.one_step and config.steps != 1:
            raise UserError(f"objective.steps is {config.steps}: with `one_step` the student learns one; leave it out.")
        for key in ("times", "weighting") if config.one_step else ():
            if getattr(config, key) != Config.model_fields[key].default:
                raise UserError(f"objective.{key}: with `one_step` the student learns at one time; leave it out.")

    # --- the pairs ----------------------------------------------------------------------------------------------------

    def restore(self, folders: Mapping[str, Path]) -> None:
        """Remember where the networks stand, too."""
        self._folders = folders
        super().restore(folders)

    def prepare(self, train: Rows, eval: Rows | None) -> None:
        """Find what is denoised. Raises UserError."""
        if train.streaming:
            raise UserError("reflow makes a pair for each row by its number; these data stream. Set stream to false.")
        super().prepare(train, eval)
        reading = self.signature.reading
        alpha, _ = reading.path.alpha_sigma(torch.tensor(reading.path.last))
        if self.config.one_step and reading.prediction in ("eps", "score") and alpha < _FAINT:
            raise UserError(
                f"objective.prediction: at the last time all is noise, and of `{reading.prediction}` no sample "
                "follows; set objective.prediction to v, x0 or edm."
            )
        for made in self._pairs.values():
            made.clear()

    def examples(self, rows: Rows, training: bool, window: bool = False) -> Dataset:
        """Return the rows, each with a pair: each source, to train on or held out, with noise of its own."""
        role = "train" if training else "held"
        key = key_of(self.recipe.seed, "pairs", role, len(self._pairs[role]))
        dataset, signature, count = super().examples(rows, training, window), self.signature, len(rows)
        told, about = {}, self._about()
        if signature.condition == "label":
            labels = self._labels(rows, key)
            told["label"], about = torch.from_numpy(labels), (*about, labels.tobytes())
        elif signature.condition == "text":
            assert isinstance(dataset, (TensorDataset, EncodedDataset))
            told, about = {k: dataset.tensors.pop(k) for k in signature.texts}, (*about, rows.fingerprint)
        if signature.guidance:
            told["guidance"] = torch.from_numpy(drawn_scales(count, *signature.guidance, key))
        batch = self.recipe.evaluation_batch
        pairs = Pairs(count, signature.shape, key, told, batch, self.config.stored, *about)
        self._pairs[role].append(pairs)
        return WithPairs(dataset, pairs)

    def _labels(self, rows: Rows, key: int) -> Labels:
        """Return the class that networks are told for each row (N,): its label where it has one, or else any."""
        if "label" in rows.columns and self._classes is not None:
            return self._classes.encode(rows, "label")
        return drawn_labels(len(rows), self.signature.classes, key)

    def _about(self) -> tuple[object, ...]:
        """Return what determines a sample beside its noise and what is told of it."""
        config, said = self.config, self.teacher_of(lambda z, t: z)
        how = said.reading.model_dump(), said.path.model_dump(), config.solver, config.teacher_steps
        who = identity(self.recipe.networks["teacher"], self._folders.get("teacher"))
        null = [(name, value.numpy().tobytes()) for name, value in self._null.items()]
        guided = config.guidance, config.guidance_interval, self.signature.guidance, null
        return *who, self.recipe.train.precision, *how, *guided, config.clip

    def networks(self) -> dict[str, NetworkSpec]:
        """Return the student: of the teacher, the samples are kept."""
        found = super().networks()
        del found["teacher"]
        return found

    def ahead(self) -> Ahead:
        """Have the teacher make the samples, once."""
        sources = [*self._pairs["train"], *self._pairs["held"]]

        def do(networks: Networks, device: torch.device, pairs: Pairs, part: int) -> None:
            torch.manual_seed(key_of(pairs.key, part))  # for a solver that draws

            def made(given: dict[str, Tensor]) -> Tensor:
                there = {name: value.to(device) for name, value in given.items()}
                teacher = self.teacher(networks, there)
                return sample(teacher, there["noise"], self.config.teacher_steps, self.config.solver)

            pairs.write(part, made)

        return together(super().ahead(), ahead_of({"teacher": super().networks()["teacher"]}, sources, do))

    # --- in the loop --------------------------------------------------------------------------------------------------

    def loss(self, turn: Turn, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the loss at times that are spread over the path, or at the last one alone."""
        noise, made, student = batch["noise"], batch["made"], self.student(networks, batch)
        t, weighting = times(student.path.last, noise), _ONE
        if not self.config.one_step:
            t, weighting = self.config.times.draw(len(noise), student.path, noise.device), self.config.weighting
        found = student.loss(student.path.noisy(made, noise, t), t, made, weighting, noise)
        if self.config.huber:
            found = torch.sqrt(found + self.config.huber**2) - self.config.huber
        return {"loss": Term(found.sum(), "samples")}

    def evaluate(self, networks: Networks, batch: Batch) -> dict[str, Term]:
        """Return the loss, and the squared error of what the student makes of the noise in one step."""
        found = self.sampler(networks[self.trained])(batch["noise"], 1, self.told(batch))
        error = (found - batch["made"]).square().flatten(1).mean(1).sum()
        return {**self.loss(self.turns[0], networks, batch), "one_step": Term(error, "samples", 0.0)}

    def conclude(self, metrics: dict[str, float]) -> dict[str, float]:
        """Give the error of one step as its root, `one_step_rmse`."""
        return {**metrics, "one_step_rmse": math.sqrt(metrics.pop("one_step"))}

    def samplers(self, view: RunView, stage: str) -> dict[int, Sampler]:
        """Return the student at the numbers of steps of the table, or at one alone."""
        sampler = self.sampler(view.network(stage, self.trained))
        return dict.fromkeys([1] if self.config.one_step else self.config.compare_at, sampler)


_FAINT = 1e-3
"""Signal from which on what is said of the noise says nothing of x₀, in fp32."""
