"""The levels that a sampler visits, from noise to image: of a table of steps, and of a flow model.

Shapes: S = steps of a sampler, B = samples. A grid is [S], or [B, S] where every sample has its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from diffalign.levels import shifted
from diffalign.settings import check_options, option

Spacing = Literal["leading", "trailing", "linspace"]
Line = Literal["scheduler", "pipeline", "solver"]


def timestep_grid(train_steps: int, steps: int, spacing: Spacing = "leading", offset: int = 0) -> Tensor:
    """The levels [S] that a sampler visits, int64, from noise to image; spacings as in arXiv 2305.08891, table 2.

    ``leading``   multiples of T // S, shifted up by ``offset`` (1 for SD1.5);
    ``trailing``  T - 1 first, then down by T / S;
    ``linspace``  S points from T - 1 to 0.
    """
    if not 1 <= steps <= train_steps:
        raise ValueError(f"steps lie between 1 and the {train_steps} of training; got {steps}")
    if spacing == "leading":
        grid = np.arange(steps)[::-1] * (train_steps // steps) + offset
    elif spacing == "trailing":
        grid = np.round(np.arange(train_steps, 0, -train_steps / steps)) - 1
    elif spacing == "linspace":
        grid = np.linspace(0 if steps > 1 else train_steps - 1, train_steps - 1, steps).round()[::-1]
    else:
        raise ValueError(f"spacing is one of {get_args(Spacing)}; got {spacing!r}")
    if grid[0] >= train_steps:
        first = f"{steps} steps shifted by {offset} begins at {int(grid[0])}"
        raise ValueError(f"a grid of {first}; training ended at {train_steps - 1}")
    return torch.from_numpy(grid.astype(np.int64))


def perturbed_grid(train_steps: int, steps: int, shift: Tensor) -> Tensor:
    """A grid per sample [B, S]: multiples of T // S, shifted up by ``shift`` [B] in [0, T // S).

    Diffusion-DRO (arXiv 2510.18353) draws the shift uniformly, so that its trajectories visit every t.
    """
    stride = train_steps // steps
    if bool(((shift < 0) | (shift >= stride)).any()):
        raise ValueError(f"the shift of a grid of {steps} steps lies in [0, {stride}); got {shift.tolist()}")
    return timestep_grid(train_steps, steps).to(shift.device) + shift[:, None]


def steps_down(grid: Tensor) -> Tensor:
    """The level after each of ``grid`` [..., S]: the next one, and -1, the clean end, after the last."""
    return torch.cat([grid[..., 1:], torch.full_like(grid[..., :1], -1)], dim=-1)


# ---------------------------------------------------------------------------------------------------------- Flow models


class Sigmas(Protocol):
    """How a flow model's sampler lays its noise levels. ``FlowGrid`` is Diffusers'; a frozen dataclass of plain values."""

    def sigmas(self, steps: int, shape: tuple[int, ...]) -> Tensor:
        """[S] float64 in (0, 1], falling, for latents of ``shape`` [C, H, W]; without the clean end."""
        ...

    def warped(self, u: Tensor, steps: int, shape: tuple[int, ...]) -> Tensor:
        """Where the sampler puts points ``u`` of an even line from 0 (clean) to 1 (noise); same shape, float64, rising."""
        ...


@dataclass(frozen=True)
class FlowGrid:
    """Noise levels as Diffusers' FlowMatchEulerDiscreteScheduler makes them; its configuration's names and defaults.

    An even line of S points is bent towards noise, and may then be stretched so that it ends at ``shift_terminal``:

        shift                     sigma' = shift sigma / (1 + (shift - 1) sigma)
        use_dynamic_shifting      the same with shift = exp(mu), or mu if ``time_shift_type`` is linear

    where mu of a number of tokens lies on the line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift).

    ``line``, the points before they are bent:

        scheduler    S points from 1 to 1 / T, the last one bent already where the shift is constant (SD3, Sana with Euler)
        pipeline     1, 1 - 1/S, ... 1/S: what the pipeline passes (FLUX, Qwen-Image)
        solver       those times 1 - 1/T: DPM-Solver++ with ``use_flow_sigmas`` (Sana; its ``flow_shift`` is ``shift``)
    """

    line: Line = "scheduler"
    shift: float = option(1.0, "timestep shift towards noise", gt=0)
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    shift_terminal: float | None = None
    mu: float | None = None  # given by the family instead of found from the number of tokens
    patch: int = option(2, "patch size: latent pixels on a side of a token", ge=1)
    train_steps: int = option(1000, "T", ge=1)

    def __post_init__(self) -> None:
        check_options(self)

    def sigmas(self, steps: int, shape: tuple[int, ...]) -> Tensor:
        """[S] float64 for latents of ``shape`` [C, H, W].

        Raises:
            ValueError: no step at all.
        """
        if steps < 1:
            raise ValueError(f"a sampler takes at least one step; got {steps}")
        found = self.warped(_LINES[self.line](self, steps), steps, shape)
        if not self.shift_terminal or steps == 1:  # one point is noise and stays there
            return found
        clean = 1.0 - found
        return 1.0 - clean * (1.0 - self.shift_terminal) / clean[-1]

    def warped(self, u: Tensor, steps: int, shape: tuple[int, ...]) -> Tensor:
        """``u`` bent, not stretched."""
        return shifted(u, self.bend(shape))

    def bend(self, shape: tuple[int, ...]) -> float:
        """The shift for latents of ``shape``."""
        if not self.use_dynamic_shifting:
            return self.shift
        mu = self.mu if self.mu is not None else self._mu(math.prod(shape[-2:]) / self.patch**2)
        return math.exp(mu) if self.time_shift_type == "exponential" else mu

    def _mu(self, tokens: float) -> float:
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return self.base_shift + slope * (tokens - self.base_image_seq_len)


def _from_the_scheduler(grid: FlowGrid, steps: int) -> Tensor:
    least = torch.tensor(1.0 / grid.train_steps, dtype=torch.float64)
    if not grid.use_dynamic_shifting:
        least = shifted(least, grid.shift)
    return torch.linspace(1.0, float(least), steps, dtype=torch.float64)


def _from_the_pipeline(grid: FlowGrid, steps: int) -> Tensor:
    return torch.arange(steps, 0, -1, dtype=torch.float64) / steps


def _from_the_solver(grid: FlowGrid, steps: int) -> Tensor:
    return (1.0 - 1.0 / grid.train_steps) * _from_the_pipeline(grid, steps)


_LINES: dict[Line, Callable[[FlowGrid, int], Tensor]] = {
    "scheduler": _from_the_scheduler,
    "pipeline": _from_the_pipeline,
    "solver": _from_the_solver,
}
