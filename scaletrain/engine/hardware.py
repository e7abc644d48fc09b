"""What a device could do at best, and how much work a step is: for the share of the peak that a run reaches (MFU)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

_PEAK_BF16 = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "H800": 989e12, "B200": 2250e12, "A100": 312e12,
    "A800": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "V100": 125e12,
}  # fmt: skip
"""Dense 16-bit FLOP/s of NVIDIA's data sheets, by a part of the device's name."""


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the FLOP/s of a device at best in 16 bits, or None for fp32, a CPU, or a device that is not known."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in _PEAK_BF16.items() if part in name), None)


def flops_per_token(
    networks: Iterable[nn.Module], size_of: Callable[[torch.Tensor], int] = torch.Tensor.numel
) -> float:
    """Return the work of a training step for one token, over networks that see every token once.

    2 FLOP a weight forward, 2 back to the activations where anything is trained, 2 to each trained weight: 6 N for full
    training (Kaplan et al., 2020, section 2.1). Attention's products of positions are left out, so MFU is on the low
    side for long sequences. size_of: the elements of a weight that may be held in parts.
    """
    total = 0.0
    for network in networks:
        size = sum(size_of(p) for p in network.parameters())
        trained = sum(size_of(p) for p in network.parameters() if p.requires_grad)
        total += 2 * size + (2 * size + 2 * trained if trained else 0)
    return total
