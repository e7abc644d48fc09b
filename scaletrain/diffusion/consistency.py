"""Consistency functions: f(z, t) is the data that the flow through z at time t leads to (Song et al., 2023).

f is one step of DDIM to the first time of the path: α x₀ + σ ε there. So f(x, first) = x holds on every path and for
whatever the network predicts, as c_skip and c_out see to in their equation 5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from scaletrain.diffusion.denoiser import Denoiser
from scaletrain.diffusion.path import Path
from scaletrain.diffusion.reading import Reading
from scaletrain.diffusion.solvers import ddim_step, solve
from scaletrain.errors import UserError

Draw = Callable[[Tensor, int, Mapping[str, Tensor]], Tensor]


def to_data(denoiser: Denoiser, z: Tensor, t: Tensor) -> Tensor:
    """Return f(z, t) (B, ...) for z (B, ...) at times t (B,) after the first."""
    return ddim_step(denoiser, z, t, torch.full_like(t, denoiser.path.first))


def check_boundary(reading: Reading, path: Path) -> None:
    """Raise UserError where f(x, first) is what the network says, not x: without noise, an x₀ stands alone."""
    if reading.prediction == "x0" and path.alpha_sigma(torch.tensor(path.first))[1] == 0:
        raise UserError(
            "objective.prediction: a network that predicts x0 may turn data without noise into others, and consistency "
            "needs it to leave them as they are: take another prediction, or a path that ends with some noise."
        )


def stops(path: Path, steps: int, highest: float | None) -> list[float]:
    """Return the times at which f is evaluated for a sample, falling from the last: as many as steps.

    highest: of those after the first one, as a share of the path's grid; they fall evenly from there. By default all
    are the path's grid.
    """
    if highest is None or steps == 1:
        return path.grid(steps)[:-1]
    shares = [highest * (steps - i) / (steps - 1) for i in range(1, steps)]
    return [path.last, *map(path.time, shares)]


def sampler(denoiser: Denoiser, highest: float | None, fresh: bool) -> Draw:
    """Return what draws samples: from noise to data, back to a lesser noise, and to data again.

    Data are x₀: of f, what noise is left at the first time is taken away. fresh: with new noise each time, from torch's
    global generator (Song et al., 2023, algorithm 1); otherwise with the noise that f found in z, so that samples are a
    function of the noise that they begin from.
    """

    def draw(noise: Tensor, steps: int, told: Mapping[str, Tensor]) -> Tensor:
        path = denoiser.path
        grid = [*stops(path, steps, highest), path.first]
        return solve(denoiser.given(**told), path.start(noise), grid, "renoise" if fresh else "ddim")

    return draw
