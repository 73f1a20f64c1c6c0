"""The forward process: the only file that indexes alpha_bar.

``x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps`` (DDPM, Ho et al. 2020, arXiv 2006.11239, eq. 4), with
T discrete steps. Networks answer in one of three parametrisations of the same thing:

    epsilon       eps
    v_prediction  sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0     (Salimans & Ho 2022, arXiv 2202.00512, section 2.4)
    sample        x_0

Shapes: B = batch; a latent is [B, ...] with any trailing dimensions; ``t`` is [B] int64 in [0, T).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample"]


@dataclass(frozen=True)
class NoiseSchedule:
    """alpha_bar at every step, and what the network predicts.

    The table is kept as given (float32 in Diffusers) and never cast below float32: in float16 ``1 - alpha_bar_0`` would be
    9.8e-4 instead of 8.5e-4.
    """

    alpha_bar: Tensor  # [T], decreasing, in [0, 1]
    prediction_type: PredictionType = "epsilon"

    def __post_init__(self) -> None:
        if self.alpha_bar.ndim != 1 or not self.alpha_bar.is_floating_point():
            raise ValueError(f"alpha_bar is a table [T] of floats; got shape {tuple(self.alpha_bar.shape)}")
        if not bool((self.alpha_bar[1:] <= self.alpha_bar[:-1]).all()):
            raise ValueError("alpha_bar must not increase with t")
        if self.prediction_type not in get_args(PredictionType):
            raise ValueError(f"prediction_type is one of {get_args(PredictionType)}; got {self.prediction_type!r}")

    def __len__(self) -> int:
        """T, the number of training steps."""
        return len(self.alpha_bar)

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """``sqrt(alpha_bar_t)`` and ``sqrt(1 - alpha_bar_t)`` as [B, 1, ...] to scale ``like`` [B, ...], float32 at least."""
        if t.shape != like.shape[:1]:
            raise ValueError(f"t must hold one step per sample: got {tuple(t.shape)} for a batch of {like.shape[0]}")
        dtype = torch.promote_types(self.alpha_bar.dtype, like.dtype)
        alpha_bar = self.alpha_bar.to(device=like.device, dtype=dtype)[t.to(like.device)]
        alpha_bar = alpha_bar.view(-1, *([1] * (like.ndim - 1)))
        return alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()

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
