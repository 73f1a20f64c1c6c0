"""Diffusion-DPO: Wallace et al. 2023, "Diffusion Model Alignment Using Direct Preference Optimization", arXiv 2311.12908.

For a pair (x^w, x^l) with prompt c, one t and one eps for both sides:

    L_m^k = mean over C, H, W of (target - m(x_t^k, t, c))^2        m in {policy, reference}, k in {w, l}
    h     = -(beta/2) [ (L_policy^w - L_reference^w) - (L_policy^l - L_reference^l) ]
    loss  = -log sigma(h)

which is eq. 14 of the paper with T omega(lambda_t) folded into beta, and the mean instead of the sum.

In our frame: source = data set with a shared draw, reference = the frozen start, likelihood = denoising error,
loss = ``losses.dpo`` at beta/2, or any other of ``losses`` by ``--loss``.

Departures of the released code (SalesforceAIResearch/DiffusionDPO, train.py) from what is done here:

* it computes the reference's errors in half precision, which moves the logit by up to 0.3 at beta = 5000; here all four
  errors are float64;
* it flips and crops the two pictures of a pair independently; here once per pair;
* it drops ties; here they may be kept with label 1/2;
* its ``--input_perturbation`` gives the loser's x_t a noise that is not in its target; not offered here.

Flow models: the same formula on the velocity, and beta as ``schedule.FlowSchedule`` says (2000, or 100 to be cautious); the
setting ``error_as`` measures the four errors as those of eps instead, which multiplies them by (1 - sigma)^2.

Numbers of the paper: beta 2000 (SD1.5; the released launcher has 5000, also used for SDXL), AdamW at
(2000/beta) * 2.048e-5 (the paper prints e-8; the code's value is 1e-8 scaled by a batch of 2048), 2048 pairs per step, 2000
steps, linear warm-up, 20 % of the prompts dropped, gradient clipped at 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffalign.learner import Learner, RunContext
from diffalign.objectives._about import PAIRS, About, Cost
from diffalign.objectives._denoising import DenoisingLosses, cost_of, denoising_learner, plainly_noised
from diffalign.objectives._family import LossChoice
from diffalign.protocols import Denoiser, Predictor
from diffalign.settings import check_options, option
from diffalign.types import Outcome, PairBatch

ABOUT = About("2311.12908", "data set, shared noise", "frozen start", "dpo", (PAIRS,), takes_loss=True, draws_ahead=True)


@dataclass(frozen=True)
class DiffusionDPO(LossChoice):
    """The objective; ``beta`` is the paper's, for errors that are means over the latent's dimensions."""

    about: ClassVar[About] = ABOUT
    beta: float = option(2000.0, "strength of the tie to the reference; 2000 to 5000 in the paper", gt=0)

    def __post_init__(self) -> None:
        check_options(self)
        self.chosen()

    @property
    def cost(self) -> Cost:
        return cost_of(self.chosen())

    def learner(self, run: RunContext) -> Learner:
        run.require(pairs="preference pairs")
        return denoising_learner(run, plainly_noised, self.chosen(), self.beta / 2)

    def __call__(self, batch: PairBatch, policy: Denoiser, reference: Predictor) -> Outcome:
        """Losses [B] of the pairs in ``batch``, with margins, errors and drift. One policy and one reference call."""
        return DenoisingLosses(policy, reference, plainly_noised, self.chosen(), self.beta / 2)(batch, reference)


Objective = DiffusionDPO
