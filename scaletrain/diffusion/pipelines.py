"""Pipelines of diffusers as folders: what their denoisers are, how they are read, and what samplers they name.

Here nothing is loaded but configurations, and, for prompts, the text encoders.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scaletrain.diffusion.path import AnyPath, Discrete, Flow
from scaletrain.diffusion.prediction import Prediction
from scaletrain.diffusion.reading import Reading
from scaletrain.diffusion.signature import Signature
from scaletrain.diffusion.solvers import Solver
from scaletrain.errors import UserError

INDEX = "model_index.json"
_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
_LEAST = 1e-12
"""ᾱ of a last step that holds no signal at all (Lin et al., 2024), which a path's cannot be 0 for."""
ALONE = {"DDIMScheduler": "DDIMPipeline", "LCMScheduler": "DDPMPipeline"}
"""Pipelines of a network without conditions, by the scheduler that they call rightly: only the first passes
`use_clipped_model_output` on, and the second none but those that all have."""
_TOLD = (1.0, 15.0)
"""Scales of guidance that networks are asked for which are told it; their folders do not say."""


@dataclass(frozen=True)
class Pipeline:
    """A folder of a pipeline, on this machine; path: how a recipe names it."""

    path: str
    folder: Path
    index: dict[str, Any]

    @classmethod
    def open(cls, path: str) -> Pipeline | None:
        """Open a folder, or fetch the configurations of a Hub id; None where it is no pipeline. Raises UserError."""
        folder = Path(path)
        if not folder.is_dir():
            folder = _fetched(path, ["*.json", "**/*.json"])
        file = folder / INDEX
        return cls(path, folder, json.loads(file.read_text())) if file.exists() else None

    def part(self, name: str) -> dict[str, Any]:
        """Return the configuration of a part; empty where it has none of this name."""
        if (self.index.get(name) or [None])[0] is None:
            return {}
        for file in ("config.json", "scheduler_config.json"):
            if (path := self.folder / name / file).exists():
                found: dict[str, Any] = json.loads(path.read_text())
                return found
        return {}

    @property
    def denoiser(self) -> str:
        """The name of the part that denoises."""
        return "unet" if "unet" in self.index else "transformer"

    @property
    def factor(self) -> int:
        """Pixels to a latent, in each direction."""
        return int(2 ** (len(self.part("vae").get("block_out_channels", [0])) - 1))

    @property
    def text_encoders(self) -> list[str]:
        """The names of its parts that encode texts."""
        return [k for k in self.index if k.startswith("text_encoder") and self.part(k)]

    def complete(self) -> Path:
        """Return the folder with the weights of all parts but the denoiser."""
        if Path(self.path).is_dir():
            return self.folder
        return _fetched(self.path, ignored=[f"{self.denoiser}/*", "*.bin", "*.ckpt", "*.msgpack", "*.onnx*"])

    def signature(self, sides: tuple[int, ...] | None = None) -> Signature | None:
        """Return how the denoiser is called and read; None where its scheduler does not say in words that we know.

        sides: height and width of the samples, by default those that the pipeline makes.
        """
        from scaletrain.networks.diffusers_model import read_config

        config = read_config(str(self.folder))
        channels, side = config["in_channels"], config.get("sample_size")
        if config["_class_name"] == "FluxTransformer2DModel":  # its files name no size: that of 1024 pixels
            channels, side = channels // 4, 128
        own = tuple(side) if isinstance(side, list) else (side, side)
        sides = sides or own
        assert sides is not None
        shape = (channels, *sides)
        reading = reading_of(self.part("scheduler"), tokens=_tokens(config, shape))
        if reading is None:
            return None
        latent = bool(self.part("vae"))
        texts, fixed = _texts(config), self._fixed(config, sides)
        classes = config.get("num_class_embeds") or 0
        if config["_class_name"] == "DiTTransformer2DModel":
            classes = config["num_embeds_ada_norm"]
        tells = bool(config.get("time_cond_proj_dim") or config.get("guidance_embeds"))
        return Signature(
            reading=reading,
            space="latent" if latent else "image",
            shape=shape,
            condition="text" if texts else "label" if classes else None,
            classes=classes,
            # Of those that are told classes, DiT alone is told none by one more.
            dropped=bool(texts) or config["_class_name"] == "DiTTransformer2DModel",
            guidance=_TOLD if tells else None,
            texts=texts,
            fixed=fixed,
            pipeline=self.path,
        )

    def _fixed(self, config: dict[str, Any], sides: tuple[int, ...]) -> dict[str, list[float]]:
        """Return what the denoiser is told of every sample alike, beside its text: that it is whole."""
        height, width = (float(side * self.factor) for side in sides)
        if config.get("addition_embed_type") == "text_time":
            return {"time_ids": [height, width, 0.0, 0.0, height, width]}
        if config["_class_name"] == "PixArtTransformer2DModel" and config["sample_size"] == 128:
            return {"resolution": [height, width], "aspect_ratio": [height / width]}
        return {}

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return what the pipeline's text encoders say of prompts, by column. Raises UserError where there are none."""
        return self.encoder()(prompts)

    def encoder(self, device: torch.device | str = "cpu") -> Callable[[list[str]], dict[str, Tensor]]:
        """Load the text encoders. Returns what says of prompts what they do, by column. Raises UserError."""
        import diffusers

        if not self.text_encoders:
            raise UserError(
                f"`{self.folder}` has no text encoder: give `objective.no_text`, a safetensors file with what stands "
                "for no text."
            )
        pipe: Any = diffusers.DiffusionPipeline.from_pretrained(self.complete(), **{self.denoiser: None, "vae": None})
        pipe.to(device)
        kind, plain = type(pipe).__name__, {"do_classifier_free_guidance": False}

        @torch.no_grad()
        def encode(prompts: list[str]) -> dict[str, Tensor]:
            if kind.startswith("StableDiffusionXL"):
                embeds, _, pooled, _ = pipe.encode_prompt(prompts, **plain)
                return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
            if kind.startswith("StableDiffusion3"):
                embeds, _, pooled, _ = pipe.encode_prompt(prompts, prompts, prompts, **plain)
                return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
            if kind.startswith("Flux"):
                embeds, pooled, _ = pipe.encode_prompt(prompts, prompts)
                return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
            if kind.startswith("PixArt"):
                embeds, mask, _, _ = pipe.encode_prompt(prompts, **plain)
                return {"prompt_embeds": embeds, "prompt_attention_mask": mask.float()}
            embeds, _ = pipe.encode_prompt(prompts, pipe.device, 1, **plain)
            return {"prompt_embeds": embeds}

        return encode

    def null(self) -> dict[str, Tensor]:
        """Return what stands for no text, (...) each: zeros where the pipeline says so, or else the empty prompt."""
        found = {key: value[0].float() for key, value in self.encode([""]).items()}
        if self.index.get("force_zeros_for_empty_prompt"):
            found = {key: value.zero_() for key, value in found.items()}
        return found


