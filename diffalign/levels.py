"""Which noise levels training visits: a distribution on [0, 1], from clean to noise, laid on a schedule's axis of time.

    uniform         u
    logit-normal    sigmoid(mean + std z), z normal               Esser et al. 2024 (SD3), arXiv 2403.03206, section 3.1, eq. 19
    mode            1 - u - scale (cos^2(pi u / 2) - 1 + u)       the same, eq. 20: heavy tails, denser in the middle

and then ``shift``, by which models of larger pictures are trained on noisier levels (the same, section 5.3.2):

    sigma' = shift sigma / (1 + (shift - 1) sigma)

sigma = 1 is noise. A flow model's level is t = T sigma, any number; on a table of T steps the same sigma means the step
floor(T sigma), a quantile of the table.

Levels are drawn through the distribution's quantile function, so that validation can be stratified under any of them.

Diffusers' training scripts for SD3 and FLUX look their draw up in a list that falls from noise to image and so mirror it: their
mean is the paper's and ours with the other sign. At mean 0 there is no difference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffalign.settings import check_options, option

Shape = Literal["uniform", "logit-normal", "mode"]

_EDGE = 1e-7
"""Quantiles nearer than this to 0 or 1 are taken for it: a level that is clean has no noise that could be found again."""


@dataclass(frozen=True)
class LevelDistribution:
    """The distribution of noise levels sigma, in [0, 1], in training. Raises ValueError outside the bounds."""

    shape: Shape = option("uniform", "uniform, logit-normal or mode")
    mean: float = option(0.0, "mean of the logit, for logit-normal; positive is noisier")
    std: float = option(1.0, "standard deviation of the logit, for logit-normal", gt=0)
    scale: float = option(
        1.29,
        "scale of the mode distribution; positive is denser in the middle, negative at the ends",
        ge=-1,
        le=2 / (math.pi - 2),
    )
    shift: float = option(1.0, "timestep shift, applied last; above 1 towards noise", gt=0)

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def constants(self) -> tuple[str, ...]:
        """The names of those that this shape has."""
        return (*_CONSTANTS[self.shape], "shift")

    def __str__(self) -> str:
        return ", ".join([self.shape, *(f"{name} {getattr(self, name):g}" for name in self.constants)])

    def quantile(self, u: Tensor) -> Tensor:
        """sigma below which a share ``u`` of the draws lies; both in [0, 1], any shape, float64."""
        sigma = _QUANTILES[self.shape](self, u)
        return sigma if self.shift == 1.0 else shifted(sigma, self.shift)


_CONSTANTS: dict[Shape, tuple[str, ...]] = {"uniform": (), "logit-normal": ("mean", "std"), "mode": ("scale",)}
_QUANTILES = {
    "uniform": lambda d, u: u,
    "logit-normal": lambda d, u: torch.sigmoid(d.mean + d.std * torch.special.ndtri(u)),
    "mode": lambda d, u: u - d.scale * (torch.sin(math.pi / 2 * u).square() - u),  # eq. 20 at 1 - u, to rise with u
}


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """``shift sigma / (1 + (shift - 1) sigma)``: keeps 0 and 1, and multiplies the odds sigma / (1 - sigma) by ``shift``."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


@dataclass(frozen=True)
class Levels:
    """A distribution on the time axis of a schedule (``Schedule.levels``)."""

    steps: int = 1000  # T
    continuous: bool = False  # t is any number in (0, T], float32; otherwise an integer in [0, T), int64
    distribution: LevelDistribution = LevelDistribution()

    def drawn(self, generator: torch.Generator) -> int | float:
        """One level."""
        if not self.continuous and self.distribution == LevelDistribution():
            return int(torch.randint(self.steps, (1,), generator=generator))
        return self.at(float(torch.rand((), generator=generator, dtype=torch.float64)))

    def at(self, u: float) -> int | float:
        """The level below which a share ``u`` in [0, 1] of the draws lies."""
        sigma = self.distribution.quantile(torch.tensor(u, dtype=torch.float64).clamp(_EDGE, 1.0 - _EDGE))
        t = float(sigma) * self.steps
        return t if self.continuous else min(int(t), self.steps - 1)
