"""Encoders of transformers with the head that tells hidden tokens: new, or pretrained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scaletrain.networks._transformers import TransformersConfig, new_config, read_config, read_weights
from scaletrain.networks._transformers import outline as outline_of

if TYPE_CHECKING:
    import torch
    from torch import nn


__all__ = ["Config", "build", "load", "new_config", "read_config"]


class Config(TransformersConfig):
    """Settings of the architecture, such as `{model_type: roberta, hidden_size: 256, num_hidden_layers: 4}`."""


def build(config: Config) -> nn.Module:
    """Build a new network; its weights are drawn from torch's generator."""
    from transformers import AutoModelForMaskedLM

    return AutoModelForMaskedLM.from_config(new_config(config))


def load(path: str, config: Config, dtype: torch.dtype) -> nn.Module:
    """Read a pretrained network from a folder or the Hub; a head that it lacks is new.

    Raises UserError that names it.
    """
    from transformers import AutoModelForMaskedLM

    return read_weights(AutoModelForMaskedLM, path, config, dtype, new_head=True)


def outline(path: str, config: Config, dtype: torch.dtype) -> nn.Module:
    """Build what `load` does, without its weights. Raises UserError that names it."""
    from transformers import AutoModelForMaskedLM

    return outline_of(AutoModelForMaskedLM, path, config, dtype)
