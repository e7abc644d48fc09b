"""Denoisers of diffusers, new or pretrained, called as ours are: (z, t, label, guidance, **texts) -> a prediction.

What texts say comes under the names that diffusers' pipelines have for it: prompt_embeds (B, T, E),
pooled_prompt_embeds (B, P), prompt_attention_mask (B, T), and of Stable Diffusion XL, time_ids (B, 6); of PixArt,
resolution (B, 2) and aspect_ratio (B, 1).
"""

from __future__ import annotations

import inspect
import math
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from scaletrain.config import Open
from scaletrain.errors import UserError, did_you_mean


class Config(Open):
    """Options for `type: diffusers_model`: of a new network, `class_name` and what that class of diffusers is made by.

    The shape of a sample, where the data tell it, and what a network is told are put into the class's own words.
    """

    class_name: str | None = None
    """Of a new network: UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel and so on."""
    subfolder: str | None = None
    """Of `path`: where the network is; by default `unet` or `transformer`, or the folder itself."""
    time_scale: float | None = Field(None, gt=0)
    """What the time that a network is told is multiplied by. Networks of diffusers are told steps up to 1000, as the
    path `discrete` has them: on paths from 0 to 1 it is 1000. By default it is 1, and of SD3Transformer2DModel 1000."""
    channels: int | None = Field(None, ge=1)
    height: int | None = Field(None, ge=1)
    width: int | None = Field(None, ge=1)
    classes: int = Field(0, ge=0)
    """Of the labels that it is told; one more stands for none."""
    guidance: bool = False
    """Whether it is told the scale of guidance (Meng et al., 2023; Luo et al., 2023, section 4.3)."""
    target: bool = False
    """Whether it is told the time to go to, which no network of diffusers is."""


class _Denoiser:
    """Goes before a class of diffusers: its `forward` takes what our denoisers take."""

    settings: Config
    time_scale: ClassVar[float] = 1.0
    begun: ClassVar[tuple[str, ...]] = ()
    """Parameters that begin at 0, so that a network that is told the scale of guidance at first does not heed it."""

    @classmethod
    def options(cls, config: Config, has: dict[str, Any]) -> dict[str, Any]:
        """Return the settings of the class that a config asks for beside `has`. Raises UserError for what it lacks."""
        found: dict[str, Any] = {}
        if config.channels:
            found |= {"in_channels": config.channels, "out_channels": config.channels}
        if config.height:
            found["sample_size"] = config.height
        if config.height != config.width and config.height and config.width:
            found["sample_size"] = (config.height, config.width)
        if config.guidance:
            found |= cls.guided(has)
        if config.classes:
            found |= cls.labelled(config.classes, has)
        if config.target:
            raise UserError(
                f"config.target: a {cls.__name__} cannot be told the time to go to; take an objective that does "
                "without, or a network of ours."
            )
        return found

    @classmethod
    def guided(cls, has: dict[str, Any]) -> dict[str, Any]:
        """Return the settings of a network that is told the scale of guidance."""
        raise UserError(
            f"config.guidance: a {cls.__name__} cannot be told the scale of guidance; distil one scale, by "
            "`objective.guidance`."
        )

    @classmethod
    def labelled(cls, classes: int, has: dict[str, Any]) -> dict[str, Any]:
        """Return the settings of a network that is told one of so many classes, or none."""
        raise UserError(f"config.classes: a {cls.__name__} is told no classes; leave `objective.condition` out.")

    def to(self, *args: Any, **named: Any) -> Any:
        """Move, or change the dtype; the library's warns of every change."""
        return nn.Module.to(self, *args, **named)  # type: ignore[call-overload]

    def forward(self, z: Tensor, t: Tensor, **told: Tensor | None) -> Tensor:
        """Return a prediction (B, C, H, W), without the variances that some networks of steps give beside it."""
        scale = self.settings.time_scale or self.time_scale
        kind: torch.dtype = self.dtype  # type: ignore[attr-defined]
        if kind != torch.float32:  # frozen weights
            z = z.to(kind)
            told = {k: v.to(kind) if v is not None and v.is_floating_point() else v for k, v in told.items()}
        return self.answer(z, t if scale == 1 else t * scale, **told)[:, : z.shape[1]]

    def answer(self, z: Tensor, t: Tensor, **told: Any) -> Tensor:
        """Call the class's own `forward`."""
        raise NotImplementedError

    def own(self, *args: Any, **named: Any) -> Tensor:
        """Call the class's own `forward`; returns its first result."""
        found: Tensor = super().forward(*args, **named, return_dict=False)[0]  # type: ignore[misc]
        return found


