"""Quantisation-aware training by torchao: linear layers that round their weights as they will be when quantised."""

from __future__ import annotations

from typing import Any

from torch import nn

from scaletrain.config import QATSpec
from scaletrain.networks._post_training import linear_layers, qat_config


def prepare(module: nn.Module, spec: QATSpec, key: str) -> nn.Module:
    """Have the linear layers of a network's body round their weights in each forward pass, in place.

    Names and values of parameters stay; gradients pass the rounding by, but where it clips (Bengio et al., 2013).
    Raises UserError.
    """
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    chosen = linear_layers(module, spec.shared, key)
    config = QATConfig(qat_config(spec.type, spec.shared), step="prepare")
    quantize_(module, config, filter_fn=lambda _, name: name in chosen)
    module.quantisation = spec  # type: ignore[assignment]
    return module


def revert(module: Any) -> nn.Module:
    """Put the plain linear layers back, in place."""
    from torchao.quantization.qat.linear import FakeQuantizedLinear

    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, FakeQuantizedLinear):
                setattr(parent, name, child.to_linear())
    del module.quantisation
    return module
