"""SFT on the winners: the control that every comparison needs.

    loss = mean over C, H, W of (target - policy(x_t^w, t, c))^2

the training loss of the network itself (Ho et al. 2020, arXiv 2006.11239, eq. 14) on the preferred pictures. Diffusion-DPO's
paper has it as a baseline (arXiv 2311.12908, section 5, at a tenth of DPO's learning rate), and most of Diffusion-DRO's gain is
its gain. No reference, no loser, no beta. A tie counts with the picture that happens to be first.

In our frame: source = the winners of a data set; reference = nobody; likelihood = denoising error; loss = its negative.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from diffalign.health import denoising_health
from diffalign.learner import Learner, RunContext
from diffalign.likelihood import denoising, errors, log_ratio, pair_errors
from diffalign.objectives._about import PAIRS, PICTURES, About, Cost
from diffalign.protocols import Denoiser, Predictor
from diffalign.sources.dataset import noised, noised_winners
from diffalign.types import Outcome, PairBatch

ABOUT = About("2006.11239", "data set, winners", "nobody", "sft", (PAIRS, PICTURES), draws_ahead=True)


@dataclass(frozen=True)
class SFT:
    """The objective. It has no settings."""

    about: ClassVar[About] = ABOUT
    cost: ClassVar[Cost] = Cost(with_gradient=1, forward_only=0, at_once=1)

    def learner(self, run: RunContext) -> Learner:
        run.require(pairs="preference pairs, or pictures with prompts")
        return Learner(run.pairs, lambda b: self(b, run.policy), lambda b: self.validate(b, run.policy, run.start))

    def __call__(self, batch: PairBatch, policy: Denoiser) -> Outcome:
        """Denoising errors [B] of the winners in ``batch``. One policy call on B samples."""
        error = errors(policy, noised_winners(batch, policy.schedule))
        return Outcome(loss=error, t=batch.t, metrics={"winner_error": error.detach()})

    @torch.no_grad()
    def validate(self, batch: PairBatch, policy: Denoiser, start: Predictor) -> Outcome:
        """The same on held-out pairs, with margin, accuracy and drift against the frozen start (in units of the error)."""
        pair = noised(batch, policy.schedule)
        before, now = pair_errors(start, pair), pair_errors(policy, pair)
        ratio = log_ratio(denoising(*now), denoising(*before))
        return Outcome(loss=now[0], t=pair.t, metrics=denoising_health(ratio, now, before, 1.0, batch.label))


Objective = SFT
