"""The chain, forwards and backwards: the only file that indexes alpha_bar or sigma.

A schedule says how much of the signal and how much noise there is at every level t,

    x_t = a x_0 + s eps

and everything else follows from a and s:

    ``NoiseSchedule``   a = sqrt(alpha_bar_t), s = sqrt(1 - alpha_bar_t)    diffusion that preserves variance, a table of T steps
                        (DDPM, Ho et al. 2020, arXiv 2006.11239, eq. 4)
    ``FlowSchedule``    a = 1 - sigma, s = sigma = t / T                    rectified flow (Liu et al. 2022, arXiv 2209.03003),
                        conditional flow matching (Lipman et al. 2022, arXiv 2210.02747), SD3 (Esser et al. 2024, 2403.03206)

Networks answer in one of four parametrisations of the same thing:

    epsilon       eps
    v_prediction  a eps - s x_0, where a^2 + s^2 = 1            (Salimans & Ho 2022, arXiv 2202.00512, section 2.4)
    sample        x_0
    velocity      eps - x_0 = dx_t / dsigma, where a + s = 1    (flow matching)

Backwards, one step of DDIM (Song et al. 2020, arXiv 2010.02502, eq. 12 and 16) from t to an earlier t' is the Gaussian

    deviation  d = eta s' sqrt(1 - (a s' / (a' s))^2)
    mean       a' x_0 + sqrt(s'^2 - d^2) eps                     x_0, eps as predicted at (x_t, t)

It needs nothing but a and s, and keeps the marginals of any of them: x_t' is a' x_0 plus noise of deviation s' whatever eta is.

eta = 0 has no noise and no density; for a flow it is the Euler step x + (sigma' - sigma) v of the probability flow. eta = 1 is
what x_t' is under the forward process, given x_t and x_0 (for a table: the ancestral step of DDPM with its smaller variance; a
flow's is the same process on another clock). For a flow model it is the SDE to roll out with where log-densities are needed
(D3PO, DDPO). Flow-GRPO's (arXiv 2505.05470) is not offered: its Euler-Maruyama steps keep the marginals to first order only, and
its noise sqrt(t / (1 - t)) is infinite where every trajectory begins.

Where a = 0 (sigma = 1, or a table with zero terminal SNR), a step with eta = 1 keeps nothing of x_t but what the network saw in
it: trajectories that start from the same x_T share little more than their prompt. A smaller eta keeps sqrt(1 - eta^2) of it.

Shapes: B = batch; a latent is [B, ...] with any trailing dimensions; ``t`` is [B]: int64 in [-1, T) on a table, float32 in
[-1, T] for a flow. Below 0 is the clean end (0 is so too, for a flow). What alpha_bar is there is a convention of tables, see
``NoiseSchedule.clean_end``.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor

from diffalign.grids import FlowGrid, Sigmas, Spacing, perturbed_grid, timestep_grid
from diffalign.levels import LevelDistribution, Levels
from diffalign.types import widest

PredictionType = Literal["epsilon", "v_prediction", "sample", "velocity"]
ErrorAs = Literal["prediction", "epsilon", "v_prediction", "sample", "velocity"]
"""In which parametrisation a denoising error is measured; ``prediction`` is the network's own."""
CleanEnd = Literal["one", "first"]
"""How the log-densities of the dimensions of a latent become one number."""


class _Parametrisation(NamedTuple):
    """A combination of eps and x_0 that a network may predict, and the way back. ``said`` is the network's answer."""

    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of a, s, x_0, eps
    epsilon: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of a, s, x_t, said
    x_0: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of a, s, x_t, said
    reach: Callable[[Tensor, Tensor], Tensor]  # of a, s: see ``Schedule.error_weight``


_PARAMETRISATIONS: dict[str, _Parametrisation] = {
    "epsilon": _Parametrisation(
        target=lambda a, s, x_0, epsilon: epsilon.to(a.dtype),
        epsilon=lambda a, s, x_t, said: said.to(a.dtype),
        x_0=lambda a, s, x_t, said: (x_t - s * said) / a,
        reach=lambda a, s: a,
    ),
    "v_prediction": _Parametrisation(
        target=lambda a, s, x_0, epsilon: a * epsilon - s * x_0,
        epsilon=lambda a, s, x_t, said: a * said + s * x_t,
        x_0=lambda a, s, x_t, said: a * x_t - s * said,
        reach=lambda a, s: a.square() + s.square(),
    ),
    "sample": _Parametrisation(
        target=lambda a, s, x_0, epsilon: x_0.to(a.dtype),
        epsilon=lambda a, s, x_t, said: (x_t - a * said) / s,
        x_0=lambda a, s, x_t, said: said.to(a.dtype),
        reach=lambda a, s: s,
    ),
    "velocity": _Parametrisation(
        target=lambda a, s, x_0, epsilon: epsilon.to(a.dtype) - x_0,
        epsilon=lambda a, s, x_t, said: x_t + a * said,
        x_0=lambda a, s, x_t, said: x_t - s * said,
        reach=lambda a, s: a + s,
    ),
}


