"""Diffusion-KTO: Li et al. 2024, "Aligning Diffusion Models by Optimizing Human Utility", arXiv 2404.04465.

Pictures are good or bad one by one; no two need the same prompt:

    rho  = - [ L_policy - L_reference ]                         of one picture
    z    = max(0, mean of rho over the batch)                   without gradient
    loss = 1 - U(+beta (rho - z))  where good,  1 - U(-beta (rho - z))  where bad               U = sigma

In our frame: source = a data set of pictures (or of pairs: the winner is good, the loser bad), noised; reference = the frozen
start; likelihood = denoising error; loss = ``losses.kto`` at beta, with other utilities by ``utility``.

``baseline``: ``batch`` is the released code's z above, over all processes; ``mismatched`` is the estimate that KTO (Ethayarajh
et al. 2024, arXiv 2402.01306) describes, from pictures with each other's prompts, at twice the cost; ``none`` is z = 0.

Departures of the released code (jacklishufan/diffusion-kto) from what is done here: it samples classes with a share of good ones
of 0.8 (weights do that here); a picture that has won some comparisons and lost others counts as good; its
``bce_offset=original`` does not clamp z.

Numbers of the paper: beta 1000 (with no factor 1/2), AdamW in 8 bits at 1e-7, 20,000 steps of batches of 8 with 200 of warm-up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from diffalign import losses
from diffalign.learner import Learner, RunContext
from diffalign.likelihood import errors
from diffalign.losses.unpaired import Utility, kto_unpaired
from diffalign.objectives._about import PAIRS, PICTURES, About, Cost
from diffalign.objectives._denoising import denoising_learner, plainly_noised
from diffalign.objectives._family import refuse_lone_samples
from diffalign.processes import Processes
from diffalign.protocols import Denoiser, Predictor
from diffalign.settings import check_options, option
from diffalign.sources.dataset import noised_winners
from diffalign.types import Outcome, PairBatch

ABOUT = About("2404.04465", "data set, one picture at a time", "frozen start", "kto", (PICTURES, PAIRS), draws_ahead=True)
BaselineName = Literal["batch", "mismatched", "none"]


@dataclass(frozen=True)
class KTO:
    """The objective; ``beta`` is the paper's, for errors that are means over the latent's dimensions."""

    about: ClassVar[About] = ABOUT
    beta: float = option(1000.0, "strength of the tie to the reference (Diffusion-DPO's would be twice that)", gt=0)
    utility: Utility = option("kahneman-tversky", "shape of the utility: " + ", ".join(get_args(Utility)))
    desirable_weight: float = option(1.0, "weight of good pictures", ge=0)
    undesirable_weight: float = option(1.0, "weight of bad pictures", ge=0)
    baseline: BaselineName = option("batch", "baseline of the log-ratios: batch, mismatched or none")

    def __post_init__(self) -> None:
        check_options(self)

    def _baseline(self) -> losses.Baseline:
        return {"batch": losses.BatchMean, "mismatched": losses.MismatchedMean, "none": losses.NoBaseline}[self.baseline]()

    def _loss(self) -> losses.Loss:
        weights = {"desirable_weight": self.desirable_weight, "undesirable_weight": self.undesirable_weight}
        return losses.load("kto", utility=self.utility, **weights)

    @property
    def cost(self) -> Cost:
        """The cost of a pair; a lone picture costs half. Each of two mismatched samples goes through both models."""
        return Cost(with_gradient=2, forward_only=2 + (4 if self.baseline == "mismatched" else 0))

    def learner(self, run: RunContext) -> Learner:
        run.require(pairs="pictures with a verdict, or preference pairs")
        if run.kind == PAIRS:
            return denoising_learner(run, plainly_noised, self._loss(), self.beta, baseline=self._baseline())
        z = self._baseline()
        refuse_lone_samples(z, run)
        return Learner(
            source=run.pairs,
            losses=lambda batch: self.unpaired(batch, run.policy, run.compared_with, z, run.processes),
            validate=None,
            stateful={"baseline": z},
            reference=run.reference,
        )

    def unpaired(
        self, batch: PairBatch, policy: Denoiser, reference: Predictor, z: losses.Baseline, processes: Processes
    ) -> Outcome:
        """Losses [B] of single pictures: the winners of ``batch``, whose labels are the probability of a good one."""
        noisy = noised_winners(batch, policy.schedule)
        rho = errors(reference, noisy) - (now := errors(policy, noisy))
        watched = rho.detach()
        if z.watches == "mismatched":
            others = {name: value.roll(1, dims=0) for name, value in batch.conditioning.items()}
            rolled = replace(noisy, conditioning={**noisy.conditioning, **others}, known=None)
            with torch.no_grad():
                watched = errors(reference, rolled) - errors(policy, rolled)
        z.update(processes.gather(watched))
        rest = (self.utility, self.desirable_weight, self.undesirable_weight)
        loss = kto_unpaired(rho, batch.label, self.beta, z.value.to(rho.device), *rest)
        return Outcome(
            loss=loss, t=batch.t, metrics=self._health(rho.detach() - z.value.to(rho.device), now.detach(), batch.label)
        )

    def _health(self, above: Tensor, error: Tensor, label: Tensor) -> dict[str, Tensor]:
        """``margin`` is how far a picture lies on its side of the baseline, ``winner_error`` its denoising error."""
        margin = (2.0 * label.to(above.dtype) - 1.0) * self.beta * above
        return {"margin": margin, "accuracy": 0.5 * (1.0 + margin.sign()), "winner_error": error}


Objective = KTO
