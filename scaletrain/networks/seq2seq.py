"""Encoder-decoder language models of transformers: new from the values of a configuration, or pretrained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scaletrain.networks._transformers import TransformersConfig, new_config, read_config, read_weights
from scaletrain.networks._transformers import outline as outline_of

if TYPE_CHECKING:
    import torch
    from torch import nn


__all__ = ["Config", "build", "load", "new_config", "read_config", "start_of"]


class Config(TransformersConfig):
    """Settings of the architecture, such as `{model_type: bart, d_model: 256, encoder_layers: 4}`."""


def start_of(settings: Any) -> int:
    """Return the token that a decoder begins with: its configuration's own, or the padding, as T5 has it."""
    own = getattr(settings, "decoder_start_token_id", None)
    return int(settings.pad_token_id if own is None else own)


def build(config: Config) -> nn.Module:
    """Build a new network; its weights are drawn from torch's generator."""
    from transformers import AutoModelForSeq2SeqLM

    module: Any = AutoModelForSeq2SeqLM.from_config(new_config(config))
    # Not every configuration names it, and without it what is exported could not generate.
    module.config.decoder_start_token_id = module.generation_config.decoder_start_token_id = start_of(module.config)
    return module


def load(path: str, config: Config, dtype: torch.dtype) -> nn.Module:
    """Read a pretrained network from a folder or the Hub. Raises UserError that names it."""
    from transformers import AutoModelForSeq2SeqLM

    return read_weights(AutoModelForSeq2SeqLM, path, config, dtype, new_head=False)


def outline(path: str, config: Config, dtype: torch.dtype) -> nn.Module:
    """Build what `load` does, without its weights. Raises UserError that names it."""
    from transformers import AutoModelForSeq2SeqLM

    return outline_of(AutoModelForSeq2SeqLM, path, config, dtype)
