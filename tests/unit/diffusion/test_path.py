"""Paths: their papers' formulas, slopes against autograd, and times found again from the SNR."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from scaletrain.diffusion.path import EDM, AnyPath, Cosine, Discrete, Flow, Linear, Path, Trig
from tests.unit.diffusion.closed_forms import ALPHAS_CUMPROD, PATHS

EACH = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def inside(path: Path, count: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return times from just after the first to just before the last."""
    share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return (path.first + (path.last - path.first) * share).to(dtype)


@EACH
def test_slopes_are_derivatives(path: Path) -> None:
    t = inside(path, 97).requires_grad_()
    for value, slope in zip(path.alpha_sigma(t), path.slopes(t), strict=True):
        found = (
            torch.autograd.grad(value.sum(), t, retain_graph=True, allow_unused=True)[0]
            if value.requires_grad
            else None
        )
        torch.testing.assert_close(slope, torch.zeros_like(t) if found is None else found, rtol=1e-9, atol=1e-12)


@EACH
def test_time_is_found_again_from_log_snr_which_falls(path: Path) -> None:
    t = inside(path, 97)
    log_snr = path.log_snr(t)
    assert (log_snr.diff() < 0).all()
    torch.testing.assert_close(path.time_at(log_snr), t, rtol=1e-9, atol=1e-12)
    t = inside(path, 97, torch.float32)
    torch.testing.assert_close(path.time_at(path.log_snr(t)), t, rtol=1e-4, atol=1e-5)


@EACH
def test_alpha_and_sigma_are_exact_in_fp32(path: Path) -> None:
    t = torch.cat([inside(path, 1001, torch.float32), torch.tensor([path.first, path.last])])
    for found, exact in zip(path.alpha_sigma(t), path.alpha_sigma(t.double()), strict=True):
        assert (found >= 0).all()
        # The table of a schedule has a thousand steps: fp32's t says which to 3e-5 of one.
        torch.testing.assert_close(found.double(), exact, rtol=2e-6 if isinstance(path, Discrete) else 1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cosine_path_spans_log_snr_20_to_minus_20(dtype: torch.dtype) -> None:
    """In fp32, too, near the ends, where an angle of fp32 would give three digits."""
    t = torch.linspace(0, 1, 129, dtype=torch.float64)
    alpha, sigma = Cosine().alpha_sigma(t.to(dtype))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))
    b = math.atan(math.exp(-10))  # Salimans & Ho's code: −2 log tan(a t + b), a + b and b its angles at −20 and 20
    a = math.atan(math.exp(10)) - b
    expected = -2 * np.log(np.tan(a * t.numpy() + b))
    np.testing.assert_allclose(2 * torch.log(alpha / sigma), expected, rtol=1e-6, atol=1e-6)
    assert float(Cosine().log_snr(t)[0]) == pytest.approx(20)
    assert float(Cosine().log_snr(t)[-1]) == pytest.approx(-20)


def test_shift_lowers_log_snr_by_twice_its_logarithm() -> None:
    t = torch.linspace(0, 1, 21, dtype=torch.float64)
    shifted = Cosine(shift=0.25).log_snr(t)
    torch.testing.assert_close(shifted, Cosine().log_snr(t) + 2 * math.log(0.25))


def test_linear_path_is_the_integral_of_its_rates() -> None:
    t, grid = 0.7, np.linspace(0, 0.7, 100_001)
    integral = np.trapezoid(0.1 + grid * 19.9, grid)  # Song et al., 2021, equation 29: α = exp(−∫β/2)
    alpha, sigma = Linear().alpha_sigma(torch.tensor([t], dtype=torch.float64))
    assert float(alpha) == pytest.approx(math.exp(-integral / 2), rel=1e-9)
    assert float(sigma) == pytest.approx(math.sqrt(1 - math.exp(-integral)), rel=1e-9)


def test_discrete_path_has_each_step_of_its_schedule_and_tells_its_number() -> None:
    path = PATHS["discrete"]
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    alpha, _ = path.alpha_sigma(t)
    np.testing.assert_allclose(alpha**2, ALPHAS_CUMPROD, rtol=1e-12)
    torch.testing.assert_close(path.told(t), torch.arange(1000, dtype=torch.float64))
    assert path == Discrete(alphas_cumprod=ALPHAS_CUMPROD)  # used or not


def test_grids_are_those_of_the_papers() -> None:
    rho, high, low = 7, 80, 0.002  # Karras et al., 2022, equation 5, with N = 9
    expected = [(high ** (1 / rho) + i / 8 * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(9)]
    np.testing.assert_allclose(EDM().grid(8), expected)
    np.testing.assert_allclose(Flow().grid(4), [1, 0.75, 0.5, 0.25, 0])
    # Esser et al., 2024, equation 23: of the same SNR at m times the pixels, √m = 3
    np.testing.assert_allclose(Flow(shift=3.0).grid(4), [1, 9 / 10, 3 / 4, 1 / 2, 0])
    assert Trig().grid(2) == [math.pi / 2, math.pi / 4, 0]


@EACH
@pytest.mark.parametrize("steps", [1, 2, 7, 64, 700, 999, 1000, 1300])
def test_grids_fall_from_the_last_time_to_the_first_on_a_device_too(path: Path, steps: int) -> None:
    grid = path.grid(steps)
    assert len(grid) == steps + 1
    assert (grid[0], grid[-1]) == (path.last, pytest.approx(path.first, rel=1e-12))
    assert all(t > s for t, s in pairwise(grid))
    there = path.times(steps, torch.device("cpu"))
    torch.testing.assert_close(there, torch.tensor(grid), rtol=0, atol=0)
    if isinstance(path, Discrete) and steps < 1000:
        whole = 1000 * torch.tensor(grid, dtype=torch.float64)
        torch.testing.assert_close(whole, whole.round(), rtol=0, atol=1e-9)


@EACH
def test_samplers_begin_with_the_noise_of_the_last_time(path: Path) -> None:
    noise = torch.randn(5, 3, 4, 4)
    expected = path.noisy(torch.zeros_like(noise), noise, torch.full((5,), path.last))
    if isinstance(path, Discrete):  # as the library begins, whose last step still has a little signal
        expected = noise
    torch.testing.assert_close(path.start(noise), expected)


def test_a_path_is_a_part_of_a_recipe() -> None:
    adapter = TypeAdapter(AnyPath)
    assert adapter.validate_python("flow") == Flow()
    assert adapter.validate_python({"type": "trig", "data_std": 0.5}) == Trig(data_std=0.5)
    for path in PATHS.values():
        assert adapter.validate_python(path.model_dump(mode="json")) == path
    for wrong in ("sine", {"type": "flow", "rho": 7.0}, {"type": "discrete", "alphas_cumprod": [0.5, 0.9]}):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)
