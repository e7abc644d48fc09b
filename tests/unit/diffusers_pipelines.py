"""Tiny pipelines of diffusers' families with random weights, without text encoders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from scaletrain.recipe import load

SIDE, TOKENS, COUNT = 8, 6, 2
"""Of the latents, of a text, and how many samples tests take."""
STEPS = 4
"""Of a student."""
Pipes = Callable[[str], tuple[Path, Any]]
"""The folder of a family, and the pipeline that was written to it."""


def _vae(channels: int) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=[8, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=2 * SIDE,
        scaling_factor=0.5,
        shift_factor=0.1,
    )


def _ddim(**options: Any) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, **options
    )


def _unet(**options: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIDE,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=12,
        **options,
    )


_NONE = dict.fromkeys(("text_encoder", "tokenizer"))


def stable_diffusion() -> Any:
    from diffusers import StableDiffusionPipeline

    parts = {**_NONE, "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(vae=_vae(4), unet=_unet(), scheduler=_ddim(steps_offset=1), **parts)


def stable_diffusion_xl() -> Any:
    from diffusers import StableDiffusionXLPipeline

    unet = _unet(addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=34)
    parts = {**_NONE, "text_encoder_2": None, "tokenizer_2": None}
    scheduler = _ddim(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    return StableDiffusionXLPipeline(vae=_vae(4), unet=unet, scheduler=scheduler, add_watermarker=False, **parts)


def stable_diffusion_3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=SIDE,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=8,
    )
    parts = {f"{part}{n}": None for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(transformer=transformer, vae=_vae(4), scheduler=scheduler, **parts)


def flux(guidance: bool = True) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=guidance,
        axes_dims_rope=(2, 2, 4),
    )
    parts = {f"{part}{n}": None for part in ("text_encoder", "tokenizer") for n in ("", "_2")}
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return FluxPipeline(transformer=transformer, vae=_vae(4), scheduler=scheduler, **parts)


def pixart() -> Any:
    from diffusers import PixArtAlphaPipeline, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        sample_size=SIDE,
        caption_channels=12,
        norm_num_groups=4,
        use_additional_conditions=False,
    )
    return PixArtAlphaPipeline(vae=_vae(4), transformer=transformer, scheduler=_ddim(), **_NONE)


def dit() -> Any:
    from diffusers import DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        norm_num_groups=4,
        sample_size=SIDE,
        num_embeds_ada_norm=1000,
    )
    return DiTPipeline(transformer=transformer, vae=_vae(4), scheduler=_ddim())


def unconditional() -> Any:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=SIDE,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
    )
    return DDPMPipeline(unet, DDPMScheduler())


FAMILIES: dict[str, Callable[[], Any]] = {
    f.__name__: f for f in (stable_diffusion, stable_diffusion_xl, stable_diffusion_3, flux, pixart, dit, unconditional)
}


def saved(family: str, folder: Path) -> Any:
    """Write a pipeline of a family, drawn from one seed, whose weights all differ from 0; returns it."""
    torch.manual_seed(0)
    pipe = FAMILIES[family]()
    for part in pipe.components.values():  # as they are when they are loaded: in training, DiT drops classes
        if isinstance(part, torch.nn.Module):
            part.eval()
    denoiser = pipe.components.get("unet") or pipe.transformer
    for parameter in denoiser.parameters():  # the last layers of some begin at 0
        with torch.no_grad():
            parameter.add_(0.05 * torch.randn_like(parameter))
    pipe.save_pretrained(folder)
    return pipe


def texts(family: str, count: int = COUNT) -> dict[str, torch.Tensor]:
    """Return what random texts say, under the names of a family's pipeline."""
    found = {"prompt_embeds": torch.randn(count, TOKENS, 12)}
    if family in ("stable_diffusion_xl", "stable_diffusion_3", "flux"):
        found["pooled_prompt_embeds"] = torch.randn(count, 10)
    if family == "pixart":
        found["prompt_attention_mask"] = torch.ones(count, TOKENS)
        found["prompt_attention_mask"][:, 4:] = 0
    return {} if family in ("dit", "unconditional") else found


def write_data(folder: Path, family: str, shape: tuple[int, ...], rows: int = 16) -> Path:
    """Write random latents, and what a family is told of them."""
    torch.manual_seed(1)
    columns = {"latent": 0.5 * torch.randn(rows, *shape), **texts(family, rows)}
    if family == "dit":
        columns["label"] = torch.arange(rows)
    pq.write_table(pa.table({k: v.tolist() for k, v in columns.items()}), folder / "data.parquet")
    return folder / "data.parquet"


def distil(folder: Path, data: Path | str, root: Path, **changes: Any) -> Path:
    """Train a student of a pipeline in `folder` for some steps; changes: to the recipe, where a method is whole and
    None leaves something out.
    """
    from scaletrain.runs import train

    recipe: dict[str, Any] = {
        "objective": {"type": "progressive", "steps": STEPS, "teacher_steps": 8},
        "networks": {
            "student": {"type": "diffusers_model", "path": str(folder)},
            "teacher": {"type": "diffusers_model", "path": str(folder), "frozen": True},
        },
        "players": {"student": {"optimizer": {"type": "adam", "lr": 1e-3}}},
        "data": {"train": str(data)},
        "train": {"duration": "5 steps", "global_batch": 4},
    }
    if "type" in changes.get("objective", {}):
        recipe["objective"] = {"steps": STEPS}
    for key, value in changes.items():
        recipe[key] = _merged(recipe[key], value)
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return train(load(str(root / "recipe.yaml"), []), "run", root, observers=[])


def _merged(old: Any, new: Any) -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        found = {**old, **{k: _merged(old.get(k), v) for k, v in new.items()}}
        return {k: v for k, v in found.items() if v is not None}
    return new
