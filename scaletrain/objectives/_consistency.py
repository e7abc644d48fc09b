"""What consistency models in discrete time share: the loss between two times, who gives the target, and samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from scaletrain.config import NetworkSpec, Recipe
from scaletrain.data.sources import Rows
from scaletrain.diffusion.consistency import check_boundary, sampler, to_data
from scaletrain.diffusion.denoiser import Denoiser
from scaletrain.diffusion.intervals import Intervals
from scaletrain.diffusion.path import Path, beside
from scaletrain.diffusion.prediction import Weighting
from scaletrain.diffusion.solvers import STEPS, Solver, implied_x0
from scaletrain.errors import UserError
from scaletrain.evaluate.few_steps import Sampler
from scaletrain.objectives import _denoising
from scaletrain.objectives.base import Networks
from scaletrain.player import Player


class Sampling(_denoising.Config):
    """How consistency models sample."""

    steps: int = Field(2, ge=1)
    """Evaluations of the student for a sample."""
    highest: float | None = Field(None, gt=0, lt=1)
    """Of a sample of several steps: to what share of the path noise is added back, evenly less each time; by default
    the path's own grid."""
    fresh: bool = True
    """Add new noise between steps (Song et al., 2023, algorithm 1), not the noise that the student found."""


class Config(Sampling):
    """Options that all of them have."""

    intervals: Intervals
    """The two times at which the student is compared."""
    weighting: Weighting = "plain"
    """Of squared errors, as in diffusion (see `scaletrain.diffusion.prediction.weight`)."""
    huber: float = Field(0.03, ge=0)
    """c of the pseudo-Huber loss √(e + c²) − c of a mean squared error e (Song & Dhariwal, 2024, section 3.3, where it
    is 0.001 of data of unit variance); 0 is for the squared error itself."""
    target_decay: float | None = Field(None, ge=0, lt=1)
    """Of the network `target`, an average of the student that gives the targets (Song et al., 2023, equation 8); by
    default the student itself does (Song & Dhariwal, 2024, section 3.2)."""
    solver_steps: int = Field(1, ge=1)
    """Of the teacher's solver, from one time to the other."""
    solver: Literal["ddim", "euler", "heun"] = "ddim"
    """Of the teacher, from one time to the other and in the table: one that goes single steps between any two times."""


S = TypeVar("S", bound=Sampling)
C = TypeVar("C", bound=Config)


class Sampled(_denoising.Objective[S], Generic[S]):
    """What trains a consistency function, in whatever time: how it samples, and how many updates there were."""

    def __init__(self, config: S, recipe: Recipe):
        super().__init__(config, recipe)
        self.steps = config.steps
        self._updates = 0
        if not self.needs_teacher and config.solver != "ddim":
            raise UserError("objective.solver is for a teacher, and there is none; leave it out.")

    @property
    def flow(self) -> Path:
        """The path that it is a consistency function on."""
        return self.signature.reading.path

    def prepare(self, train: Rows, eval: Rows | None) -> None:
        """Find what is denoised, and that data stay what they are. Raises UserError."""
        super().prepare(train, eval)
        check_boundary(self.signature.reading, self.flow)

    def sampler(self, network: nn.Module) -> Sampler:
        """Sample as consistency models do."""
        return sampler(self.drawing(network).along(self.flow), self.config.highest, self.config.fresh)

    @property
    def drawn_by(self) -> Solver | None:
        """The solver that it amounts to on the path's grid, if it keeps to that."""
        lower = self.config.highest is not None and self.steps > 1
        if lower or self.flow != self.signature.reading.path:
            return None
        return "renoise" if self.config.fresh else "ddim"

    def after_update(self, player: Player, networks: Networks) -> None:
        """Count."""
        self._updates = player.updates

    def state_dict(self) -> dict[str, Any]:
        """Return how many updates there were."""
        return {"updates": self._updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take that back."""
        self._updates = state["updates"]


class Objective(Sampled[C], Generic[C]):
    """Train `student` to say of two points of one trajectory that they come from the same data."""

    def prepare(self, train: Rows, eval: Rows | None) -> None:
        """Find, too, that the solver can go to the data. Raises UserError."""
        super().prepare(train, eval)
        if self.config.solver != "ddim" and self.flow.alpha_sigma(torch.tensor(self.flow.first))[1] == 0:
            raise UserError(
                f"objective.solver: {self.config.solver} asks the teacher about data without noise, with which the "
                "path ends; take ddim."
            )

    def networks(self) -> dict[str, NetworkSpec]:
        """Return the student, its teacher and, where it is an average, the network that gives the targets."""
        found = super().networks()
        if self.config.target_decay is not None:
            source = found[self.trained].source or self.origins.get(self.trained)
            found["target"] = found[self.trained].model_copy(update={"source": source})
        return found

    def difference(self, student: Denoiser, target: Denoiser, z: Tensor, t: Tensor, y: Tensor, s: Tensor) -> Tensor:
        """Return the loss of f(z, t) against f⁻(y, s) of the same trajectory, (B,)."""
        aim = self.aim(target, z, t, y, s)
        error = student.loss(z, t, aim, self.config.weighting)
        c = self.config.huber
        return torch.sqrt(error + c**2) - c if c else error

    def aim(self, target: Denoiser, z: Tensor, t: Tensor, y: Tensor, s: Tensor) -> Tensor:
        """Return the x₀ that the student has to answer at z and t for f(z, t) to be f⁻(y, s); y itself at the first
        time. Without gradients.
        """
        first = target.path.first
        with torch.no_grad():
            data = torch.where(beside(s <= first, y), y, to_data(target, y, s))
            return implied_x0(target.path, z, t, data, torch.full_like(t, first))

    def along_flow(self, teacher: Denoiser, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return where the teacher's solver gets from z at times t by times s (B,). Without gradients."""
        step, count = STEPS[self.config.solver], self.config.solver_steps
        with torch.no_grad():
            for i in range(count):
                z = step(teacher, z, torch.lerp(t, s, i / count), torch.lerp(t, s, (i + 1) / count))
        return z

    def between(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Draw the later and the earlier time, (count,) each."""
        reading = self.signature.reading
        return self.config.intervals.draw(count, reading.path, self._updates, reading.data_std, device)

    def target(self, networks: Networks) -> Denoiser:
        """Read the network that gives the targets."""
        return self.denoiser(networks["target" if self.config.target_decay is not None else self.trained])

    def after_update(self, player: Player, networks: Networks) -> None:
        """Move the target towards the student. At first it is the student as the first update left it."""
        super().after_update(player, networks)
        if self.config.target_decay is not None:
            follow(networks["target"], networks[self.trained], self.config.target_decay if self._updates > 1 else 0.0)


@torch.no_grad()
def follow(target: nn.Module, student: nn.Module, decay: float) -> None:
    """Make each weight of `target` decay times what it is, and the rest of the student's."""
    for own, other in zip(_tensors(target), _tensors(student), strict=True):
        if own.is_floating_point():
            own.lerp_(other.to(own.dtype), 1 - decay)
        else:
            own.copy_(other)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
