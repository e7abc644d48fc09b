"""Samples in the run folder: grids as PNG, texts as they are, points as a scatter plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaletrain.callbacks.base import Observer
from scaletrain.objectives.base import Samples


def write_samples(stem: Path, samples: Samples) -> list[Path]:
    """Write samples beside `stem` (its suffix is added): pictures to `.png`, texts to `.txt`, points to `.png`."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = []
    if samples.images is not None:
        written.append(stem.with_name(stem.name + ".png"))
        write_grid(written[-1], samples)
    if samples.texts is not None:
        written.append(stem.with_name(stem.name + ".txt"))
        written[-1].write_text(("\n" + "-" * 40 + "\n").join(samples.texts) + "\n")
    if samples.points is not None:
        written.append(stem.with_name(stem.name + "-points.png"))
        _scatter(written[-1], samples)
    return written


def write_grid(path: Path, samples: Samples) -> None:
    """Write pictures (N, C, H, W) in [0, 1] as one grid, small ones enlarged so that a person can see them."""
    import numpy as np
    from PIL import Image

    images = samples.images
    assert images is not None
    pixels = (images.detach().cpu().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    count, height, width, channels = pixels.shape
    columns = samples.rows or max(1, round(count**0.5))
    rows = -(-count // columns)
    grid = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1, channels), 96, dtype=np.uint8)
    for i, picture in enumerate(pixels):
        y, x = divmod(i, columns)
        grid[y * (height + 1) + 1 :][:height, x * (width + 1) + 1 :][:, :width] = picture
    picture = Image.fromarray(grid[..., 0] if channels == 1 else grid)
    factor = max(1, round(48 / max(height, width)))
    picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST).save(path)


def _scatter(path: Path, samples: Samples) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    assert samples.points is not None
    points = samples.points.detach().cpu().numpy()
    figure = Figure(figsize=(5, 5))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.scatter(points[:, 0], points[:, 1], s=3, alpha=0.5)
    axes.set_aspect("equal")
    figure.savefig(path, dpi=110)


class SampleFolder(Observer):
    """Writes the samples of a run by step."""

    def __init__(self, folder: Path):
        self.folder = folder

    def sampled(self, step: int, samples: Samples) -> None:
        """Write the files."""
        write_samples(self.folder / f"step-{step:08d}", samples)

    def step(self, step: int, record: Mapping[str, Any] | None) -> None:
        """Nothing to write."""