class _UNet2D(_Denoiser):
    @classmethod
    def labelled(cls, classes: int, has: dict[str, Any]) -> dict[str, Any]:
        known = has.get("num_class_embeds")
        if known not in (None, classes, classes + 1):
            raise UserError(f"config.classes is {classes}, and the network knows {known}.")
        return {"num_class_embeds": known or classes + 1}

    def answer(self, z: Tensor, t: Tensor, label: Tensor | None = None, **told: Any) -> Tensor:
        _nothing(told)
        known = self.config.num_class_embeds  # type: ignore[attr-defined]
        if known is not None and label is None:
            label = torch.full((len(z),), known - 1, device=z.device)
        return self.own(z, t, class_labels=label)


class _UNet2DCondition(_Denoiser):
    begun = ("time_embedding.cond_proj.weight",)

    @classmethod
    def guided(cls, has: dict[str, Any]) -> dict[str, Any]:
        return {"time_cond_proj_dim": has.get("time_cond_proj_dim") or 256}  # that of Luo et al., 2023

    def answer(
        self, z: Tensor, t: Tensor, guidance: Tensor | None = None, prompt_embeds: Tensor | None = None, **told: Any
    ) -> Tensor:
        config = self.config  # type: ignore[attr-defined]
        added = {"text_embeds": told.pop("pooled_prompt_embeds", None), "time_ids": told.pop("time_ids", None)}
        _nothing(told)
        cond = None
        if config.time_cond_proj_dim:
            guidance = torch.ones(1, device=z.device) if guidance is None else guidance
            cond = guidance_waves(guidance.expand(len(z)), config.time_cond_proj_dim).to(z.dtype)
        extra = {"added_cond_kwargs": added} if config.addition_embed_type == "text_time" else {}
        return self.own(z, t, encoder_hidden_states=prompt_embeds, timestep_cond=cond, **extra)


class _DiT(_Denoiser):
    @classmethod
    def labelled(cls, classes: int, has: dict[str, Any]) -> dict[str, Any]:
        known = has.get("num_embeds_ada_norm")
        if known not in (None, classes):
            raise UserError(f"config.classes is {classes}, and the network knows {known}.")
        return {"num_embeds_ada_norm": classes, "norm_type": "ada_norm_zero"}

    def answer(self, z: Tensor, t: Tensor, label: Tensor | None = None, **told: Any) -> Tensor:
        _nothing(told)
        if label is None:
            label = torch.full((len(z),), self.config.num_embeds_ada_norm, device=z.device)  # type: ignore[attr-defined]
        return self.own(z, timestep=t, class_labels=label)


class _PixArt(_Denoiser):
    def answer(self, z: Tensor, t: Tensor, prompt_embeds: Tensor | None = None, **told: Any) -> Tensor:
        added = {key: told.pop(key, None) for key in ("resolution", "aspect_ratio")}
        mask = told.pop("prompt_attention_mask", None)
        _nothing(told)
        return self.own(
            z, encoder_hidden_states=prompt_embeds, encoder_attention_mask=mask, timestep=t, added_cond_kwargs=added
        )


class _SD3(_Denoiser):
    time_scale = 1000.0

    def answer(
        self,
        z: Tensor,
        t: Tensor,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        **told: Any,
    ) -> Tensor:
        _nothing(told)
        return self.own(z, encoder_hidden_states=prompt_embeds, pooled_projections=pooled_prompt_embeds, timestep=t)


