"""Encoders or decoders of transformers with a head that classifies the whole text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from scaletrain.networks._layers import keep_layers, keep_settings
from scaletrain.networks._transformers import TransformersConfig, new_config, read_config, read_weights
from scaletrain.networks._transformers import outline as outline_of
from scaletrain.networks._unpadded import unpadded

if TYPE_CHECKING:
    import torch
    from torch import nn


__all__ = ["Config", "build", "load", "new_config", "read_config"]


class Config(TransformersConfig):
    """Settings of the architecture; the classes come from the data."""

    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    layers: list[int] | None = None
    """Of a pretrained network, keep these layers only, such as [0, 2, 4]."""

    @property
    def options(self) -> dict[str, Any]:
        """The settings that are given, but for what is done with the pretrained network."""
        return {key: value for key, value in super().options.items() if key != "layers"}

    @model_validator(mode="after")
    def _rising(self) -> Config:
        if self.layers is not None and not (
            self.layers and sorted({*self.layers}) == self.layers and self.layers[0] >= 0
        ):
            raise ValueError("layers: give numbers from 0 on, each larger than the one before")
        if self.layers is not None and self.model_type is not None:
            raise ValueError("layers: there are none to choose from in a new network; set num_hidden_layers")
        return self


def build(config: Config) -> nn.Module:
    """Build a new network; its weights are drawn from torch's generator."""
    from transformers import AutoModelForSequenceClassification

    return unpadded(AutoModelForSequenceClassification.from_config(new_config(config)))


def load(path: str, config: Config, dtype: torch.dtype) -> nn.Module:
    """Read a pretrained network from a folder or the Hub; a head that it lacks, or of other classes, is new.

    Raises UserError that names it.
    """
    from transformers import AutoModelForSequenceClassification

    module = read_weights(AutoModelForSequenceClassification, path, config, dtype, new_head=True)
    if not _chooses(module, config):
        return unpadded(module)
    return keep_layers(module, outline(path, config, dtype), config.layers or [])


def outline(path: str, config: Config, dtype: torch.dtype) -> nn.Module:
    """Build what `load` does, without its weights. Raises UserError that names it."""
    from transformers import AutoModelForSequenceClassification

    module: Any = outline_of(AutoModelForSequenceClassification, path, config, dtype)
    if not _chooses(module, config):
        return unpadded(module)
    settings = keep_settings(module.config, config.layers or [], path)
    attention = config.options.get("attn_implementation", "sdpa")
    module = AutoModelForSequenceClassification.from_config(settings, dtype=dtype, attn_implementation=attention)
    module.rearranged = True
    return unpadded(module)


def _chooses(module: Any, config: Config) -> bool:
    """Say whether layers are to be left out: one that was made in this way has as many as are named."""
    return config.layers is not None and module.config.num_hidden_layers != len(config.layers)
