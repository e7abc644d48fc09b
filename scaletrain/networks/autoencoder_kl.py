"""Autoencoders of pictures whose latents are nearly N(0, I) (Rombach et al., 2022): diffusers' AutoencoderKL.

Latents go out, and come in, scaled to a variance of 1 by one `scaling_factor` after one `shift_factor`, as pipelines of
diffusers scale them. A pretrained one has its own; of one that is trained here, running statistics tell them.
"""

from __future__ import annotations

import copy
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from scaletrain.config import Strict
from scaletrain.errors import UserError
from scaletrain.networks._latents import Latents
from scaletrain.networks.diffusers_model import library

STATISTICS = "statistics.json"
"""Beside the weights: means and variances of the latents."""
_PREFIX = "statistics."


class Config(Strict):
    """Options for `type: autoencoder_kl`. What a pretrained one is made by, its folder tells."""

    channels: int = Field(3, ge=1)
    """Of a picture: those of the data."""
    latent_channels: int = Field(4, ge=1)
    features: list[int] = Field([64, 128], min_length=1)
    """Feature maps of each level, multiples of `groups`; each after the first has half the height and width."""
    blocks: int = Field(1, ge=1)
    """Residual blocks of each level of the encoder; of the decoder, one more."""
    groups: int = Field(8, ge=1)
    """Of each GroupNorm."""
    attention: bool = False
    """Whether the lowest level attends to itself."""


_THEIRS = {
    "channels": "in_channels", "latent_channels": "latent_channels", "features": "block_out_channels",
    "blocks": "layers_per_block", "groups": "norm_num_groups", "attention": "mid_block_add_attention",
}  # fmt: skip
"""What diffusers calls our options."""


class _Autoencoder:
    """Goes before AutoencoderKL: one `forward` for all that is asked of it."""

    statistics: nn.BatchNorm2d
    """Of the means of latents; nothing is normalised by it."""

    def forward(self, x: Tensor, do: Literal["train", "reconstruct", "encode", "decode"] = "train") -> Any:
        """Do one of these; all that comes is in fp32.

        train: pictures (B, C, H, W) in [-1, 1] -> what becomes of latents that are drawn, (B, C, H, W), and their means
        and log variances, (B, L, H', W'), unscaled. reconstruct: the same of the means. encode: -> the means, scaled.
        decode: scaled latents -> pictures.
        """
        this: Any = self
        kind = this.dtype
        scale, shift = self.scaling()
        if do == "decode":
            return this.decode((x / scale + shift).to(kind)).sample.float()
        found = this.encode(x.to(kind)).latent_dist
        mean, log_variance = found.mean.float(), found.logvar.float()
        if do == "encode":
            return (mean - shift) * scale
        drawn = mean
        if do == "train":
            drawn = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
            self.statistics(mean.detach())
        return this.decode(drawn.to(kind)).sample.float(), mean, log_variance

    def to(self, *args: Any, **named: Any) -> Any:
        """Move, or change the dtype; the library's warns of every change."""
        return nn.Module.to(self, *args, **named)  # type: ignore[call-overload]

    def scaling(self) -> tuple[Tensor, Tensor]:
        """Return scaling_factor and shift_factor, ()."""
        mean, variance = self.statistics.running_mean, self.statistics.running_var
        assert mean is not None
        assert variance is not None
        return _scaling(mean, variance)

    def latent_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return the shape of the latents of pictures (C, H, W). Raises UserError for those that it does not take."""
        config = self.config  # type: ignore[attr-defined]
        factor = 2 ** (len(config.block_out_channels) - 1)
        if shape[0] != config.in_channels:
            raise UserError(f"the pictures have {shape[0]} channels, and the autoencoder takes {config.in_channels}.")
        if shape[1] % factor or shape[2] % factor:
            raise UserError(
                f"the pictures are {shape[1]}x{shape[2]}, and the autoencoder makes each side {factor} times smaller: "
                "bring them to a size that this divides."
            )
        return config.latent_channels, shape[1] // factor, shape[2] // factor

    def latents(self, name: str) -> Latents:
        """Return whose latents it makes. name: where it is."""
        scale, shift = (float(value) for value in self.scaling())
        digest = hashlib.sha256(f"{scale:.6g} {shift:.6g}".encode())
        for key, value in sorted(self.state_dict().items()):  # type: ignore[attr-defined]
            if not key.startswith(_PREFIX):
                digest.update(f"{key} {tuple(value.shape)}".encode())
                digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
        return Latents(autoencoder=digest.hexdigest()[:32], name=name, scaling_factor=scale, shift_factor=shift)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what diffusers reads, with both factors, and the statistics beside it."""
        held = self.state_dict()  # type: ignore[attr-defined]
        mean, variance, batches = (
            held[_PREFIX + key].cpu() for key in ("running_mean", "running_var", "num_batches_tracked")
        )
        plain: Any = copy.copy(self)
        plain.__class__ = _classes()[0]
        kept = {key: value for key, value in held.items() if not key.startswith(_PREFIX)}
        plain.state_dict = lambda *args, **kwargs: kept
        scale, shift = _scaling(mean, variance)
        plain.register_to_config(scaling_factor=float(scale), shift_factor=float(shift))
        plain.save_pretrained(folder)
        facts = {"mean": mean.tolist(), "variance": variance.tolist(), "batches": int(batches)}
        (Path(folder) / STATISTICS).write_text(json.dumps(facts) + "\n")


