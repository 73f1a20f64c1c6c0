"""The chain, forwards and backwards: the only file that indexes alpha_bar.

``x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps`` (DDPM, Ho et al. 2020, arXiv 2006.11239, eq. 4), with
T discrete steps. Networks answer in one of three parametrisations of the same thing:

    epsilon       eps
    v_prediction  sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0     (Salimans & Ho 2022, arXiv 2202.00512, section 2.4)
    sample        x_0

Backwards, one step of DDIM (Song et al. 2020, arXiv 2010.02502, eq. 12 and 16) from t to an earlier t' is the Gaussian

    mean       sqrt(alpha_bar_t') x_0 + sqrt(1 - alpha_bar_t' - sigma^2) eps          x_0, eps as predicted at (x_t, t)
    deviation  sigma = eta sqrt( (1 - alpha_bar_t') / (1 - alpha_bar_t) (1 - alpha_bar_t / alpha_bar_t') )

eta = 1 is the ancestral step of DDPM with its smaller variance; eta = 0 has no noise and no density.

Shapes: B = batch; a latent is [B, ...] with any trailing dimensions; ``t`` is [B] int64 in [-1, T), where -1 (like anything
below 0) is the clean end. What alpha_bar is there is a convention, see ``NoiseSchedule.clean_end``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample"]
CleanEnd = Literal["one", "first"]
Spacing = Literal["leading", "trailing", "linspace"]
Over = Literal["mean", "sum"]
"""How the log-densities of the dimensions of a latent become one number."""


@dataclass(frozen=True)
class NoiseSchedule:
    """alpha_bar at every step, and what the network predicts.

    The table is kept as given (float32 in Diffusers) and never cast below float32: in float16 ``1 - alpha_bar_0`` would be
    9.8e-4 instead of 8.5e-4.
    """

    alpha_bar: Tensor  # [T], decreasing, in [0, 1]
    prediction_type: PredictionType = "epsilon"
    clean_end: CleanEnd = "one"
    """alpha_bar at t = -1. ``one``: what a clean latent has. ``first``: alpha_bar[0], as Diffusers samples where a
    configuration says ``set_alpha_to_one: false`` (SD1.5, SDXL); clamping t' to 0, as D3PO and DDPO do, is the same."""

    def __post_init__(self) -> None:
        if self.alpha_bar.ndim != 1 or not self.alpha_bar.is_floating_point():
            raise ValueError(f"alpha_bar is a table [T] of floats; got shape {tuple(self.alpha_bar.shape)}")
        if not bool((self.alpha_bar[1:] <= self.alpha_bar[:-1]).all()):
            raise ValueError("alpha_bar must not increase with t")
        if self.prediction_type not in get_args(PredictionType):
            raise ValueError(f"prediction_type is one of {get_args(PredictionType)}; got {self.prediction_type!r}")
        if self.clean_end not in get_args(CleanEnd):
            raise ValueError(f"clean_end is one of {get_args(CleanEnd)}; got {self.clean_end!r}")

    def __len__(self) -> int:
        """T, the number of training steps."""
        return len(self.alpha_bar)

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """``sqrt(alpha_bar_t)`` and ``sqrt(1 - alpha_bar_t)`` as [B, 1, ...] to scale ``like`` [B, ...], float32 at least."""
        if t.shape != like.shape[:1]:
            raise ValueError(f"t must hold one step per sample: got {tuple(t.shape)} for a batch of {like.shape[0]}")
        dtype = torch.promote_types(self.alpha_bar.dtype, like.dtype)
        alpha_bar = self._at(t, like, dtype)
        return alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()

    def _at(self, t: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
        """alpha_bar_t as [B, 1, ...] on the device of ``like``."""
        clean = self.alpha_bar[:1] if self.clean_end == "first" else torch.ones_like(self.alpha_bar[:1])
        table = torch.cat([clean, self.alpha_bar]).to(device=like.device, dtype=dtype)
        return table[t.to(like.device).clamp(min=-1) + 1].view(-1, *([1] * (like.ndim - 1)))

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t for clean latents and noise, in the dtype of ``x_0``."""
        a, s = self.coefficients(t, x_0)
        return (a * x_0 + s * noise).to(x_0.dtype)

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should predict for this draw, float32 at least."""
        a, s = self.coefficients(t, x_0)
        if self.prediction_type == "epsilon":
            return noise.to(a.dtype)
        if self.prediction_type == "v_prediction":
            return a * noise - s * x_0
        return x_0.to(a.dtype)

    def to_epsilon(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that a prediction implies, float32 at least."""
        a, s = self.coefficients(t, x_t)
        if self.prediction_type == "epsilon":
            return prediction.to(a.dtype)
        if self.prediction_type == "v_prediction":
            return a * prediction + s * x_t
        return (x_t - a * prediction) / s

    def to_x_0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean latent that a prediction implies, float32 at least. Undefined where alpha_bar_t = 0 with epsilon."""
        a, s = self.coefficients(t, x_t)
        if self.prediction_type == "epsilon":
            return (x_t - s * prediction) / a
        if self.prediction_type == "v_prediction":
            return a * x_t - s * prediction
        return prediction.to(a.dtype)

    def ddim_move(self, x: Tensor, epsilon: Tensor, t_from: Tensor, t_to: Tensor) -> Tensor:
        """``x`` [B, ...] carried from level ``t_from`` to ``t_to`` (each [B], either way) along a given noise; float32 at least.

        Downwards this is a DDIM step with eta = 0, upwards an inversion: ``a' / a (x - s eps) + s' eps``.
        """
        a_from, s_from = self.coefficients(t_from, x)
        a_to, s_to = self.coefficients(t_to, x)
        return a_to * ((x - s_from * epsilon) / a_from) + s_to * epsilon

    def ddim_deviation(self, t: Tensor, t_previous: Tensor, like: Tensor) -> Tensor:
        """Standard deviation of the step at eta = 1, [B, 1, ...] to scale ``like`` [B, ...]. Zero where t' is truly clean."""
        wide = _widest(like)  # at small t, 1 - alpha_bar_t / alpha_bar_t' is a small difference of numbers near 1
        now, previous = self._at(t, like, wide), self._at(t_previous, like, wide)
        variance = (1.0 - previous) / (1.0 - now) * (1.0 - now / previous)
        return variance.clamp(min=0.0).sqrt().to(torch.promote_types(self.alpha_bar.dtype, like.dtype))

    def ddim_mean_and_deviation(
        self, x_t: Tensor, prediction: Tensor, t: Tensor, t_previous: Tensor, eta: float
    ) -> tuple[Tensor, Tensor]:
        """The Gaussian of x at ``t_previous``: its mean [B, ...] and deviation [B, 1, ...], float32 at least."""
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta lies between 0 (deterministic) and 1 (ancestral); got {eta}")
        a_previous, s_previous = self.coefficients(t_previous, x_t)
        deviation = eta * self.ddim_deviation(t, t_previous, x_t)
        direction = (s_previous.square() - deviation.square()).clamp(min=0.0).sqrt()
        x_0, epsilon = self.to_x_0(prediction, x_t, t), self.to_epsilon(prediction, x_t, t)
        return a_previous * x_0 + direction * epsilon, deviation

    def ddim_step(
        self, x_t: Tensor, prediction: Tensor, t: Tensor, t_previous: Tensor, eta: float, noise: Tensor | None = None
    ) -> Tensor:
        """x at ``t_previous`` [B, ...], float32 at least. ``noise`` [B, ...] is standard normal; eta = 0 needs none."""
        mean, deviation = self.ddim_mean_and_deviation(x_t, prediction, t, t_previous, eta)
        if noise is None:
            if eta:
                raise ValueError(f"a step with eta = {eta} is stochastic: give it noise")
            return mean
        return mean + deviation * noise

    def log_density(
        self, x_previous: Tensor, x_t: Tensor, prediction: Tensor, t: Tensor, t_previous: Tensor, eta: float, over: Over = "mean"
    ) -> Tensor:
        """log-density [B] of a stored ``x_previous`` under the step that a prediction implies, in float64 (float32 on MPS).

        ``over="mean"`` is the convention of the released D3PO and DDPO code, ``"sum"`` that of the papers: the log-density
        proper, larger by the number of dimensions. A step without noise has no density: nan (see ``has_noise``).
        """
        wide = _widest(x_t)
        mean, deviation = self.ddim_mean_and_deviation(x_t.to(wide), prediction.to(wide), t, t_previous, eta)
        return gaussian_log_density(x_previous.to(wide), mean, deviation, over)

    def has_noise(self, t: Tensor, t_previous: Tensor, eta: float) -> Tensor:
        """Which steps are stochastic, bool, in the shape of ``t``; the others have no density."""
        like = self.alpha_bar.new_zeros(t.numel(), dtype=torch.float64)
        return (eta * self.ddim_deviation(t.reshape(-1), t_previous.reshape(-1), like) > 0).reshape(t.shape).to(t.device)


def _widest(like: Tensor) -> torch.dtype:
    """float64, or float32 on MPS, which has no other."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def gaussian_log_density(x: Tensor, mean: Tensor, deviation: Tensor, over: Over = "mean") -> Tensor:
    """log N(x; mean, deviation^2) [B], the mean or the sum over all dimensions but the first; nan where deviation is 0."""
    if over not in get_args(Over):
        raise ValueError(f"over is one of {get_args(Over)}; got {over!r}")
    each = -0.5 * ((x - mean) / deviation).square() - deviation.log() - 0.5 * math.log(2.0 * math.pi)
    each = torch.where(deviation > 0, each, math.nan).flatten(1)
    return each.mean(dim=1) if over == "mean" else each.sum(dim=1)


# -------------------------------------------------------------------------------------------------------- Grids of time


def timestep_grid(
    train_steps: int, steps: int, spacing: Spacing = "leading", offset: int = 0, *, leave_out_last: bool = False
) -> Tensor:
    """The levels [S] that a sampler visits, int64, from noise to image; spacings as in arXiv 2305.08891, table 2.

    ``leading``   multiples of T // S, shifted up by ``offset`` (1 for SD1.5);
    ``trailing``  T - 1 first, then down by T / S;
    ``linspace``  S points from T - 1 to 0.

    ``leave_out_last`` lays S + 1 points and leaves out the lowest (leading, linspace): Diffusers' DPM-Solver does so.
    """
    if not 1 <= steps <= train_steps:
        raise ValueError(f"steps lie between 1 and the {train_steps} of training; got {steps}")
    points = steps + leave_out_last
    if spacing == "leading":
        grid = np.arange(points)[::-1] * (train_steps // points) + offset
    elif spacing == "trailing":
        grid = np.round(np.arange(train_steps, 0, -train_steps / steps)) - 1
    elif spacing == "linspace":
        grid = np.linspace(0 if points > 1 else train_steps - 1, train_steps - 1, points).round()[::-1]
    else:
        raise ValueError(f"spacing is one of {get_args(Spacing)}; got {spacing!r}")
    if grid[0] >= train_steps:
        first = f"{steps} steps shifted by {offset} begins at {int(grid[0])}"
        raise ValueError(f"a grid of {first}; training ended at {train_steps - 1}")
    return torch.from_numpy(grid[:steps].astype(np.int64))


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
