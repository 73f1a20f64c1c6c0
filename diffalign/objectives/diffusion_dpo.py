"""Diffusion-DPO: Wallace et al. 2023, "Diffusion Model Alignment Using Direct Preference Optimization", arXiv 2311.12908.

For a pair (x^w, x^l) with prompt c, one t and one eps for both sides:

    L_m^k = mean over C, H, W of (target - m(x_t^k, t, c))^2        m in {policy, reference}, k in {w, l}
    h     = -(beta/2) [ (L_policy^w - L_reference^w) - (L_policy^l - L_reference^l) ]
    loss  = -log sigma(h)

which is eq. 14 of the paper with T omega(lambda_t) folded into beta, and the mean instead of the sum.

In our frame: source = data set with a shared draw, reference = the frozen start, likelihood = denoising error,
loss = ``losses.dpo`` at beta/2.

Departures of the released code (SalesforceAIResearch/DiffusionDPO, train.py) from what is done here:

* it computes the reference's errors in half precision, which moves the logit by up to 0.3 at beta = 5000; here all four
  errors are float64;
* it flips and crops the two pictures of a pair independently; here once per pair;
* it drops ties; here they may be kept with label 1/2;
* its ``--input_perturbation`` gives the loser's x_t a noise that is not in its target; not offered here.

Numbers of the paper: beta 2000 (SD1.5; the released launcher has 5000, also used for SDXL), AdamW at
(2000/beta) * 2.048e-5 (the paper prints e-8; the code's value is 1e-8 scaled by a batch of 2048), 2048 pairs per step, 2000
steps, linear warm-up, 20 % of the prompts dropped, gradient clipped at 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffalign import losses
from diffalign.health import denoising_health
from diffalign.likelihood import denoising, log_ratio, pair_errors
from diffalign.protocols import Denoiser, Predictor
from diffalign.settings import check_options, option
from diffalign.sources.dataset import noised
from diffalign.types import Outcome, PairBatch

PAPER = "arXiv 2311.12908"


@dataclass(frozen=True)
class DiffusionDPO:
    """The objective; ``beta`` is the paper's, for errors that are means over the latent's dimensions."""

    beta: float = option(2000.0, "strength of the tie to the reference; 2000 to 5000 in the paper", gt=0)

    def __post_init__(self) -> None:
        check_options(self)

    def __call__(self, batch: PairBatch, policy: Denoiser, reference: Predictor) -> Outcome:
        """Losses [B] of the pairs in ``batch``, with margins, errors and drift. One policy and one reference call."""
        pair = noised(batch, policy.schedule)
        reference_errors = pair_errors(reference, pair)  # first, so that its activations never meet the policy's
        policy_errors = pair_errors(policy, pair)
        ratio = log_ratio(denoising(*policy_errors), denoising(*reference_errors))
        loss = losses.dpo(ratio, batch.label, self.beta / 2)
        return Outcome(loss=loss, t=pair.t, metrics=denoising_health(ratio, policy_errors, reference_errors, self.beta / 2))


Objective = DiffusionDPO