def _scaling(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Return both factors () for means and variances (L,) of channels: of all values together."""
    shift = mean.mean()
    return torch.rsqrt((variance + (mean - shift).square()).mean()), shift


@cache
def _classes() -> tuple[type[nn.Module], type[nn.Module]]:
    """Return AutoencoderKL, and its subclass that answers as above, of the same name."""
    theirs = library().AutoencoderKL
    return theirs, type("AutoencoderKL", (_Autoencoder, theirs), {"__module__": __name__})


def build(config: Config) -> nn.Module:
    """Build a new network; its weights are drawn from torch's generator. Raises UserError."""
    if wrong := [f for f in config.features if f % config.groups]:
        raise UserError(f"config.features: {wrong[0]} is no multiple of config.groups, {config.groups}.")
    levels = len(config.features)
    module = _classes()[0](
        **{theirs: getattr(config, ours) for ours, theirs in _THEIRS.items()},
        out_channels=config.channels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        scaling_factor=1.0,
    )
    return _ours(module)


def load(path: str, config: Config, dtype: torch.dtype) -> nn.Module:
    """Read one from its folder, from a pipeline's, or from the Hub. Raises UserError."""
    _, subfolder = _read(path, config)
    try:
        module = _classes()[0].from_pretrained(path, subfolder=subfolder, torch_dtype=dtype)  # type: ignore[attr-defined]
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"`{path}` cannot be read: {' '.join(str(error).split())}") from error
    return _ours(module, Path(path) / STATISTICS)


def outline(path: str, config: Config, dtype: torch.dtype) -> nn.Module:
    """Build what `load` does, without its weights. Raises UserError."""
    found, _ = _read(path, config)
    return _ours(nn.Module.to(_classes()[0].from_config(found), dtype), Path(path) / STATISTICS)  # type: ignore[attr-defined]


def _read(path: str, config: Config) -> tuple[dict[str, Any], str | None]:
    """Return the settings in a folder, and where in it they are. Raises UserError for another network's, or others."""
    for place in (None, "vae"):
        folder = Path(path) / place if place else Path(path)
        if Path(path).is_dir() and not (folder / "config.json").exists():
            continue
        try:
            found: dict[str, Any] = dict(_classes()[0].load_config(path, subfolder=place))  # type: ignore[attr-defined]
        except OSError:
            continue
        if found.get("_class_name") != "AutoencoderKL":
            raise UserError(f"`{folder}` holds a {found.get('_class_name')}, which is no AutoencoderKL.")
        if found.get("latents_mean") is not None or found.get("latents_std") is not None:
            raise UserError(f"`{folder}` scales each channel of its latents, which is not known here.")
        for key in config.model_fields_set:
            given, own = getattr(config, key), found.get(_THEIRS[key])
            if own is not None and given != (list(own) if isinstance(own, list | tuple) else own):
                raise UserError(f"config.{key} is {given}, and `{folder}` has {own}: leave it out.")
        return found, place
    raise UserError(f"`{path}` holds no autoencoder of diffusers, neither itself nor in `vae`.")


def _ours(module: Any, kept: Path | None = None) -> nn.Module:
    """Have an AutoencoderKL be called as above, with the statistics in a file, or those that its settings come to."""
    module.__class__ = _classes()[1]
    config, statistics = module.config, nn.BatchNorm2d(module.config.latent_channels, affine=False, momentum=0.02)
    mean, variance = statistics.running_mean, statistics.running_var
    assert mean is not None
    assert variance is not None
    assert statistics.num_batches_tracked is not None
    if kept is not None and kept.exists():
        facts = json.loads(kept.read_text())
        mean.copy_(torch.tensor(facts["mean"]))
        variance.copy_(torch.tensor(facts["variance"]))
        statistics.num_batches_tracked.fill_(facts["batches"])
    else:
        mean.fill_(config.shift_factor or 0.0)
        variance.fill_(config.scaling_factor**-2)
    module.statistics = statistics
    found: nn.Module = module
    return found