class _Flux(_Denoiser):
    begun = (
        "time_text_embed.guidance_embedder.linear_2.weight",
        "time_text_embed.guidance_embedder.linear_2.bias",
    )

    @classmethod
    def options(cls, config: Config, has: dict[str, Any]) -> dict[str, Any]:
        found = super().options(config.model_copy(update={"channels": None, "height": None, "width": None}), has)
        return found | ({"in_channels": 4 * config.channels} if config.channels else {})

    @classmethod
    def guided(cls, has: dict[str, Any]) -> dict[str, Any]:
        return {"guidance_embeds": True}

    def answer(
        self,
        z: Tensor,
        t: Tensor,
        guidance: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        **told: Any,
    ) -> Tensor:
        _nothing(told)
        assert prompt_embeds is not None
        if self.config.guidance_embeds:  # type: ignore[attr-defined]
            guidance = (torch.ones(1, device=z.device) if guidance is None else guidance).expand(len(z))
        height, width = z.shape[2] // 2, z.shape[3] // 2
        rows = torch.arange(height, device=z.device).repeat_interleave(width)
        columns = torch.arange(width, device=z.device).repeat(height)
        ids = torch.stack([torch.zeros_like(rows), rows, columns], 1).to(z.dtype)
        found = self.own(
            packed(z),
            encoder_hidden_states=prompt_embeds,
            pooled_projections=pooled_prompt_embeds,
            timestep=t,
            img_ids=ids,
            txt_ids=ids.new_zeros(prompt_embeds.shape[1], 3),
            guidance=guidance,
        )
        return unpacked(found, height, width)


_FAMILIES: dict[str, type[_Denoiser]] = {
    "UNet2DModel": _UNet2D,
    "UNet2DConditionModel": _UNet2DCondition,
    "DiTTransformer2DModel": _DiT,
    "PixArtTransformer2DModel": _PixArt,
    "SD3Transformer2DModel": _SD3,
    "FluxTransformer2DModel": _Flux,
}


def packed(z: Tensor) -> Tensor:
    """Lay latents (B, C, 2H, 2W) out as Flux takes them: (B, H · W, 4C), a token for 2 x 2."""
    count, channels, height, width = z.shape
    parts = z.view(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return parts.reshape(count, height * width // 4, 4 * channels)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Undo `packed`: (B, H · W, 4C) to (B, C, 2H, 2W)."""
    parts = tokens.view(len(tokens), height, width, tokens.shape[2] // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return parts.reshape(len(tokens), tokens.shape[2] // 4, 2 * height, 2 * width)


def guidance_waves(scale: Tensor, size: int) -> Tensor:
    """Return sines and cosines (B, size) of 1000 (scale − 1), as diffusers' pipelines tell networks of guidance."""
    half = size // 2
    frequencies = torch.exp(torch.arange(half, device=scale.device) * (-math.log(10_000.0) / (half - 1)))
    angles = 1000.0 * (scale.float() - 1)[:, None] * frequencies
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, size % 2))


def _nothing(told: dict[str, Any]) -> None:
    """Raise TypeError for what a network has no place for; None is nothing."""
    if left := [key for key, value in told.items() if value is not None]:
        raise TypeError(f"this network cannot be told {', '.join(left)}")


# --- from a config or a folder ----------------------------------------------------------------------------------------


@cache
def _class(name: str) -> tuple[type[nn.Module], type[nn.Module]]:
    """Return a class of diffusers, and its subclass that is called as ours are. Raises UserError for another's name."""
    diffusers = library()
    if name not in _FAMILIES:
        raise UserError(
            f"config.class_name: `{name}` is none of {', '.join(_FAMILIES)}.{did_you_mean(name, _FAMILIES)}"
        )
    theirs = getattr(diffusers, name)
    # Of the same name, by which the library writes what a network is.
    return theirs, type(name, (_FAMILIES[name], theirs), {"__module__": __name__})


def library() -> Any:
    """Import diffusers. Raises UserError where it is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise UserError("`diffusers_model` needs diffusers: pip install 'scaletrain[diffusers]'.") from error
    return diffusers


def build(config: Config) -> nn.Module:
    """Build a new network; its weights are drawn from torch's generator. Raises UserError."""
    if config.class_name is None:
        raise UserError(
            "config.class_name is missing: say which network of diffusers, or give `path` for a pretrained one."
        )
    theirs, _ = _class(config.class_name)
    family = _FAMILIES[config.class_name]
    known = inspect.signature(theirs.__init__).parameters
    for key in config.options:
        if key not in known:
            raise UserError(f"config: {config.class_name} has no setting `{key}`.{did_you_mean(key, known)}")
    options = {**config.options, **family.options(config, config.options)}
    try:
        module = theirs(**{key: value for key, value in options.items() if key in known})
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"config: {' '.join(str(error).split())}") from error
    return _called_as_ours(module, config, begun=True)


