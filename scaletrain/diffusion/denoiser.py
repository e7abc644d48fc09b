"""A network read as a denoiser: at any time of a path, what it takes z for in terms of x₀ and ε."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from scaletrain.diffusion.path import Path, beside
from scaletrain.diffusion.prediction import Weighting, weight
from scaletrain.diffusion.reading import Reading

_FAR = 40.0
"""Of log SNR: beyond, there is no noise, or nothing else."""


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho & Salimans, 2021): x₀ without the condition, and `scale` times what that adds.

    null: the condition that stands for none, by name, () or (...) each, or a number. low, high: times between which it
    is used, others take the condition alone (Kynkäänniemi et al., 2024).
    """

    scale: float | Tensor
    null: Mapping[str, Tensor | int]
    low: float = -torch.inf
    high: float = torch.inf


@dataclass(frozen=True)
class Denoiser:
    """A network (z (B, ...), t (B,), **told) -> prediction (B, ...), and how that is read.

    told: what the network is told beside z and the time, by name, (B, ...) each. clip: bring x₀ into [-1, 1], the range
    of pictures, and change ε to agree with it (Ho et al., 2020, section 3.2).
    """

    network: Callable[..., Tensor]
    reading: Reading
    clip: bool = False
    told: Mapping[str, Tensor] = field(default_factory=dict)
    guidance: Guidance | None = None
    other: Path | None = None
    """The path that z and t are on, where it is not the network's own."""

    @property
    def path(self) -> Path:
        """The path that z and t are on."""
        return self.other or self.reading.path

    def along(self, path: Path) -> Denoiser:
        """Return the same for z and t of another path: of the same SNR, they differ by a factor (Karras et al., 2022,
        appendix B).
        """
        exact = self.reading.prediction == "exact"
        if exact or path == self.reading.path:
            return replace(self, reading=self.reading.model_copy(update={"path": path}), other=None)
        return replace(self, other=path)

    def under(self, guidance: Guidance | None) -> Denoiser:
        """Return the same, guided."""
        return replace(self, guidance=guidance)

    def given(self, **told: Tensor) -> Denoiser:
        """Return the same, told these things too, (B, ...) each."""
        return replace(self, told={**self.told, **told}) if told else self

    def output(self, z: Tensor, t: Tensor) -> Tensor:
        """Return what the network itself says (B, ...), in fp32; the network is given z in the scale that it wants."""
        return self._output(z, t, self.told)

    def _output(self, z: Tensor, t: Tensor, told: Mapping[str, Tensor]) -> Tensor:
        if self.reading.prediction == "exact":
            found = self.network(z, *self.reading.path.alpha_sigma(t), **told)
        else:
            scale = self.reading.scale(*self.reading.path.at(t, z))
            found = self.network(z if scale is None else z / scale, self.reading.path.told(t), **told)
        return found if z.dtype == torch.float64 else found.float()

    def _guided(self, z: Tensor, t: Tensor, guidance: Guidance) -> Tensor:
        """Return the guided output; both halves go through the network in one call."""
        count = len(z)
        null = {k: filled(v, z.device) for k, v in guidance.null.items()}
        null = {k: v.expand(count, *v.shape) for k, v in null.items()}
        told = {k: torch.cat([v, null.get(k, v)]) for k, v in self.told.items()}
        with_, without = self._output(torch.cat([z, z]), torch.cat([t, t]), told).chunk(2)
        scale = guidance.scale
        if not isinstance(scale, Tensor):
            scale = torch.full((count,), scale, dtype=z.dtype, device=z.device)
        scale = torch.where((t >= guidance.low) & (t <= guidance.high), scale, 1.0)
        return torch.lerp(without, with_, beside(scale, z))

    def __call__(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return x₀ and ε (B, ...) at z and times t (B,), in fp32."""
        if self.other is not None:
            own, log_snr = self.reading.path, self.other.log_snr(t)
            time = own.time_at(log_snr.clamp(-_FAR, _FAR)).clamp(own.first, own.last)
            alpha, sigma = self.other.at(t, z)
            factor = torch.hypot(*own.at(time, z)) / torch.hypot(alpha, sigma)
            x0, eps = replace(self, other=None)(factor * z, time)
            # Past an end of the network's own path the two would not make z: the one that z tells more of follows.
            clear = beside(log_snr > 0, z)
            rest = torch.where(clear, z - sigma * eps, z - alpha * x0) / torch.where(clear, alpha, sigma)
            return torch.where(clear, rest, x0), torch.where(clear, eps, rest)
        output = self._guided(z, t, self.guidance) if self.guidance else self.output(z, t)
        x0, eps = self.reading.split(output, z, t)
        if self.clip:
            x0 = x0.clamp(-1, 1)
            return x0, self.reading.split(x0, z, t, "x0")[1]
        return x0, eps

    def velocity(self, z: Tensor, t: Tensor) -> Tensor:
        """Return dz/dt (B, ...) of the probability flow at z and times t (B,) (Song et al., 2021, equation 13)."""
        if self.reading.prediction == "velocity" and not (self.guidance or self.clip or self.other):
            return self.output(z, t)
        x0, eps = self(z, t)
        slopes = self.path.slopes(t)
        return beside(slopes[0], z) * x0 + beside(slopes[1], z) * eps

    def loss(self, z: Tensor, t: Tensor, x0: Tensor, weighting: Weighting, eps: Tensor | None = None) -> Tensor:
        """Return the weighted squared error for a target x₀, a mean over the values of each sample: (B,), fp32.

        It is taken in the network's own terms, where rounding does not grow with the SNR. eps: what z was made with;
        by default what follows from z and x₀, which is not defined where σ is 0.
        """
        if eps is None:
            target = self.reading.joined(x0, z, t)
        else:
            a, b = self.reading.parts(t, z)
            target = a * x0 + b * eps
        error = self.output(z, t) - target
        factor = weight(weighting, *self.reading.slopes(t, z))
        return (factor * torch.square(error)).flatten(1).mean(1)


def filled(value: Tensor | int, device: torch.device) -> Tensor:
    """Return what stands for no condition on a device, without waiting for that."""
    return torch.full((), value, device=device) if isinstance(value, int) else value.to(device, non_blocking=True)
