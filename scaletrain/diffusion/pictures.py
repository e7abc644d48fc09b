"""What diffusion objectives over pictures share: their shape, and drawing some."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from scaletrain.diffusion.denoiser import Denoiser
from scaletrain.diffusion.solvers import sample
from scaletrain.objectives.base import Request, Samples

Shape = tuple[int, int, int]
"""Channels, height, width."""


def stored_shape(network: Path) -> Shape:
    """Return the shape of pictures that a stored network was built for."""
    config = json.loads((network / "config.json").read_text())["config"]
    return config["channels"], config["height"], config["width"]


def draw(denoiser: Denoiser, shape: Shape, steps: int, request: Request) -> Samples:
    """Draw pictures as a request asks, in so many steps."""
    generator = request.generator
    noise = torch.randn(request.count, *shape, generator=generator, device=generator.device)
    return Samples(images=(sample(denoiser, noise, steps) + 1) / 2)