@dataclass(frozen=True)
class Plan:
    """How a trained denoiser is exported: with the other parts of `source`, if any, and the scheduler of a config.

    conditions: what it is told of samples from noise (N, ...). sampler: how ours are drawn. guidance: the scale of
    guidance by two calls, 1 for none; null: what stands for no text then, by column, (...) each.
    """

    source: Pipeline | None
    scheduler: dict[str, Any]
    signature: Signature
    steps: int
    conditions: Callable[[Tensor], Mapping[str, Tensor]]
    sampler: Callable[[Any], Callable[[Tensor, int, Mapping[str, Tensor]], Tensor]]
    guidance: float = 1.0
    null: Mapping[str, Tensor] = field(default_factory=dict)


def signature(path: str, sides: tuple[int, ...] | None = None) -> Signature | None:
    """Return how the denoiser in a folder of ours, or of a pipeline, is called; None where it does not say.

    sides: height and width of the samples, where data tell. Raises UserError for a Hub id that cannot be fetched.
    """
    own = Signature.load(Path(path)) if Path(path).is_dir() else None
    if own is not None:
        return own
    found = Pipeline.open(path)
    return found.signature(sides) if found else None


def reading_of(scheduler: dict[str, Any], tokens: int = 0) -> Reading | None:
    """Return the path and the prediction that a scheduler of diffusers is for; None for one that we do not know.

    scheduler: its configuration. tokens: of a picture, by which some shift their times.
    """
    import diffusers

    name = str(scheduler.get("_class_name"))
    cls: Any = getattr(diffusers, name, None)
    if cls is None:
        return None
    kept: Any = cls.from_config(scheduler)
    config = kept.config
    said = config.get("prediction_type", "epsilon")
    if name.startswith("FlowMatch"):
        return Reading(path=Flow(shift=_shift(config, tokens)), prediction="velocity")
    if said == "flow_prediction":
        return Reading(path=Flow(shift=config.get("flow_shift", 1.0)), prediction="velocity")
    if said not in _PREDICTIONS or not hasattr(kept, "alphas_cumprod"):
        return None
    squares = [float(value) for value in kept.alphas_cumprod]
    path: AnyPath = Discrete(alphas_cumprod=[*squares[:-1], max(squares[-1], _LEAST)])
    return Reading(path=path, prediction=_PREDICTIONS[said])


