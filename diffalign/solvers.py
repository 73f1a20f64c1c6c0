"""Solvers: ways down the chain, a step at a time, from the network's prediction to the next latents.

``Guided``      classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598), both predictions from one call of the network
``DDIM``        one stochastic or deterministic step (``Schedule.ddim_step``); eta = 1 is DDPM with its smaller variance
``DPMSolver``   DPM-Solver++ (2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2): second order, deterministic

Both take tables and flows alike: DDIM with eta = 0 is a flow's Euler step.

Every sample walks on a grid of its own, [B, S], so a batch may hold any mixture of levels. A solver serves one batch and one
walk; it makes steps 0, 1, ... S - 1 in turn.

Departure of the released Diffusion-DRO code from what is done here: with a grid per sample, its DPM-Solver++ gives each
sample's levels to the network but takes the noise levels of the *first* sample to move all of them. ``released=True`` does so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffalign.grids import steps_down
from diffalign.protocols import Predictor
from diffalign.schedule import Schedule
from diffalign.types import GUIDANCE, Conditioning


@dataclass(frozen=True)
class Guided:
    """A predictor with guidance: ``u + scale (c - u)``. At scale 1 the unconditional half is not computed at all.

    A network that was distilled from such answers (its conditioning has ``GUIDANCE``) gets the scale instead, in one call.
    """

    predictor: Predictor
    unconditional: Mapping[str, Tensor]  # one entry per name of the conditioning, each [1, ...] or [B, ...]
    scale: float

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        if GUIDANCE in conditioning:
            told = torch.full_like(conditioning[GUIDANCE], self.scale, dtype=torch.float32)
            return self.predictor(x_t, t, {**conditioning, GUIDANCE: told})
        if self.scale == 1.0:
            return self.predictor(x_t, t, conditioning)
        if missing := conditioning.keys() - self.unconditional.keys():
            raise ValueError(f"guidance needs an unconditional counterpart of {', '.join(sorted(missing))}")
        both = {name: torch.cat([self._empty(name, value), value]) for name, value in conditioning.items()}
        without, given = self.predictor(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return without + self.scale * (given - without)

    def _empty(self, name: str, like: Tensor) -> Tensor:
        return self.unconditional[name].to(like).expand_as(like)


class Solver(Protocol):
    """One batch's way down its grid."""

    def step(self, i: int, x_t: Tensor, prediction: Tensor, noise: Tensor | None = None) -> Tensor:
        """x at the level after the i-th, [B, ...], from the prediction made at (x_t, grid[:, i])."""
        ...


@dataclass(frozen=True)
class DDIM:
    """``ddim_step`` along a grid."""

    schedule: Schedule
    grid: Tensor  # [B, S], falling
    eta: float = 0.0

    def step(self, i: int, x_t: Tensor, prediction: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.schedule.ddim_step(x_t, prediction, self.grid[:, i], steps_down(self.grid)[:, i], self.eta, noise)


class DPMSolver:
    """DPM-Solver++ (2M). Remembers each sample's last prediction of x_0; the first and the last step are of first order.

    Written with x_0: the first-order step is DDIM's, ``s'/s x + (a' - s' a/s) x_0``, and the second order puts in place of
    x_0 its extrapolation ``x_0 + h/(2 h_before) (x_0 - x_0_before)``, h being the step in log(a/s). From a = 0, where a flow
    begins, h_before is infinite: the second step is of first order, too.
    """

    def __init__(self, schedule: Schedule, grid: Tensor, *, released: bool = False) -> None:
        self._schedule = schedule
        self._grid = grid[:1].expand_as(grid) if released else grid
        self._down = steps_down(self._grid)
        self._next = 0
        self._x_0: Tensor | None = None

    def step(self, i: int, x_t: Tensor, prediction: Tensor, noise: Tensor | None = None) -> Tensor:
        """x after the i-th step. ``noise`` must be None: the solver is deterministic.

        Raises:
            ValueError: steps are not taken in turn; the state would be another level's.
        """
        if noise is not None:
            raise ValueError("DPM-Solver++ is deterministic: it takes no noise")
        if i != self._next:
            raise ValueError(f"steps are taken in turn: step {self._next} is due, not {i}")
        t, t_next = self._grid[:, i], self._down[:, i]
        x_0 = self._schedule.to_x_0(prediction, x_t, t)
        data = x_0 if self._x_0 is None or i == self._grid.shape[1] - 1 else self._extrapolated(i, x_0)
        self._x_0, self._next = x_0, i + 1
        a, s = self._schedule.coefficients(t, x_t)
        a_next, s_next = self._schedule.coefficients(t_next, x_t)
        return s_next / s * x_t + (a_next - s_next * a / s) * data

    def _extrapolated(self, i: int, x_0: Tensor) -> Tensor:
        before, now, after = (self._half_log_snr(t, x_0) for t in (self._grid[:, i - 1], self._grid[:, i], self._down[:, i]))
        return x_0 + 0.5 * (after - now) / (now - before) * (x_0 - self._x_0)

    def _half_log_snr(self, t: Tensor, like: Tensor) -> Tensor:
        a, s = self._schedule.coefficients(t, like)
        return a.log() - s.log()