def load(path: str, config: Config, dtype: torch.dtype) -> nn.Module:
    """Read a pretrained network from a folder, of itself or of a pipeline, or from the Hub. Raises UserError."""
    found = read_config(path, config.subfolder)
    theirs, _ = _class(found.pop("_class_name"))
    subfolder = found.pop("_subfolder")
    changed = _changes(theirs, config, found)
    try:
        module, info = theirs.from_pretrained(  # type: ignore[attr-defined]
            path, subfolder=subfolder, torch_dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"`{path}` cannot be read: {' '.join(str(error).split())}") from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"`{path}` lacks weights of a {theirs.__name__}, such as {', '.join(missing[:3])}.")
    if changed:
        state = module.state_dict()
        module = nn.Module.to(theirs.from_config({**found, **changed}), dtype)  # type: ignore[attr-defined]
        module.load_state_dict(state, strict=False)
    return _called_as_ours(module, config, begun=bool(changed))


def outline(path: str, config: Config, dtype: torch.dtype) -> nn.Module:
    """Build what `load` does, without its weights. Raises UserError."""
    found = read_config(path, config.subfolder)
    theirs, _ = _class(found.pop("_class_name"))
    del found["_subfolder"]
    module = theirs.from_config({**found, **_changes(theirs, config, found)})  # type: ignore[attr-defined]
    nn.Module.to(module, dtype)
    return _called_as_ours(module, config)


def read_config(path: str, subfolder: str | None = None) -> dict[str, Any]:
    """Return the settings of a pretrained network, with `_class_name`, and `_subfolder`, where in `path` it is.

    Raises UserError when there is none.
    """
    diffusers = library()
    places = [subfolder] if subfolder else [None, "unet", "transformer"]
    for place in places:
        folder = Path(path) / place if place else Path(path)
        if Path(path).is_dir() and not (folder / "config.json").exists():
            continue
        try:
            found: dict[str, Any] = dict(diffusers.UNet2DModel.load_config(path, subfolder=place))
        except OSError:
            continue
        name = str(found.get("_class_name"))
        if name == "Transformer2DModel":  # what DiT and PixArt were saved as before they had classes of their own
            name = {"ada_norm_zero": "DiT", "ada_norm_single": "PixArt"}.get(found["norm_type"], "") + name
        if name in _FAMILIES:
            return {**found, "_class_name": name, "_subfolder": place}
        if place is not None:
            raise UserError(f"`{path}`: `{place}` holds a {name}, which is none of {', '.join(_FAMILIES)}.")
    raise UserError(f"`{path}` holds no denoiser of diffusers, neither itself nor in `unet` or `transformer`.")


def _changes(theirs: type[nn.Module], config: Config, has: dict[str, Any]) -> dict[str, Any]:
    """Return the settings in which a network is to differ from its files. Raises UserError for those that cannot."""
    if config.class_name not in (None, theirs.__name__):
        raise UserError(f"config.class_name is {config.class_name}, and `path` holds a {theirs.__name__}.")
    for key, value in config.options.items():
        if has.get(key) != value:
            raise UserError(f"config.{key}: a pretrained network has its own, {has.get(key)!r}; leave it out.")
    shapeless = config.model_copy(update={"channels": None, "height": None, "width": None})
    asked = _FAMILIES[theirs.__name__].options(shapeless, has)
    return {key: value for key, value in asked.items() if has.get(key) != value}


def _called_as_ours(module: Any, config: Config, begun: bool = False) -> nn.Module:
    """Have a network of diffusers be called as ours are. begun: what it is told of guidance by is new."""
    name = type(module).__name__
    options = {k: v for k, v in dict(module.config).items() if not k.startswith("_")}
    module.__class__ = _class(name)[1]
    module.settings = config.model_copy(update={"class_name": name, **options})
    for part in module.modules():  # which conditions are dropped is the objective's matter
        if type(part).__name__ == "LabelEmbedding":
            part.dropout_prob = 0.0
    if begun:
        parameters = dict(module.named_parameters())
        for key in module.begun:
            if key in parameters:
                nn.init.zeros_(parameters[key])
    found: nn.Module = module
    return found