def scheduler_of(
    reading: Reading, clip: bool, known: dict[str, Any], solver: Solver = "ddim", steps: int = 1
) -> dict[str, Any] | None:
    """Return the configuration of the scheduler of diffusers that samples as a solver does here; None if none does.

    clip: keep x₀ in [-1, 1]. known: that of a pipeline, from which a schedule is taken over where it is the same.
    steps: of a sample.
    """
    if solver not in ("ddim", "renoise"):
        return None
    if isinstance(reading.path, Flow) and reading.prediction == "velocity" and not clip:
        name = "FlowMatchEulerDiscreteScheduler"
        own = {"_class_name": name, "num_train_timesteps": 1000, "shift": reading.path.shift}
        same = known.get("_class_name") == name  # perhaps with a shift by the size of the picture
        return {**(known if same else own), "stochastic_sampling": solver == "renoise"}
    if solver == "ddim":
        schedule = schedule_of(reading, known, "DDIMScheduler")
        options = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "steps_offset": 1, "clip_sample": clip}
        return schedule and {**schedule, **options}
    schedule = schedule_of(reading, known, "LCMScheduler")
    if schedule is None or schedule["num_train_timesteps"] % steps:  # of others, it rounds the times otherwise
        return None
    options = {"original_inference_steps": schedule["num_train_timesteps"], "steps_offset": 1, "clip_sample": clip}
    return {**schedule, **options}


def schedule_of(reading: Reading, known: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Return what all of diffusers' schedulers of steps have of a reading: betas, and `prediction_type`; None if none.

    known: as for `scheduler_of`. name: the scheduler's class.
    """
    said = {ours: theirs for theirs, ours in _PREDICTIONS.items()}.get(reading.prediction)
    if not isinstance(reading.path, Discrete) or said is None:
        return None
    squares = reading.path.alphas_cumprod
    found = {"_class_name": name, "num_train_timesteps": len(squares), "prediction_type": said}
    betas = {key: known[key] for key in _BETAS if key in known}
    same = reading_of({**found, **betas}) if betas else None
    if same is None or same.path != reading.path:
        betas = {"trained_betas": [1 - b / a for a, b in pairwise([1.0, *squares])]}
    return {**found, **betas}


_BETAS = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")


def _shift(config: Any, tokens: int) -> float:
    """Return the shift of a flow's times: the scheduler's, or e^μ with μ linear in the number of tokens (Flux)."""
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift", 1.0))
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    first, last = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = first + (tokens - low) * (last - first) / (high - low)
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu


def _tokens(config: dict[str, Any], shape: tuple[int, ...]) -> int:
    """Return how many tokens a transformer makes of a sample (C, H, W)."""
    patch = 2 if config["_class_name"] == "FluxTransformer2DModel" else config.get("patch_size") or 1
    return (shape[1] // patch) * (shape[2] // patch)


def _texts(config: dict[str, Any]) -> list[str]:
    """Return the columns that a denoiser is told of a text by."""
    kind = config["_class_name"]
    if kind == "PixArtTransformer2DModel":
        return ["prompt_embeds", "prompt_attention_mask"]
    if kind in ("SD3Transformer2DModel", "FluxTransformer2DModel") or config.get("addition_embed_type") == "text_time":
        return ["prompt_embeds", "pooled_prompt_embeds"]
    return ["prompt_embeds"] if kind == "UNet2DConditionModel" else []


def _fetched(path: str, patterns: list[str] | None = None, ignored: list[str] | None = None) -> Path:
    """Return where files of a Hub id are kept on this machine; fetched where they are not. Raises UserError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, allow_patterns=patterns, ignore_patterns=ignored))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"`{path}` is no folder here, and the Hub does not give it: {error}") from error
