"""Mixed precision: where autocast applies, and loss scaling under fp16."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from scaletrain.config import ScalerSpec
from scaletrain.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(precision: str, device: torch.device) -> None:
    """Raise UserError where a GPU does not compute in bf16: torch would emulate it, slower than fp32."""
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"train.precision is bf16, which {name} does not compute in: take fp16 or fp32.")


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Return the context of a forward pass. Weights stay in fp32; matrix work runs in `precision`."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


class LossScaler:
    """Loss scaling (Micikevicius et al., 2018, "Mixed precision training", section 3.2).

    The loss is multiplied by `scale` before the backward pass, gradients divided by it after. Dynamic scaling halves
    the scale when a gradient overflows, and doubles it after `interval` updates in a row that did not.
    """

    def __init__(self, spec: ScalerSpec):
        self.dynamic = spec.type == "dynamic"
        self.interval, self.minimum = spec.interval, spec.minimum
        self.scale = spec.initial
        self.good = 0

    def advance(self, overflow: bool) -> None:
        """Take note of one update, or of one that was skipped."""
        if not self.dynamic:
            return
        if overflow:
            self.scale, self.good = max(self.scale / 2, self.minimum), 0
        else:
            self.good += 1
            if self.good == self.interval:
                self.scale, self.good = self.scale * 2, 0

    @property
    def exhausted(self) -> bool:
        """Whether the scale cannot fall any more: what overflows now is not a matter of scaling."""
        return not self.dynamic or self.scale <= self.minimum

    def state_dict(self) -> dict[str, float]:
        """Return the scale and how many good updates it has seen."""
        return {"scale": self.scale, "good": self.good}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take back what `state_dict` returned."""
        self.scale, self.good = state["scale"], int(state["good"])


def build_scaler(spec: ScalerSpec, precision: str) -> LossScaler | None:
    """Return a scaler for fp16, None otherwise: the exponents of bf16 and fp32 need none."""
    return LossScaler(spec) if precision == "fp16" and spec.type != "off" else None
