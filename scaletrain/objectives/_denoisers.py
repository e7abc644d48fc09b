"""What diffusion and all ways to distil it share: what is denoised, which networks do so, and what they are told.

A batch has what is denoised in the column `image`, `latent` or `point`, or nothing but `draw`, where data are drawn
from the teacher; and with classes, `label`. With a network `autoencoder`, pictures are encoded, once, before the
training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Generic, Literal, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from scaletrain.config import NetworkSpec, Recipe
from scaletrain.data.classes import Classes
from scaletrain.data.dataset import Dataset, TensorDataset
from scaletrain.data.encoded import Encodings
from scaletrain.data.images import ImageOptions
from scaletrain.data.points import arrays, draws, points
from scaletrain.data.sources import Rows
from scaletrain.diffusion import pipelines, texts
from scaletrain.diffusion.denoiser import Denoiser, Guidance
from scaletrain.diffusion.path import AnyPath, Cosine
from scaletrain.diffusion.prediction import Prediction, Weighting
from scaletrain.diffusion.reading import Reading
from scaletrain.diffusion.signature import Signature, Space
from scaletrain.diffusion.solvers import Solver
from scaletrain.errors import UserError
from scaletrain.explain import decode
from scaletrain.networks import mixture
from scaletrain.networks._latents import Latents
from scaletrain.objectives import _latents, base
from scaletrain.objectives.base import Ahead, Networks, completed
from scaletrain.player import Batch, Turn
from scaletrain.shelf import Shelf

_TEXTS = 16  # of the data, by which samples are drawn


class Config(ImageOptions):
    """Options that all of them have."""

    path: AnyPath | None = None
    """The path from data to noise; by default the teacher's, or `cosine`."""
    prediction: Prediction | None = None
    """What the trained network predicts there; by default what its teacher does, or `v` (of a mixture's, `edm`)."""
    data_std: float | None = Field(None, gt=0)
    """For `edm`: the standard deviation of the data, by default the teacher's, or that of the first 1,000 samples."""
    weighting: Weighting = "snr_plus_one"
    """Of errors (see `scaletrain.diffusion.prediction.weight`)."""
    condition: Literal["label", "text"] | None = None
    """What the network is told of each sample; a student, what its teacher is. text: by columns as `prompt_embeds`."""
    no_text: str | None = None
    """A safetensors file with what stands for no text, by column; by default what a pipeline says of the prompt ""."""
    clip: bool = False
    """Keep the predicted x₀ in [-1, 1] while sampling."""
    solver: Solver = "ddim"
    """Of samples and, where it distils, of the teacher."""
    guidance: float = Field(1.0, ge=0)
    """Classifier-free guidance (Ho & Salimans, 2021) of samples and, where it distils, of the teacher; 1 is none."""
    guidance_interval: tuple[float, float] | None = Field(None, strict=False)
    """Guide between these times of the path only (Kynkäänniemi et al., 2024)."""
    compare_at: list[int] = Field([1, 2, 4, 8], min_length=1)
    """Steps at which the table of a run has the teacher too, besides its own."""
    compare_samples: int | None = Field(None, ge=64)
    """Samples behind each figure of the table, by default 2,048, and 12,000 of points."""
    judge: str | None = Field(None, pattern="^run:.+/[^/]+$")
    """A classifier of pictures that judges samples in the table, `run:FOLDER/NETWORK`."""


C = TypeVar("C", bound=Config)


