"""Encoders or decoders of transformers with a head that classifies each token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scaletrain.networks._transformers import TransformersConfig, new_config, read_config, read_weights
from scaletrain.networks._transformers import outline as outline_of

if TYPE_CHECKING:
    import torch
    from torch import nn


__all__ = ["Config", "build", "load", "new_config", "read_config"]


class Config(TransformersConfig):
    """Settings of the architecture; the classes come from the data."""

    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None


def build(config: Config) -> nn.Module:
    """Build a new network; its weights are drawn from torch's generator."""
    from transformers import AutoModelForTokenClassification

    return AutoModelForTokenClassification.from_config(new_config(config))


def load(path: str, config: Config, dtype: torch.dtype) -> nn.Module:
    """Read a pretrained network from a folder or the Hub; a head that it lacks, or of other classes, is new.

    Raises UserError that names it.
    """
    from transformers import AutoModelForTokenClassification

    return read_weights(AutoModelForTokenClassification, path, config, dtype, new_head=True)


def outline(path: str, config: Config, dtype: torch.dtype) -> nn.Module:
    """Build what `load` does, without its weights. Raises UserError that names it."""
    from transformers import AutoModelForTokenClassification

    return outline_of(AutoModelForTokenClassification, path, config, dtype)
