"""IPO on denoising errors: Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences",
arXiv 2310.12036.

    h    = -(beta/2) [ (L_policy^w - L_reference^w) - (L_policy^l - L_reference^l) ]
    loss = (h - 1/2)^2

a margin to be met rather than exceeded, so that a pair that is always won stops pulling. ``losses.ipo`` at beta/2: the
constant 1/2 stands beside the scaled margin, hence beta means what it means in Diffusion-DPO.

In our frame: source = data set with a shared draw, reference = the frozen start, likelihood = denoising error.

Departure of released code: Diffusers' research script reads a setting that does not exist and stops; nothing else is public.
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

ABOUT = About("2310.12036", "data set, shared noise", "frozen start", "ipo", (PAIRS,), draws_ahead=True)


@dataclass(frozen=True)
class IPO:
    """The objective; ``beta`` as in Diffusion-DPO."""

    about: ClassVar[About] = ABOUT
    beta: float = option(2000.0, "strength of the tie to the reference", gt=0)
    cost: ClassVar[Cost] = Cost(with_gradient=2, forward_only=2)

    def __post_init__(self) -> None:
        check_options(self)

    def learner(self, run: RunContext) -> Learner:
        run.require(pairs="preference pairs")
        return denoising_learner(run, plainly_noised, losses.load("ipo"), self.beta / 2)

    def __call__(self, batch: PairBatch, policy: Denoiser, reference: Predictor) -> Outcome:
        """Losses [B] of the pairs in ``batch``."""
        return DenoisingLosses(policy, reference, plainly_noised, losses.load("ipo"), self.beta / 2)(batch, reference)


Objective = IPO
