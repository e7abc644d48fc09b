"""Causal language models of transformers: new from the values of a configuration, or pretrained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scaletrain.errors import UserError
from scaletrain.networks._transformers import TransformersConfig, new_config, read_config, read_weights
from scaletrain.networks._transformers import outline as outline_of
from scaletrain.networks.heads import reducing

if TYPE_CHECKING:
    import torch
    from torch import nn


__all__ = ["Config", "build", "load", "new_config", "read_config"]


class Config(TransformersConfig):
    """Settings of the architecture, such as `{model_type: llama, hidden_size: 256, num_hidden_layers: 4}`."""


def build(config: Config) -> nn.Module:
    """Build a new network; its weights are drawn from torch's generator. Raises UserError."""
    from transformers import AutoModelForCausalLM

    settings = new_config(config)
    try:
        return reducing(AutoModelForCausalLM.from_config(settings))
    except ValueError as error:  # attention that the architecture does not take
        raise UserError(f"config: {' '.join(str(error).split())}") from error


def load(path: str, config: Config, dtype: torch.dtype) -> nn.Module:
    """Read a pretrained network from a folder or the Hub. Raises UserError that names it."""
    from transformers import AutoModelForCausalLM

    return reducing(read_weights(AutoModelForCausalLM, path, config, dtype, new_head=False))


def outline(path: str, config: Config, dtype: torch.dtype) -> nn.Module:
    """Build what `load` does, without its weights. Raises UserError that names it."""
    from transformers import AutoModelForCausalLM

    return reducing(outline_of(AutoModelForCausalLM, path, config, dtype))