class Schedule(ABC):
    """The common part of all chains. A concrete one is a frozen dataclass that defines a and s and how time runs."""

    prediction_type: PredictionType
    error_as: ErrorAs
    """what ``error_weight`` converts denoising errors to; a setting of the run, not of the model"""
    trained_levels: LevelDistribution
    """which levels the model was trained on, as its family recommends: what ``auto`` means"""
    predictions: ClassVar[tuple[PredictionType, ...]]
    """prediction types that there are under this schedule"""
    continuous: ClassVar[bool]
    """whether t is any number (float32) or the index of a step (int64)"""

    # ------------------------------------------------------------------------------------- what a concrete schedule says

    @abstractmethod
    def __len__(self) -> int:
        """T, the length of the time axis."""

    @abstractmethod
    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Signal ``a`` and noise ``s`` at ``t`` [B], as [B, 1, ...] to scale ``like`` [B, ...], float32 at least."""

    @abstractmethod
    def ddim_noise(self, t: Tensor, t_previous: Tensor, eta: float, like: Tensor) -> tuple[Tensor, Tensor]:
        """For a step from ``t`` to ``t_previous``, the deviation d of its new noise and the factor sqrt(s'^2 - d^2) on the old
        one, each [B, 1, ...] to scale ``like`` [B, ...], float32 at least. d is 0 where t' is truly clean."""

    @abstractmethod
    def direction(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """What a deterministic step holds fixed, [B, ...], float32 at least: the noise on a table, the velocity of a flow."""

    @abstractmethod
    def move(self, x: Tensor, direction: Tensor, t_from: Tensor, t_to: Tensor) -> Tensor:
        """``x`` [B, ...] carried from level ``t_from`` to ``t_to`` (each [B], either way) along a given ``direction``."""

    @abstractmethod
    def climb(self, end: float, steps: int) -> list[float]:
        """The levels of an inversion from the clean end to exactly ``end``, in equal strides of at most T / steps."""

    @abstractmethod
    def grid(self, steps: int, shape: tuple[int, ...], spacing: Spacing, offset: int) -> Tensor:
        """The levels [S] that a sampler visits for latents of ``shape`` [C, H, W]. A flow has a spacing of its own."""

    @abstractmethod
    def perturbed(self, steps: int, shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> Tensor:
        """A grid per generator [B, S], shifted by a draw from it, such that all levels are visited (Diffusion-DRO)."""

    @abstractmethod
    def ending(self, clean_end: CleanEnd) -> Self:
        """The same with another convention for the clean end. Raises ValueError if the schedule has no choice of it."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What a chain depends on beside the network, as plain values."""

    def _check(self) -> None:
        """Raise ValueError for a prediction type or ``error_as`` that this schedule does not have."""
        if self.prediction_type not in self.predictions:
            raise ValueError(f"prediction_type is one of {self.predictions}; got {self.prediction_type!r}")
        if self.error_as not in get_args(ErrorAs):
            raise ValueError(f"error_as is one of {get_args(ErrorAs)}; got {self.error_as!r}")

    # ---------------------------------------------------------------------------------------------------------- forwards

    def levels(self, distribution: LevelDistribution | None = None) -> Levels:
        """Training levels on this schedule's axis, by default as the model was trained."""
        return Levels(len(self), self.continuous, distribution or self.trained_levels)

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t for clean latents and noise, in the dtype of ``x_0``."""
        a, s = self.coefficients(t, x_0)
        return (a * x_0 + s * noise).to(x_0.dtype)

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The target of the network's prediction for this draw, [B, ...], float32 at least."""
        return _PARAMETRISATIONS[self.prediction_type].target(*self.coefficients(t, x_0), x_0, noise)

    def to_epsilon(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that a prediction implies, float32 at least. Undefined where s = 0 with ``sample``."""
        return _PARAMETRISATIONS[self.prediction_type].epsilon(*self.coefficients(t, x_t), x_t, prediction)

    def to_x_0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean latent that a prediction implies, float32 at least. Undefined where a = 0 with ``epsilon``."""
        return _PARAMETRISATIONS[self.prediction_type].x_0(*self.coefficients(t, x_t), x_t, prediction)

    def error_weight(self, t: Tensor) -> Tensor | None:
        """The factor [B] from a squared error of the prediction to one of ``error_as``, float64 (float32 on MPS); None for 1.

        x_t is given, so an error d_eps of the noise is one of -s/a d_eps of x_0, and all errors are multiples of each other: with
        ``reach`` = a (epsilon), a^2 + s^2 (v_prediction), s (sample), a + s (velocity), errors are proportional to their reach.

            v_prediction as epsilon   a^2 = alpha_bar                      velocity as epsilon   (1 - sigma)^2
            sample as epsilon         a^2 / s^2, the signal-to-noise ratio: unbounded towards the clean end
            epsilon as sample         s^2 / a^2: unbounded towards noise, infinite where a = 0
        """
        if self.error_as in ("prediction", self.prediction_type):
            return None
        like = torch.zeros(len(t), dtype=widest(t), device=t.device)
        a, s = self.coefficients(t, like)
        asked, own = (_PARAMETRISATIONS[name].reach(a, s) for name in (self.error_as, self.prediction_type))
        return (asked / own).square()

    # --------------------------------------------------------------------------------------------------------- backwards

    def ddim_move(self, x: Tensor, epsilon: Tensor, t_from: Tensor, t_to: Tensor) -> Tensor:
        """``x`` [B, ...] carried from level ``t_from`` to ``t_to`` (each [B], either way) along a given noise; float32 at least.

        Downwards this is a DDIM step with eta = 0, upwards an inversion: ``a' / a (x - s eps) + s' eps``. Undefined from a = 0.
        """
        a_from, s_from = self.coefficients(t_from, x)
        a_to, s_to = self.coefficients(t_to, x)
        return a_to * ((x - s_from * epsilon) / a_from) + s_to * epsilon

    def ddim_deviation(self, t: Tensor, t_previous: Tensor, like: Tensor) -> Tensor:
        """Standard deviation of the step at eta = 1, [B, 1, ...] to scale ``like`` [B, ...]. Zero where t' is truly clean."""
        return self.ddim_noise(t, t_previous, 1.0, like)[0]

    def ddim_mean_and_deviation(
        self, x_t: Tensor, prediction: Tensor, t: Tensor, t_previous: Tensor, eta: float
    ) -> tuple[Tensor, Tensor]:
        """The Gaussian of x at ``t_previous``: its mean [B, ...] and deviation [B, 1, ...], float32 at least."""
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta lies between 0 (deterministic) and 1 (ancestral); got {eta}")
        a_previous, _ = self.coefficients(t_previous, x_t)
        deviation, kept = self.ddim_noise(t, t_previous, eta, x_t)
        x_0, epsilon = self.to_x_0(prediction, x_t, t), self.to_epsilon(prediction, x_t, t)
        return a_previous * x_0 + kept * epsilon, deviation

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
        self, x_previous: Tensor, x_t: Tensor, prediction: Tensor, t: Tensor, t_previous: Tensor, eta: float
    ) -> Tensor:
        """log-density [B] of a stored ``x_previous`` under the step that a prediction implies, in float64 (float32 on MPS).

        It is the mean over dimensions, the convention of the released D3PO and DDPO code; the papers have the log-density
        proper, larger by the number of dimensions. A step without noise has no density: nan (see ``has_noise``).
        """
        wide = widest(x_t)
        mean, deviation = self.ddim_mean_and_deviation(x_t.to(wide), prediction.to(wide), t, t_previous, eta)
        return gaussian_log_density(x_previous.to(wide), mean, deviation)

    def has_noise(self, t: Tensor, t_previous: Tensor, eta: float) -> Tensor:
        """Which steps are stochastic, bool, in the shape of ``t``; the others have no density."""
        like = torch.zeros(t.numel(), dtype=torch.float64)
        deviation = self.ddim_deviation(t.reshape(-1).cpu(), t_previous.reshape(-1).cpu(), like)
        return (eta * deviation > 0).reshape(t.shape).to(t.device)

    def gradient_shares(self, t: Tensor, t_previous: Tensor, eta: float) -> Tensor:
        """How the energy of log-densities' gradients divides over transitions ``t`` [S] to ``t_previous`` [S]; float64, sum 1.

        Of the gradient with respect to the prediction, for samples that the model itself drew: with the mean linear in the
        prediction, mean = ... + c prediction, it is c / deviation times a standard normal. A step without noise has no share.
        """
        x, one = torch.zeros(len(t), 1, dtype=torch.float64), torch.ones(len(t), 1, dtype=torch.float64)
        at = (t.cpu(), t_previous.cpu(), eta)
        mean, deviation = self.ddim_mean_and_deviation(x, one, *at)
        c = mean - self.ddim_mean_and_deviation(x, 0 * one, *at)[0]
        energy = torch.where(deviation > 0, c / deviation, 0.0).square().flatten()
        return energy / energy.sum()


@dataclass(frozen=True)
class NoiseSchedule(Schedule):
    """alpha_bar at every step, and what the network predicts.

    The table is kept as given (float32 in Diffusers) and never cast below float32: in float16 ``1 - alpha_bar_0`` would be
    9.8e-4 instead of 8.5e-4.
    """

    alpha_bar: Tensor  # [T], decreasing, in [0, 1]
    prediction_type: PredictionType = "epsilon"
    clean_end: CleanEnd = "one"
    """alpha_bar at t = -1. ``one``: what a clean latent has. ``first``: alpha_bar[0], as Diffusers samples where a
    configuration says ``set_alpha_to_one: false`` (SD1.5, SDXL); clamping t' to 0, as D3PO and DDPO do, is the same."""
    error_as: ErrorAs = "prediction"
    trained_levels: LevelDistribution = LevelDistribution()
    predictions: ClassVar[tuple[PredictionType, ...]] = ("epsilon", "v_prediction", "sample")
    continuous: ClassVar[bool] = False
    _tables: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _ended: dict[CleanEnd, NoiseSchedule] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.alpha_bar.ndim != 1 or not self.alpha_bar.is_floating_point():
            raise ValueError(f"alpha_bar is a table [T] of floats; got shape {tuple(self.alpha_bar.shape)}")
        if not bool((self.alpha_bar[1:] <= self.alpha_bar[:-1]).all()):
            raise ValueError("alpha_bar must not increase with t")
        if self.clean_end not in get_args(CleanEnd):
            raise ValueError(f"clean_end is one of {get_args(CleanEnd)}; got {self.clean_end!r}")
        self._check()

    def __len__(self) -> int:
        """T, the number of training steps."""
        return len(self.alpha_bar)

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """``sqrt(alpha_bar_t)`` and ``sqrt(1 - alpha_bar_t)`` as [B, 1, ...] to scale ``like`` [B, ...], float32 at least."""
        _refuse_another_batch(t, like)
        dtype = torch.promote_types(self.alpha_bar.dtype, like.dtype)
        alpha_bar = self._at(t, like, dtype)
        return alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()

    def _at(self, t: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
        """alpha_bar_t as [B, 1, ...] on the device of ``like``."""
        table = self._table(like.device, dtype)
        return _beside(table[t.to(like.device).clamp(min=-1) + 1], like)

    def _table(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """alpha_bar [T + 1] from t = -1 on; brought to a GPU once, for the host would wait for it at every call."""
        if (table := self._tables.get((device, dtype))) is None:
            clean = self.alpha_bar[:1] if self.clean_end == "first" else torch.ones_like(self.alpha_bar[:1])
            table = torch.cat([clean, self.alpha_bar]).to(device=device, dtype=dtype)
            if device.type != "cpu":
                self._tables[device, dtype] = table
        return table

    def ddim_noise(self, t: Tensor, t_previous: Tensor, eta: float, like: Tensor) -> tuple[Tensor, Tensor]:
        """``eta sqrt( (1 - alpha_bar_t') / (1 - alpha_bar_t) (1 - alpha_bar_t / alpha_bar_t') )``, and what it leaves."""
        wide = widest(like)  # at small t, 1 - alpha_bar_t / alpha_bar_t' is a small difference of numbers near 1
        now, previous = self._at(t, like, wide), self._at(t_previous, like, wide)
        variance = (1.0 - previous) / (1.0 - now) * (1.0 - now / previous)
        deviation = eta * variance.clamp(min=0.0).sqrt().to(torch.promote_types(self.alpha_bar.dtype, like.dtype))
        _, s_previous = self.coefficients(t_previous, like)
        return deviation, (s_previous.square() - deviation.square()).clamp(min=0.0).sqrt()

    def direction(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise."""
        return self.to_epsilon(prediction, x_t, t)

    def move(self, x: Tensor, direction: Tensor, t_from: Tensor, t_to: Tensor) -> Tensor:
        """``ddim_move``."""
        return self.ddim_move(x, direction, t_from, t_to)

    def climb(self, end: float, steps: int) -> list[int]:
        """Steps from -1, the clean end, to ``end``."""
        strides = -((-(end + 1) * steps) // len(self))
        return [-1 + ((end + 1) * j + strides // 2) // strides for j in range(strides + 1)]

    def grid(self, steps: int, shape: tuple[int, ...], spacing: Spacing, offset: int) -> Tensor:
        """``timestep_grid``, int64, whatever the shape."""
        return timestep_grid(len(self), steps, spacing, offset)

    def perturbed(self, steps: int, shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> Tensor:
        """``perturbed_grid``, int64, by draws from [0, T // S)."""
        shift = torch.tensor([int(torch.randint(len(self) // steps, (), generator=g)) for g in generators])
        return perturbed_grid(len(self), steps, shift)

    def ending(self, clean_end: CleanEnd) -> NoiseSchedule:
        if clean_end == self.clean_end:
            return self
        return self._ended.setdefault(clean_end, replace(self, clean_end=clean_end))  # one for good, as it has tables, too

    def fingerprint(self) -> dict[str, Any]:
        table = hashlib.sha256(self.alpha_bar.double().cpu().numpy().tobytes()).hexdigest()
        return {
            "steps": len(self),
            "alpha_bar": table[:16],
            "prediction_type": self.prediction_type,
            "clean_end": self.clean_end,
        }


@dataclass(frozen=True)
class FlowSchedule(Schedule):
    """Straight paths from data to noise, ``x_t = (1 - sigma) x_0 + sigma eps`` at sigma = t / T.

    t is the ``timesteps`` of Diffusers' FlowMatchEulerDiscreteScheduler, any number in (0, T], float32: sigma = 1 is pure noise,
    t <= 0 is the clean end. Sigma is computed from it in float64. What a family calls time (t / T, 1 - t / T) is its own matter.

    beta of flow models. An error of the velocity is 1 / (1 - sigma)^2 times that of the noise (``error_weight``), so Diffusion-
    DPO's beta means more at noisy levels than it does for an epsilon network, and nowhere less. Released code has beta = 100
    (flow_grpo, where an issue advises 2000) and 2000 (Flow-Factory), both for means over dimensions; SimpleTuner has sums and
    finds beta itself. 2000 is a sensible start and 100 a cautious one. Flow-DPO (arXiv 2501.13918) reports that a constant beta
    does better than one that is weighted by (1 - sigma)^2 to agree with the epsilon form: hence ``error_as="prediction"`` by
    default, and ``"epsilon"`` to compare.
    """

    train_steps: int = 1000  # T
    prediction_type: PredictionType = "velocity"
    sigmas: Sigmas = FlowGrid()
    """how its sampler lays noise levels"""
    error_as: ErrorAs = "prediction"
    trained_levels: LevelDistribution = LevelDistribution("logit-normal")
    predictions: ClassVar[tuple[PredictionType, ...]] = ("velocity", "epsilon", "sample")
    continuous: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.train_steps < 1:
            raise ValueError(f"train_steps should be at least 1; got {self.train_steps}")
        if isinstance(self.sigmas, FlowGrid) and self.sigmas.train_steps != self.train_steps:
            raise ValueError(
                f"the grid was made for {self.sigmas.train_steps} steps of training, the schedule for {self.train_steps}"
            )
        self._check()

    def __len__(self) -> int:
        """T."""
        return self.train_steps

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """``1 - sigma`` and ``sigma`` as [B, 1, ...] to scale ``like`` [B, ...], float32 at least."""
        sigma = self._sigma(t, like)
        dtype = torch.promote_types(torch.float32, like.dtype)
        return (1.0 - sigma).to(dtype), sigma.to(dtype)

    def _sigma(self, t: Tensor, like: Tensor) -> Tensor:
        """[B, 1, ...] on the device of ``like``, in float64 (float32 on MPS).

        Raises:
            ValueError: beyond T, or not a number (looked at on the CPU only: elsewhere a look would be a stop).
        """
        _refuse_another_batch(t, like)
        if t.device.type == "cpu" and not bool((t <= self.train_steps).all()):
            raise ValueError(f"t lies between 0 and {self.train_steps}; got {t.tolist()}")
        return _beside((t.to(like.device, widest(like)) / self.train_steps).clamp(min=0.0), like)

    def ddim_noise(self, t: Tensor, t_previous: Tensor, eta: float, like: Tensor) -> tuple[Tensor, Tensor]:
        """``eta s' sqrt(1 - r^2)`` and ``s' sqrt(1 - eta^2 (1 - r^2))`` with r = a s' / (a' s), of which 1 - r^2 is written as a
        product that begins with sigma - sigma': short steps keep their digits, and nothing is left over where a = 0."""
        now, previous = self._sigma(t, like), self._sigma(t_previous, like)
        below = ((1.0 - previous) * now).clamp(min=1e-12)  # 0 only where there is nothing to go
        ratio = ((1.0 - now) * previous / below).clamp(max=1.0).masked_fill(now == previous, 1.0)
        rest = ((now - previous) * (now + previous - 2.0 * now * previous) / below.square()).clamp(min=0.0, max=1.0)
        dtype = torch.promote_types(torch.float32, like.dtype)
        kept = previous * (1.0 - eta**2 + (eta * ratio).square()).sqrt()
        return (previous * eta * rest.sqrt()).to(dtype), kept.to(dtype)

    def direction(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The velocity, which needs no level if it is what the network predicts."""
        if self.prediction_type == "velocity":
            return prediction.to(torch.promote_types(torch.float32, x_t.dtype))
        return self.to_epsilon(prediction, x_t, t) - self.to_x_0(prediction, x_t, t)

    def move(self, x: Tensor, direction: Tensor, t_from: Tensor, t_to: Tensor) -> Tensor:
        """``x + (sigma' - sigma) v``: a straight line, from anywhere to anywhere."""
        stride = self._sigma(t_to, x) - self._sigma(t_from, x)
        return x + stride.to(torch.promote_types(torch.float32, x.dtype)) * direction

    def climb(self, end: float, steps: int) -> list[float]:
        """Levels from 0, the clean end, to ``end``."""
        strides = max(1, math.ceil(end * steps / self.train_steps))
        return [end * j / strides for j in range(strides)] + [end]

    def grid(self, steps: int, shape: tuple[int, ...], spacing: Spacing = "leading", offset: int = 0) -> Tensor:
        """The sampler's own (``sigmas``), float32; ``spacing`` and ``offset`` are of tables and do nothing."""
        return self._as_t(self.sigmas.sigmas(steps, shape))

    def perturbed(self, steps: int, shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> Tensor:
        """1 - r/S, 1 - (1 + r)/S, ... (1 - r)/S with r drawn from [0, 1), bent as the sampler bends its line; float32.

        The counterpart of a table's perturbed grid: with r = 0 it is the line that FLUX's pipeline lays, and over r every level
        is visited. As there, a trajectory starts from pure noise at a level a little below it, up to 1/S before bending.
        """
        r = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
        line = (torch.arange(steps, 0, -1, dtype=torch.float64) - r[:, None]) / steps
        return self._as_t(self.sigmas.warped(line, steps, shape))

    def _as_t(self, sigma: Tensor) -> Tensor:
        """Rounded where Diffusers rounds, so that the network gets the same t."""
        return sigma.to(torch.float32) * self.train_steps

    def ending(self, clean_end: CleanEnd) -> FlowSchedule:
        if clean_end != "one":
            raise ValueError(f"a flow ends at x_0 itself; clean_end {clean_end!r} is a convention of tables of alpha_bar")
        return self

    def fingerprint(self) -> dict[str, Any]:
        return {"steps": len(self), "flow": asdict(self.sigmas), "prediction_type": self.prediction_type}


def _refuse_another_batch(t: Tensor, like: Tensor) -> None:
    if t.shape != like.shape[:1]:
        raise ValueError(f"t must hold one step per sample: got {tuple(t.shape)} for a batch of {like.shape[0]}")


def _beside(values: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, ...]."""
    return values.view(-1, *([1] * (like.ndim - 1)))


def gaussian_log_density(x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """log N(x; mean, deviation^2) [B], its mean over all dimensions but the first; nan where the deviation is 0."""
    each = -0.5 * ((x - mean) / deviation).square() - deviation.log() - 0.5 * math.log(2.0 * math.pi)
    return torch.where(deviation > 0, each, math.nan).flatten(1).mean(dim=1)
