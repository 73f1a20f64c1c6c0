"""MaPO: Hong et al. 2024, "Margin-aware Preference Optimization for Aligning Diffusion Models without Reference",
arXiv 2406.06424.

    L^k  = mean over C, H, W of (target - policy(x_t^k, t, c))^2                      k in {w, l}
    q(L) = s L / (exp(s L) - 1)                                                        s = 0.5
    loss = L^w - weight log sigma( T (q(L^w) - q(L^l)) )                               weight = 0.1 (its beta), T = 1000

without a reference: half the forward passes and no second network. q falls as the error grows, so the second term wants the
winner's error below the loser's; the first is SFT.

In our frame: source = data set with a shared draw, reference = nobody, likelihood = denoising error, loss = ``losses.mapo``.

Departures of the released code (mapo-t2i/mapo, train.py) from what is done here: it forms exp(s L) - 1 by subtraction in
float32. (Diffusers' earlier "Diffusion-ORPO" has the ratio term with the wrong sign.)

Numbers of the paper (SDXL): AdamW at 1e-5 in 8 bits, 16 pairs per step, 2000 steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffalign import losses
from diffalign.learner import Learner, RunContext
from diffalign.objectives._about import PAIRS, About, Cost
from diffalign.objectives._denoising import DenoisingLosses, denoising_learner, plainly_noised
from diffalign.protocols import Denoiser, Predictor
from diffalign.settings import check_options, option
from diffalign.types import Outcome, PairBatch

ABOUT = About("2406.06424", "data set, shared noise", "nobody", "mapo", (PAIRS,), draws_ahead=True)


@dataclass(frozen=True)
class MaPO:
    """The objective."""

    about: ClassVar[About] = ABOUT
    weight: float = option(0.1, "weight of the ratio term against the denoising error; the paper's beta", gt=0)
    rate: float = option(0.5, "s, which makes a probability exp(-s L) of an error L", gt=0)
    sharpness: float = option(1000.0, "T, the factor on the difference of the two sides", gt=0)
    cost: ClassVar[Cost] = Cost(with_gradient=2, forward_only=0)

    def __post_init__(self) -> None:
        check_options(self)

    def _loss(self) -> losses.Loss:
        return losses.load("mapo", weight=self.weight, rate=self.rate)

    def learner(self, run: RunContext) -> Learner:
        run.require(pairs="preference pairs")
        return denoising_learner(run, plainly_noised, self._loss(), self.sharpness)

    def __call__(self, batch: PairBatch, policy: Denoiser, reference: Predictor) -> Outcome:
        """Losses [B] of the pairs in ``batch``. One policy call; ``reference`` is not asked."""
        return DenoisingLosses(policy, reference, plainly_noised, self._loss(), self.sharpness)(batch, reference)


Objective = MaPO
