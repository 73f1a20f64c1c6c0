"""Transformed log-ratios, for a policy that is tied to the reference by another divergence than reverse KL.

f-DPO: Wang et al. 2023, "Beyond Reverse KL", arXiv 2309.16240. The reward that a policy implies is beta f'(ratio), so that in
every loss the log-ratio rho becomes g(rho):

    reverse-kl   g = rho
    forward-kl   g = -exp(-rho)
    js           g = log sigma(rho)                   f' = log(2 r / (1 + r)) without the constant log 2
    alpha        g = exp((a - 1) rho) / (a - 1)       f' = (r^(a - 1) - 1) / (a - 1) without its constant; a -> 1 is reverse-kl

On likelihoods instead of ratios, ``alpha`` with a = 1 - alpha is the reward of AlphaPO (arXiv 2501.03884).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.types import LogRatio

Divergence = Literal["reverse-kl", "forward-kl", "js", "alpha"]

MOST = 80.0
"""Largest exponent in ``alpha``: e^80 is still a float32. (TRL has the same bound there, and none in forward-kl.)"""


def transformed(ratio: LogRatio, divergence: Divergence, alpha: float = 0.5, temper: float = 1.0) -> LogRatio:
    """``g(temper rho) / temper`` for both sides: put it where the log-ratios were.

    ``temper`` decides what counts as a large ratio. A true log-ratio of two diffusion models is in the thousands, its stand-in,
    a difference of mean errors, about 1e-3: in the one g saturates or overflows, in the other it is a straight line. With
    temper = beta (what ``Loss`` does) g acts on the same scale as the loss after it; temper = 1 is the papers' form.

    At rho = 0 the slope of g is 1, except for ``js``, where it is 1/2 (and tends to 1 for unlikely samples, to 0 for likely
    ones). Ties need no care: g rises, so that equal ratios stay equal.
    """
    if divergence == "alpha" and math.isclose(alpha, 1.0, abs_tol=1e-6):
        divergence = "reverse-kl"

    def g(rho: Tensor) -> Tensor:
        x = temper * rho
        if divergence == "forward-kl":
            return -torch.exp(-x) / temper
        if divergence == "js":
            return F.logsigmoid(x) / temper
        if divergence == "alpha":
            return torch.exp(((alpha - 1.0) * x).clamp(max=MOST)) / ((alpha - 1.0) * temper)
        return rho

    return LogRatio(winner=g(ratio.winner), loser=g(ratio.loser))