class Denoisers(base.Objective[C], Generic[C]):
    """Trains the network `trained`, from data or from what `teacher`, which is frozen, says."""

    trained: ClassVar[str] = "student"
    turns: tuple[Turn, ...] = (Turn("train", "student"),)
    throughput = "samples"
    companions: ClassVar[tuple[str, ...]] = (_latents.NAME,)
    tells: tuple[str, ...] = ()
    """What the trained network is told beside its condition, of `guidance` and `target`."""
    needs_teacher: bool = True
    """Whether it learns from one. Set it in `__init__` when it depends on options."""
    scales: tuple[float, float] | None = None
    """Of guidance that the student is told; by default those that its teacher is told."""
    unconditioned: bool = False
    """Whether it calls networks with what stands for no condition, whatever the guidance. Set it in `__init__`."""

    def __init__(self, config: C, recipe: Recipe):
        super().__init__(config, recipe)
        self._classes: Classes | None = None
        self._teacher: Signature | None = None
        self._signature: Signature | None = None
        self._texts: Mapping[str, Tensor] = {}
        self._null: Mapping[str, Tensor] = {}
        self._autoencoder = _latents.Autoencoder(recipe) if _latents.NAME in recipe.networks else None
        self._encodings: list[Encodings] = []
        spec = recipe.networks.get("teacher")
        self._source: mixture.Mixture | None = None
        self._exact = spec is not None and spec.type == "mixture"
        if spec is None:
            if self.needs_teacher:
                raise UserError("networks.teacher is missing: say whom the student learns from.")
            return
        if self._exact:
            self._source = mixture.Mixture(decode(mixture.Config, spec.config, "networks.teacher.config"))
        elif spec.source is spec.path is None:
            raise UserError("networks.teacher must have `from` or `path` for its weights, or be a `mixture`.")
        if not spec.frozen and not self._exact:
            raise UserError("networks.teacher must have `frozen: true`.")

    # --- what the data tell -------------------------------------------------------------------------------------------

    def restore(self, folders: Mapping[str, Path]) -> None:
        """Take over how stored networks are called."""
        if "teacher" in folders:
            self._teacher = Signature.load(folders["teacher"])
            self._draw_from(self._teacher)
        if self.trained in folders:
            self._signature = Signature.load(folders[self.trained])
            self._draw_from(self._signature)
            if (folders[self.trained] / "classes.json").exists():
                self._classes = Classes.load(folders[self.trained])
            self._texts, self._null = texts.load(folders[self.trained])
        if self._autoencoder is not None:
            self._autoencoder = _latents.Autoencoder(self.recipe, folders.get(_latents.NAME))
        with suppress(UserError):  # for samples, folders need not be there
            self._look()

    def _look(self, sides: tuple[int, ...] | None = None) -> None:
        """Read how networks that come from a `path` are called. sides: height and width, as the data have them."""
        teacher, own = (self.recipe.networks.get(name, NetworkSpec()).path for name in ("teacher", self.trained))
        if teacher and (self._teacher is None or sides):
            self._teacher = pipelines.signature(teacher, sides)
        if own and "teacher" not in self.recipe.networks and (self._signature is None or sides):
            self._signature = pipelines.signature(own, sides)

    def _draw_from(self, signature: Signature | None) -> None:
        if self._source is None and signature is not None and signature.source is not None:
            self._source = mixture.Mixture(signature.source)

    def prepare(self, train: Rows, eval: Rows | None) -> None:
        """Find what is denoised, its shape and, where they are told, its classes. Raises UserError."""
        self._look()
        self._encodings = []
        config, before = self.config, self._teacher or self._signature
        condition = config.condition or (before.condition if before else None)
        space = self._space(train)
        self._check_space(space, before)
        if (
            "label" in train.columns
            and self._classes is None
            and (condition or (self.needs_teacher and not self._source))
        ):
            self._classes = Classes.find(train, "label", (before.classes or None) if before else None)
        if condition == "label" and self._classes is None and self._source is None:
            train.require("label", "the class that the network is told")
        if self._source is not None:
            shape, found = self._source.shape, self._source.std
            classes = len(self._source.means)
        else:
            classes = len(self._classes) if self._classes else before.classes if before else 0
            shape, found = self._measure(train, space, before)
            if len(shape) != (1 if space == "point" else 3):
                raise UserError(
                    f"{train.name(0)}: `{space}` is of shape {shape}; it should be "
                    f"{'(D,), the coordinates of a point' if space == 'point' else '(C, H, W)'}."
                )
            if "draw" not in train.columns:
                self._look(shape[1:])
                before = self._teacher or self._signature
            if before and before.space == space == "latent" and before.shape[0] != shape[0]:
                raise UserError(
                    f"`latent` has {shape[0]} channels, and the network denoises {before.shape[0]}: these are latents "
                    "of another autoencoder."
                )
        if config.judge:
            self._check_judge(config.judge, space, shape)
        latents = self._whose(train, eval) if space == "latent" else None
        if condition == "text":
            self._read_texts(train, before)
        own, reading = self._signature, self._reading(found)
        if own is not None and (own.reading.path, own.reading.prediction) != (reading.path, reading.prediction):
            raise UserError(
                f"networks.{self.trained} goes on from a network that predicts `{own.reading.prediction}` on the path "
                f"`{own.reading.path.type}`, and this recipe reads it as `{reading.prediction}` on "
                f"`{reading.path.type}`: leave objective.prediction and objective.path out."
            )
        scales = self.scales or (before.guidance if before else None)
        self._signature = Signature(
            reading=reading,
            space=space,
            shape=shape,
            condition=condition,
            classes=classes if condition == "label" else 0,
            texts=list(self._texts),
            fixed=before.fixed if before else {},
            guidance=scales,
            source=self._source.config if self._source else None,
            pipeline=before.pipeline if before else None,
            latents=latents,
        )
        if self.needs_teacher and config.guidance != 1:
            self.require_guidable()
        if scales and not scales[0] <= config.guidance <= scales[1]:
            raise UserError(
                f"objective.guidance: {config.guidance:g} is not one of the scales that the network is told, "
                f"{scales[0]:g} to {scales[1]:g}."
            )

    def _check_judge(self, judge: str, space: Space, shape: tuple[int, ...]) -> None:
        """Raise UserError unless the judge is there, and a classifier of samples of this shape, which are pictures."""
        decoded = space == "latent" and self._autoencoder is not None
        if not self.needs_teacher or not (space == "image" or decoded):
            raise UserError("objective.judge is for the table of a student of pictures; leave it out.")
        if decoded:
            assert self._autoencoder is not None
            shape = self._autoencoder.picture(shape)
        spec = Shelf(Path()).spec(judge)
        takes = tuple(spec.config.get(key) for key in ("channels", "height", "width"))
        if takes != shape:
            raise UserError(f"objective.judge: `{judge}` takes pictures of {takes}, and samples are {shape}.")
        try:
            logits = Shelf(Path()).outline_of(judge).to("meta")(torch.zeros(2, *shape, device="meta"))
            fits = logits.dim() == 2
        except (TypeError, RuntimeError):
            fits = False
        if not fits:
            raise UserError(f"objective.judge: `{judge}` is a `{spec.type}`, no classifier of pictures.")

    def _read_texts(self, rows: Rows, before: Signature | None) -> None:
        """Take some texts of the data, to draw samples by, and what stands for none. Raises UserError."""
        columns = before.texts if before and before.texts else [c for c in texts.COLUMNS if c in rows.columns]
        for column in columns or texts.COLUMNS[:1]:
            rows.require(column, "what the network is told of a text")
        self._texts = arrays(rows.sample(_TEXTS), columns).tensors
        if self.config.no_text:
            self._null = texts.read_null(self.config.no_text, self._texts)
            return
        by_calls = self.config.guidance != 1 and not (before and before.guidance)
        if not self._null and (self.unconditioned or by_calls):
            path = self.recipe.networks.get("teacher", self.recipe.networks.get(self.trained, NetworkSpec())).path
            found = pipelines.Pipeline.open(path) if path else None
            if found is None:
                raise UserError("objective.no_text is missing: a safetensors file with what stands for no text.")
            self._null = found.null()

    def _whose(self, *data: Rows | None) -> Latents | None:
        """Return whose latents all are that have to do with them. Raises UserError for those of two autoencoders."""
        known: list[tuple[str, Latents | None]] = []
        for name, signature in (("teacher", self._teacher), (self.trained, self._signature)):
            known += [(f"networks.{name} denoises", signature.latents)] if signature else []
        if self._autoencoder is not None:
            known.append((f"networks.{_latents.NAME} makes", self._autoencoder.latents))
        for rows in data:
            known += _latents.told_by(rows)
        return _latents.agreed(known)

    def _space(self, rows: Rows) -> Space:
        if "draw" in rows.columns:
            if self._teacher is not None:
                return self._teacher.space
            if self._source is None:
                raise UserError("data.train=noise:N is for objectives whose teacher tells what it denoises.")
            return "point"
        if self._autoencoder is not None and not {"image", "latent"}.isdisjoint(rows.columns):
            return "latent"
        for space in ("image", "latent", "point"):
            if space in rows.columns:
                return space
        rows.require("image", "what is denoised: `image`, `latent` or `point`")
        raise AssertionError

    @staticmethod
    def _check_space(space: Space, before: Signature | None) -> None:
        """Raise UserError where pictures are given to what denoises latents, or latents to what denoises pictures."""
        if before and (space, before.space) == ("image", "latent"):
            raise UserError(
                f"networks.{_latents.NAME} is missing: the network denoises latents, and the data are pictures. Name "
                "the autoencoder of those latents, frozen, or encode the data by it (scaletrain encode)."
            )
        if before and (space, before.space) == ("latent", "image"):
            raise UserError("the network denoises pictures: give such, and leave networks.autoencoder out.")

    def _measure(self, rows: Rows, space: Space, before: Signature | None) -> tuple[tuple[int, ...], float]:
        """Return the shape of a sample, and the standard deviation of its values."""
        if "draw" in rows.columns:
            assert before is not None
            return before.shape, before.reading.data_std
        if space == "latent" and space not in rows.columns:
            assert self._autoencoder is not None
            return self._autoencoder.shape(self.config, rows), 1.0
        if space == "image":
            shape: tuple[int, ...] = self.config.shape(rows)
            some = self.config.pictures(rows.sample(1000), False, shape)  # type: ignore[arg-type]
            values = some.batch(range(len(some)), np.zeros(len(some), np.uint64))["image"]
        else:
            values = points(rows.sample(1000), space).tensors[space]
            shape = tuple(values.shape[1:])
        return shape, float(values.double().std(correction=0))

    def _reading(self, found: float) -> Reading:
        """Return how the trained network is read. found: the standard deviation of the data."""
        config, before = self.config, self._teacher or self._signature
        known = before.reading if before else None
        if not self._exact and self.needs_teacher and known is None:
            for key in ("path", "prediction"):
                if getattr(config, key) is None:
                    raise UserError(
                        f"objective.{key}: the teacher does not say on which path it was trained and what it predicts; "
                        f"give both, `objective.path` and `objective.prediction`."
                    )
        std = config.data_std or (known.data_std if known else found)
        path = config.path or (known.path if known else self.new_path(std))
        fallback: Prediction = known.prediction if known else ("edm" if self._exact else "v")
        reading = Reading(path=path, prediction=config.prediction or fallback, data_std=std)
        if reading.begins_blind:
            raise UserError(
                f"objective.prediction: at the last time of the path `{path.type}` there is no signal, so that "
                f"`{reading.prediction}` does not tell x0 there; predict `velocity`, `v`, `x0` or `edm`."
            )
        return reading

    def new_path(self, data_std: float) -> AnyPath:
        """Return the path of a network that goes on from no other."""
        return Cosine()

    @property
    def signature(self) -> Signature:
        """How the trained network is called, once the data or a checkpoint have told."""
        assert self._signature is not None
        return self._signature

    def save_assets(self, network: str, folder: Path) -> None:
        """Write how the trained network is called beside its weights, and the names of its classes."""
        if network == self.trained:
            self.signature.save(folder)
            if self._classes is not None:
                self._classes.save(folder)
            texts.save(folder, self._texts, self._null)

    def examples(self, rows: Rows, training: bool, window: bool = False) -> Dataset:
        """Return what is denoised, with its class where there is one."""
        if "draw" in rows.columns:
            return draws(rows)
        signature = self.signature
        if signature.space == "image":
            return self.config.pictures(rows, training, signature.shape, self._classes)  # type: ignore[arg-type]
        if self._autoencoder is not None and signature.space not in rows.columns:
            made = self._autoencoder.encodings(self.config, rows, signature.shape, self.recipe)
            self._encodings.append(made)
            return _latents.encoded(rows, made, self._classes, signature.texts)
        if signature.condition is None:
            return points(rows, signature.space)
        found = arrays(rows, [signature.space, *signature.texts]).tensors
        if self._classes is not None and signature.condition == "label":
            found["label"] = torch.from_numpy(self._classes.encode(rows, "label"))
        return TensorDataset(found)

    # --- networks -----------------------------------------------------------------------------------------------------

    def networks(self) -> dict[str, NetworkSpec]:
        """Return the trained network and its teacher, if it has one."""
        found = {self.trained: self.denoiser_spec(self.trained)}
        if "teacher" in self.recipe.networks:
            found["teacher"] = self.recipe.networks["teacher"].model_copy(update={"frozen": True})
        if self._autoencoder is not None:
            found[_latents.NAME] = self._autoencoder.spec
        return found

    def facts(self) -> dict[str, str]:
        """Return what names the autoencoder, if there is one."""
        latents = self._autoencoder.latents if self._autoencoder else None
        return {f"networks.{_latents.NAME}": latents.autoencoder} if latents else {}

    def ahead(self) -> Ahead | None:
        """Have the autoencoder make the latents of pictures, once."""
        return _latents.encoding(self._encodings, self._autoencoder.spec) if self._autoencoder else None

    def denoiser_spec(self, name: str) -> NetworkSpec:
        """Return a denoiser of this name, which is told the shape of a sample and what else it will be called with."""
        signature = self.signature
        given = self.recipe.networks.get(name, NetworkSpec())
        told = {"classes": signature.classes} if signature.condition == "label" else {}
        told |= dict.fromkeys(self.tells, True)
        # What goes on from a network that is told it has a place for it.
        has = (given.source or given.path) and self._teacher is not None and self._teacher.guidance
        if signature.guidance and not has:
            told["guidance"] = True
        if given.source or given.path:
            return completed(self.recipe, name, "", **told).model_copy(update={"type": given.type})
        if len(signature.shape) == 1:
            return completed(self.recipe, name, "point_denoiser", dim=signature.shape[0], **told)
        channels, height, width = signature.shape
        return completed(self.recipe, name, "unet", channels=channels, height=height, width=width, **told)

    def student(self, networks: Networks, batch: Batch | None = None) -> Denoiser:
        """Read the trained network, told what a batch tells."""
        return self.denoiser(networks[self.trained]).given(**self.told(batch or {}))

    def denoiser(self, network: Callable[..., Tensor]) -> Denoiser:
        """Read a network as the trained one is."""
        return Denoiser(network, self.signature.reading)

    def drawing(self, network: Callable[..., Tensor]) -> Denoiser:
        """Read it so to draw samples, which the recipe may clip; what is clipped has no gradient."""
        return Denoiser(network, self.signature.reading, self.config.clip)

    def teacher(self, networks: Networks, batch: Mapping[str, Tensor] | None = None) -> Denoiser:
        """Read the teacher on the path of the student, told what a batch tells, guided as that or the recipe says."""
        told, found = self.told(batch or {}), self.teacher_of(networks["teacher"])
        if self._teacher is not None and self._teacher.guidance:
            return found.given(**told)
        scale = told.pop("guidance", self.config.guidance)
        found = found.given(**told)
        return found if isinstance(scale, float) and scale == 1 else self.guided(found, scale)

    def teacher_of(self, network: Callable[..., Tensor]) -> Denoiser:
        """Read a teacher's network on the path of the student."""
        own = self.signature.reading
        if self._exact:
            reading = own.model_copy(update={"prediction": "exact"})
        else:
            reading = self._teacher.reading if self._teacher else own
        return Denoiser(network, reading, self.config.clip).along(own.path)

    def require_guidable(self, key: str = "guidance") -> None:
        """Raise UserError where whoever is guided was not trained both with a condition and without."""
        known = self._teacher if self.needs_teacher else self.signature
        if self.signature.condition is None:
            raise UserError(f"objective.{key}: there is no condition to be guided by; set objective.condition=label.")
        if not self._exact and not (known and (known.dropped or known.guidance)):
            who = "the teacher" if self.needs_teacher else "the network"
            raise UserError(
                f"objective.{key}: {who} is not trained without its condition, so that it cannot be guided; train it "
                f"with `objective.dropped`, such as 0.1, or leave `{key}` out."
            )

    def guided(self, denoiser: Denoiser, scale: float | Tensor | None = None) -> Denoiser:
        """Guide a denoiser by what it is told, or tell it the scale; by default, the recipe's."""
        scale = self.config.guidance if scale is None else scale
        known = self._teacher if self.needs_teacher else self.signature
        if known is not None and known.guidance:
            return denoiser.given(guidance=torch.as_tensor(scale))
        low, high = self.config.guidance_interval or (-torch.inf, torch.inf)
        return denoiser.under(Guidance(scale, self.null(), low, high))

    def null(self) -> Mapping[str, Tensor | int]:
        """Return what stands for no condition, by name, () or (...) each, or a number."""
        if self.signature.condition == "text":
            return self._null
        return {"label": self.signature.classes}

    # --- batches ------------------------------------------------------------------------------------------------------

    def counts(self, turn: Turn, batch: Batch) -> dict[str, int]:
        """Count samples."""
        return {"samples": len(next(iter(batch.values())))}

    def told(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what networks are told of a batch."""
        signature = self.signature
        names = ["label"] if signature.condition == "label" else [*signature.texts]
        names += ["guidance"] if signature.guidance else []
        found = {name: batch[name] for name in names if name in batch}
        return found | self._fixed(next(iter(batch.values()))) if batch else found

    def _fixed(self, like: Tensor) -> dict[str, Tensor]:
        """Return what networks are told of all samples alike, (B, ...) each, for so many as `like` (B, ...)."""
        fixed = {k: torch.tensor(v).to(like.device, non_blocking=True) for k, v in self.signature.fixed.items()}
        return {k: v.expand(len(like), *v.shape) for k, v in fixed.items()}

    def conditions(self, noise: Tensor) -> dict[str, Tensor]:
        """Return what networks are told of samples that are drawn from noise (N, ...): classes, or texts, in turn, and
        the recipe's scale of guidance.
        """
        number, signature = torch.arange(len(noise), device=noise.device), self.signature
        told = self._fixed(noise)
        if signature.condition == "label":
            told["label"] = number % signature.classes
        for name in signature.texts:
            known = self._texts[name].to(noise.device)
            told[name] = known[number % len(known)]
        if signature.guidance:
            told["guidance"] = torch.full((len(noise),), self.config.guidance, device=noise.device)
        return told

    def data(self, batch: Batch) -> tuple[Tensor, Batch]:
        """Return x₀ (B, ...), drawn from the mixture where a batch has none, and the batch with what networks are told
        (see `asked`).
        """
        batch = self.asked(batch)
        if "draw" not in batch:
            return batch[self.signature.space], batch
        if self._source is None:
            raise UserError("data.train=noise:N: this objective needs data, which its teacher cannot draw; give some.")
        source = self._source.to(batch["draw"].device)
        return source.draw(len(batch["draw"]), batch.get("label")), batch

    def asked(self, batch: Batch) -> Batch:
        """Return a batch with what networks are told beside its columns, drawn evenly: where the student is told the
        scale of guidance, one of its range; where there are classes and no data, one of them.
        """
        some, drawn = next(iter(batch.values())), {}
        if self.signature.guidance:
            drawn["guidance"] = torch.empty(len(some), device=some.device).uniform_(*self.signature.guidance)
        if self.signature.condition == "label" and "draw" in batch:
            drawn["label"] = torch.randint_like(batch["draw"], self.signature.classes)
        return {**batch, **drawn}
