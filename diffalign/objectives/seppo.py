"""SePPO: Zhang et al. 2024, "SePPO: Semi-Policy Preference Optimization for Diffusion Alignment", arXiv 2410.05255 (in its second
version SSPO, "Self-Sampling Preference Optimization").

Only preferred pictures are needed. The other one is made by an earlier checkpoint of the policy, which is the reference too.
Whether it is a loser is decided by the anchor, the preferred picture (the Anchor-based Adaptive Flipper, AAF):

    d^k  = L_policy^k - L_reference^k                                 k = w (data), s (sampled); one t and one eps for both
    s    = sign(-d^w)      +1: the policy is better on the anchor, the sample counts as a loser, as in DPO
                           -1: the reference is better, the sample is learnt as well
    loss = -log sigma( -(beta/2) (d^w - s d^s) )

``flipper``: ``sign`` as above; ``indicator`` drops the sampled side instead of learning it (the second version's wording; the
paper reports 21.56 against 21.57 PickScore); ``none`` always counts it as a loser (20.88, below SFT).

In our frame: source = a picture of the data set and a sample of a past checkpoint (``sources.past``); reference = that
checkpoint; likelihood = denoising error; loss = ``losses.dpo`` at beta/2, or any other of ``losses`` by ``--loss``, on (w, s l).

No training code was released, and the paper leaves much open. What we choose, and why:

* d^w = 0 (the first step of a round whose reference is the policy itself): s = +1, so that the rule has no third case;
  ``torch.sign`` would drop the sample, and the gradient of the first step with it. Differences below 1e-7 count as 0;
* t and eps are the same for the anchor and the sample, as in Diffusion-DPO; errors are means over dimensions, and beta is halved
  (Diffusion-DPO's convention, whose numbers the paper takes over);
* where the prompt is dropped, the sample is made without it, too;
* s is a constant: no gradient flows through it;
* the checkpoint is drawn once per round, not per batch, and for the whole run's processes alike: Algorithm 1 draws it at the
  head of its loop, and a checkpoint per batch would have to be in memory at once;
* the bank holds theta_0 ... theta_k in round k, so that the first round refers to theta_0 (Algorithm 1 draws from 0 ... k - 1
  with k counted from 1, which is the same); it does not forget, so a run has as many as it has rounds (the paper's: 7);
* pictures are made for the very prompts of each step, with noise of their own, rather than once per prompt and round;
* the sampler: DPM-Solver++ with 20 steps and guidance 7.5, what people sample SD1.5 with; the paper names none;
* beta and learning rate: Diffusion-DPO's.

Numbers of the paper: a checkpoint every 30 steps, 7 of them, 2048 pictures per step (SD1.5).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffalign import losses
from diffalign.health import denoising_health
from diffalign.learner import Learner, RunContext
from diffalign.likelihood import denoising, log_ratio, pair_errors
from diffalign.objectives._about import PAIRS, PICTURES, About, Cost
from diffalign.objectives._denoising import DenoisingLosses, plainly_noised
from diffalign.objectives._family import LossChoice, refuse_small_batches, refuse_unfit
from diffalign.protocols import Denoiser, Predictor
from diffalign.settings import check_options, option
from diffalign.sources.dataset import noised
from diffalign.sources.past import Choice, SelfSampled
from diffalign.sources.rollout import Sampling, SolverName
from diffalign.types import LogRatio, Outcome, PairBatch

ABOUT = About(
    "2410.05255", "data set, and samples of a past checkpoint", "that checkpoint", "dpo", (PICTURES, PAIRS), takes_loss=True
)
TIE = 1e-7
"""Log-ratios this near to zero count as zero: a policy that is still its own reference differs from it by rounding alone."""
Flip = Literal["sign", "indicator", "none"]


@dataclass(frozen=True)
class SePPO(LossChoice):
    """The objective; ``beta`` as in Diffusion-DPO."""

    about: ClassVar[About] = ABOUT
    beta: float = option(2000.0, "strength of the tie to the reference", gt=0)
    flipper: Flip = option("sign", "role of the sample where the reference is better on the anchor: sign, indicator or none")
    round_steps: int = option(30, "optimizer steps between checkpoints of the bank", ge=1)
    checkpoint: Choice = option("uniform", "past checkpoint that samples and is the reference: uniform, first or last")
    solver: SolverName = option("dpm-solver++", "solver that samples pictures: dpm-solver++ or ddim")
    rollout_steps: int = option(20, "number of sampling steps", ge=1)
    guidance: float = option(7.5, "classifier-free guidance scale of sampling", ge=0)

    def __post_init__(self) -> None:
        check_options(self)
        refuse_unfit(self.chosen(), {"ratio"})
        self.sampling  # noqa: B018  checks what it is made of

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.rollout_steps, self.solver, eta=0.0, guidance=self.guidance)

    def bank_after(self, steps: int) -> int:
        """How many checkpoints are kept after so many optimizer steps: all, where any of them may be drawn."""
        return math.ceil(steps / self.round_steps) if self.checkpoint == "uniform" else 1

    @property
    def cost(self) -> Cost:
        return Cost(with_gradient=2, forward_only=2 + self.rollout_steps * (1 if self.guidance == 1.0 else 2))

    def learner(self, run: RunContext) -> Learner:
        """Raises UserError for a loss that looks past the log-ratios: the flipper turns no more than one of them."""
        run.require(pairs="pictures with prompts, or preference pairs")
        refuse_small_batches(self.chosen(), run)
        source = SelfSampled(run, self.sampling, self.round_steps, self.checkpoint)
        plain = DenoisingLosses(run.policy, run.start, plainly_noised, self.chosen(), self.beta / 2)
        return Learner(
            source=source,
            losses=lambda batch: self(batch, run.policy, source.reference),
            validate=plain.validate if run.kind == PAIRS else None,
            stateful={"bank": source.bank},
        )

    def __call__(self, batch: PairBatch, policy: Denoiser, reference: Predictor) -> Outcome:
        """Losses [B] of pairs whose loser the reference made. One policy and one reference call."""
        pair = noised(batch, policy.schedule)
        before, now = pair_errors(reference, pair), pair_errors(policy, pair)
        ratio = log_ratio(denoising(*now), denoising(*before))
        sign = flipped_side(ratio.winner, self.flipper)
        evidence = losses.Evidence(batch.label, LogRatio(ratio.winner, sign * ratio.loser), denoising(*now), denoising(*before))
        health = denoising_health(ratio, now, before, self.beta / 2, batch.label)
        return Outcome(self.chosen()(evidence, self.beta / 2), pair.t, {**health, "flipped": 0.5 * (1.0 - sign)})


def flipped_side(winner: Tensor, flip: Flip) -> Tensor:
    """The factor s [B] on the sampled side, from the anchor's log-ratio [B]: 1 where the policy is at least as good there."""
    worse = winner.detach() < -TIE
    if flip == "none":
        return torch.ones_like(winner.detach())
    return torch.where(worse, -1.0 if flip == "sign" else 0.0, 1.0).to(winner.dtype)


Objective = SePPO
