"""Paths from data to noise: z_t = α_t x₀ + σ_t ε, data at the first time and, nearly or wholly, noise at the last.

Legend: z, x₀ and ε ~ N(0, I) are (B, ...); t is (B,); α and σ come as (B, 1, ...) to multiply z. SNR = α² / σ².
A path is a part of a recipe, `{type: flow}` or, in short, `flow`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Literal, TypeVar, final

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from scaletrain.config import Strict

Share = TypeVar("Share", float, Tensor)


class Path(Strict):
    """How much signal and how much noise there is at a time, between `first` and `last`."""

    @property
    def first(self) -> float:
        """The least time: of data with as little noise as networks are asked about."""
        return 0.0

    @property
    def last(self) -> float:
        """The greatest time, at which samplers begin from σ ε."""
        return 1.0

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return α and σ at times t, in its shape."""

    @abstractmethod
    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return dα/dt and dσ/dt at times t, in its shape."""

    @abstractmethod
    def time_at(self, log_snr: Tensor) -> Tensor:
        """Return the times at which log SNR has these values, in their shape; it falls with time."""

    def told(self, t: Tensor) -> Tensor:
        """Return what networks are told in place of t, about 0 to 1."""
        return t

    def at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return α and σ at times t (B,), shaped (B, 1, ...) to multiply `like` (B, ...)."""
        alpha, sigma = self.alpha_sigma(t)
        return beside(alpha, like), beside(sigma, like)

    def log_snr(self, t: Tensor) -> Tensor:
        """Return log α²/σ² at times t, in its shape."""
        alpha, sigma = self.alpha_sigma(t)
        return 2 * (alpha.clamp(min=0).log() - sigma.log())  # cos(π/2) is below 0, rounded

    def noisy(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return z_t (B, ...)."""
        alpha, sigma = self.at(t, x0)
        return alpha * x0 + sigma * eps

    def start(self, noise: Tensor) -> Tensor:
        """Return where samplers begin (B, ...): noise (B, ...) of unit variance at the scale of the last time."""
        _, sigma = self.alpha_sigma(torch.full((), self.last, dtype=noise.dtype, device=noise.device))
        return sigma * noise

    def time(self, share: Share) -> Share:
        """Return the times at shares of the way from `first` to `last` along which grids are even."""
        return self.first + (self.last - self.first) * share

    def grid(self, steps: int) -> list[float]:
        """Return the times of a sampler of so many steps, `last` to `first`: steps + 1, evenly spaced."""
        return [self.time((steps - i) / steps) for i in range(steps + 1)]

    def times(self, steps: int, device: torch.device) -> Tensor:
        """Return that grid on a device (steps + 1,), fp32. It is made there: who copies to a device waits for it."""
        return self.time(torch.arange(steps, -1, -1, dtype=torch.float64, device=device) / steps).float()


def beside(values: Tensor, like: Tensor) -> Tensor:
    """Shape (B,) as (B, 1, ...), to multiply `like` (B, ...)."""
    return values.view(-1, *(1,) * (like.dim() - 1))


@final
class Cosine(Path):
    """The variance-preserving cosine path, α² + σ² = 1 (Nichol & Dhariwal, 2021), with log SNR from 20 down to −20.

    α = cos φ, σ = sin φ, and φ goes evenly from just above 0 to just below π/2, so that α and σ are never 0 and every
    conversion between ε, x₀ and v is defined (Salimans & Ho, 2022, appendix; the bounds are those of their code).
    shift: log SNR is raised by 2 log of it, such as 64 / side for pictures larger than 64 (Hoogeboom et al., 2023,
    section 3.1). Then tan φ is divided by it.
    """

    type: Literal["cosine"] = "cosine"
    shift: float = Field(1.0, gt=0)

    def _cos_sin(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # The cosine as a sine of the rest: near t = 1 it is 5e-5, of which fp32's cosine has three digits.
        return torch.sin(_LEAST + (1 - t) * _WIDTH), torch.sin(_LEAST + t * _WIDTH)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos φ and sin φ."""
        cos, sin = self._cos_sin(t)
        if self.shift == 1:
            return cos, sin
        length = torch.hypot(self.shift * cos, sin)
        return self.shift * cos / length, sin / length

    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return dα/dt and dσ/dt: φ' (−σ, α)."""
        alpha, sigma = self.alpha_sigma(t)
        cos, sin = self._cos_sin(t)
        # φ = atan(tan θ / shift), so dφ/dθ = shift / (shift² cos² θ + sin² θ).
        rate = _WIDTH * self.shift / ((self.shift * cos) ** 2 + sin**2)
        return -sigma * rate, alpha * rate

    def time_at(self, log_snr: Tensor) -> Tensor:
        """Invert log SNR = −2 log tan φ."""
        angle = torch.atan(self.shift * torch.exp(-log_snr / 2))
        return (angle - _LEAST) / _WIDTH


_LEAST = math.atan(math.exp(-10))
_WIDTH = math.pi / 2 - 2 * _LEAST


@final
class Linear(Path):
    """The variance-preserving path whose β rises linearly (Ho et al., 2020), in continuous time (Song et al., 2021,
    equation 33): log α = −t² (β₁ − β₀) / 4 − t β₀ / 2.
    """

    type: Literal["linear"] = "linear"
    beta_min: float = Field(0.1, gt=0)
    beta_max: float = Field(20.0, gt=0)

    @property
    def first(self) -> float:
        """That of Song et al., 2021, appendix C."""
        return 1e-3

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -t * (t * (self.beta_max - self.beta_min) / 4 + self.beta_min / 2)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return α and the root of 1 − α²."""
        log_alpha = self._log_alpha(t)
        return log_alpha.exp(), torch.sqrt(-torch.expm1(2 * log_alpha))

    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return −β α / 2 and β α² / (2 σ)."""
        alpha, sigma = self.alpha_sigma(t)
        beta = self.beta_min + t * (self.beta_max - self.beta_min)
        return -beta * alpha / 2, beta * alpha**2 / (2 * sigma)

    def time_at(self, log_snr: Tensor) -> Tensor:
        """Solve the quadratic of log α, in the form that does not cancel."""
        log_alpha = torch.nn.functional.logsigmoid(log_snr) / 2
        wide, low = self.beta_max - self.beta_min, self.beta_min
        return -4 * log_alpha / (low + torch.sqrt(low**2 - 4 * wide * log_alpha))


@final
class Discrete(Path):
    """The path of a schedule of T steps, by ᾱ of each: time t is step T t − 1, log SNR linear between steps.

    So t = 1 is the last step, T − 1, which networks are told as it is.
    alphas_cumprod: α² of each step, falling. sigmas are the roots of 1 − α².
    """

    type: Literal["discrete"] = "discrete"
    alphas_cumprod: list[float] = Field(min_length=2)

    @model_validator(mode="after")
    def _falling(self) -> Discrete:
        values = self.alphas_cumprod
        if not (values[0] < 1 and values[-1] > 0 and all(a > b for a, b in pairwise(values))):
            raise ValueError("alphas_cumprod must fall from below 1 to above 0")
        return self

    @property
    def first(self) -> float:
        """The time of step 0."""
        return 1 / len(self.alphas_cumprod)

    @cached_property
    def _tables(self) -> dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]]:
        return {}

    def _table(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return log SNR of each step, and by how much it changes to the next, which fp32 could not tell from it."""
        kind = like.device, like.dtype
        if kind not in self._tables:
            log_snr = torch.logit(torch.tensor(self.alphas_cumprod, dtype=torch.float64))
            self._tables[kind] = log_snr.to(*kind), log_snr.diff().to(*kind)
        return self._tables[kind]

    def _step(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the step before t, and how far it is behind, in steps."""
        place = (t * len(self.alphas_cumprod) - 1).clamp(0, len(self.alphas_cumprod) - 1)
        before = place.detach().floor().clamp(max=len(self.alphas_cumprod) - 2)
        return before.long(), place - before

    def log_snr(self, t: Tensor) -> Tensor:
        """Read the table."""
        table, change = self._table(t)
        step, part = self._step(t)
        return table[step] + part * change[step]

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the roots of sigmoid(±log SNR)."""
        log_snr = self.log_snr(t)
        return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()

    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return α σ² and −α² σ, times half the slope of log SNR."""
        _, change = self._table(t)
        step, _ = self._step(t)
        half = change[step] * len(self.alphas_cumprod) / 2
        alpha, sigma = self.alpha_sigma(t)
        return alpha * sigma**2 * half, -(alpha**2) * sigma * half

    def time_at(self, log_snr: Tensor) -> Tensor:
        """Search the table."""
        table, change = self._table(log_snr)
        step = torch.searchsorted(-table, -log_snr.contiguous()).clamp(1, len(table) - 1) - 1
        part = (log_snr - table[step]) / change[step]
        return (step + part.clamp(0, 1) + 1) / len(table)

    def told(self, t: Tensor) -> Tensor:
        """Return the step, 0 to T − 1."""
        return t * len(self.alphas_cumprod) - 1

    def start(self, noise: Tensor) -> Tensor:
        """Return noise as it is (Ho et al., 2020, algorithm 2): at the last step, data and noise make unit variance."""
        return noise

    def grid(self, steps: int) -> list[float]:
        """Return the times of whole steps, as evenly as they go, from the last on (Lin et al., 2024, "trailing").

        They fall, and end after one more at the first; where there are not so many they are even, between whole steps.
        """
        count = len(self.alphas_cumprod)
        if steps >= count:
            return super().grid(steps)
        whole = (max(round(count - i * count / steps), steps + 1 - i) for i in range(steps))
        return [*(step / count for step in whole), self.first]

    def times(self, steps: int, device: torch.device) -> Tensor:
        """Return that grid on a device."""
        count = len(self.alphas_cumprod)
        if steps >= count:
            return super().times(steps, device)
        number = torch.arange(steps + 1, dtype=torch.float64, device=device)
        return (torch.maximum(torch.round(count - number * count / steps), steps + 1 - number) / count).float()


@final
class EDM(Path):
    """The variance-exploding path z = x₀ + t ε, σ = t (Karras et al., 2022), with their grid of times."""

    type: Literal["edm"] = "edm"
    sigma_min: float = Field(0.002, gt=0)
    sigma_max: float = Field(80.0, gt=0)
    rho: float = Field(7.0, gt=0)

    @property
    def first(self) -> float:
        """`sigma_min`."""
        return self.sigma_min

    @property
    def last(self) -> float:
        """`sigma_max`."""
        return self.sigma_max

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return 1 and t."""
        return torch.ones_like(t), t

    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return 0 and 1."""
        return torch.zeros_like(t), torch.ones_like(t)

    def time_at(self, log_snr: Tensor) -> Tensor:
        """Return exp(−log SNR / 2)."""
        return torch.exp(-log_snr / 2)

    def told(self, t: Tensor) -> Tensor:
        """Return ln(σ) / 4 (Karras et al., 2022, table 1)."""
        return t.log() / 4

    def time(self, share: Share) -> Share:
        """Return times evenly spaced in σ^(1/ρ) (Karras et al., 2022, equation 5)."""
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return (low + (high - low) * share) ** self.rho


@final
class Flow(Path):
    """The straight path z = (1 − t) x₀ + t ε of rectified flows and flow matching (Liu et al., 2023; Lipman et al.,
    2023).

    shift: of times towards noise, for large pictures: t ← s t / (1 + (s − 1) t) (Esser et al., 2024, equation 23). It
    holds for samplers' grids; what is trained on is told by the times of an objective.
    """

    type: Literal["flow"] = "flow"
    shift: float = Field(1.0, gt=0)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return 1 − t and t."""
        return 1 - t, t

    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return −1 and 1."""
        return -torch.ones_like(t), torch.ones_like(t)

    def time_at(self, log_snr: Tensor) -> Tensor:
        """Return σ / (α + σ)."""
        return torch.sigmoid(-log_snr / 2)

    def time(self, share: Share) -> Share:
        """Return times evenly spaced and then shifted."""
        return self.shift * share / (1 + (self.shift - 1) * share)


@final
class Trig(Path):
    """TrigFlow: z = cos(t) x₀ + data_std · sin(t) ε for t in [0, π/2] (Lu & Song, 2025, section 3.1)."""

    type: Literal["trig"] = "trig"
    data_std: float = Field(1.0, gt=0)

    @property
    def last(self) -> float:
        """π / 2."""
        return math.pi / 2

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos t and data_std · sin t."""
        # The cosine as a sine of the rest: fp32's of π / 2 is below 0, which has no logarithm.
        return torch.sin(math.pi / 2 - t), self.data_std * torch.sin(t)

    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return −sin t and data_std · cos t."""
        return -torch.sin(t), self.data_std * torch.cos(t)

    def time_at(self, log_snr: Tensor) -> Tensor:
        """Return atan(σ / (α · data_std))."""
        return torch.atan(torch.exp(-log_snr / 2) / self.data_std)


def _named(value: object) -> object:
    return {"type": value} if isinstance(value, str) else value


AnyPath = Annotated[
    Annotated[Cosine | Linear | Discrete | EDM | Flow | Trig, Field(discriminator="type")], BeforeValidator(_named)
]
"""A path in a recipe."""
