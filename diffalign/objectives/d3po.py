"""D3PO: Yang et al. 2023, "Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model", arXiv 2311.13231.

Denoising is a chain of decisions, and the preference for a final picture is one for each of its transitions. Two trajectories
of the stochastic chain (DDIM with eta = 1, guidance inside) start from the same x_T; for each step, with clipped ratios,

    rho^k = log p_policy(x_next^k | x_t^k, c) - log p_reference(x_next^k | x_t^k, c)          mean over dimensions, k in {w, l}
    loss  = -log sigma( beta [ clip(rho^w) - clip(rho^l) ] )       clip: exp(rho) within [1 - 0.1, 1 + 0.1], each side by itself

The gradient of a side is zero where its ratio is outside the clip. A tie gives no gradient.

In our frame: source = rounds of sampling and judging (``sources.rounds``), or stored trajectories that people have judged
(``sources.stored``: ``diffalign rollout``, then ``--feedback``); reference = the policy at the round's beginning (the paper, and
its code for people's labels), or the frozen start (its code for rewards); likelihood = transition density; loss as above, or any
other of ``losses`` by ``--loss`` on the clipped ratios.

Who wins, by rewards of several judges: the one that is at least as good in all and better in one; otherwise it is a tie. With
``candidates`` K > 2 the pair are the best and the worst of K (the paper's study with people shows seven
pictures of a prompt). A sample costs a third of what learning from it costs, and the best and the worst of eight are two and a
half times as far apart as two are: where judges are cheap, that is where passes are best spent. Several judges are put on one
scale, in deviations of the round.

``timestep_fraction`` leaves out the last transitions. A density's gradient grows as its noise shrinks: on a grid of ten levels
the last two carry 94 % of the gradient's energy in the tiny world, and a short run is ruled by their noise (figures:
docs/measured.md). The released code has an option of that name, too; there it is a random subset.

A flow model is sampled by the same stochastic step, which keeps its marginals. It begins where there is no signal (a = 0), and
there a step with eta = 1 keeps nothing of x_T beyond what the network made of it: ``same_start`` binds a pair more closely with a
smaller ``eta``.

The paper has no clip (``clip=inf``) and the sum over dimensions instead of the mean: with the mean, a "ratio" is a geometric mean
per dimension, and with beta = 0.1 the sigmoid's argument stays within 0.02 of zero: a clipped linear difference.

Departures of the released code (yk7333/d3po) from what is done here:

* it shows each side, with both halves of the guidance, to policy and reference in calls of their own, at every step: four calls
  of two samples; here one call with four samples and a gradient, and none for a reference that is the round's beginning;
* its "DPOK" compares softmaxes over the batch; not offered here;
* in the last step it clamps t' to 0; so does a schedule whose configuration says ``set_alpha_to_one: false``. With another, the
  last step has no noise and no density, and is left out.

Numbers of the paper (SD1.5): beta 0.1, clip 0.1, 20 steps, guidance 5, AdamW at 3e-5 with weight decay 1e-4, one pair per step
and process with all its transitions, LoRA of rank 4, 400 rounds of 40 pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from diffalign import losses
from diffalign.learner import Learner, RunContext
from diffalign.likelihood import log_ratio, transition
from diffalign.objectives import _pieces
from diffalign.objectives._about import PROMPTS, About, Cost
from diffalign.objectives._family import LossChoice, refuse_extras, refuse_small_batches, refuse_unfit
from diffalign.processes import Processes
from diffalign.protocols import Denoiser, Predictor
from diffalign.settings import check_options, option
from diffalign.solvers import Guided
from diffalign.sources.rollout import Sampling
from diffalign.sources.rounds import Rewards, RoundPlan, RoundReference, Rounds, TransitionBatch, learnt_steps
from diffalign.types import Conditioning, LogRatio, Outcome, widest

ABOUT = About(
    "2311.13231", "rounds of its own trajectories", "round's beginning", "clipped", (PROMPTS,), "needed", takes_loss=True
)


@dataclass(frozen=True)
class D3PO(LossChoice):
    """The objective; ``beta`` is the paper's, for log-densities that are means over the latent's dimensions."""

    about: ClassVar[About] = ABOUT
    learns_from_people: ClassVar[bool] = True  # takes ``RunContext.feedback``
    loss: str = option(
        "clipped", "loss on the two log-ratios; clipped is the paper's, `diffalign objectives --losses` lists the others"
    )
    beta: float = option(0.1, "strength of the tie to the reference", gt=0)
    clip: float = option(0.1, "clip range: distance from 1 at which a side's ratio loses its gradient; inf is the paper's", gt=0)
    reference: RoundReference = option(
        "round", "reference model: the policy at the beginning of the round (round) or of the run (start)"
    )
    round_pairs: int = option(40, "number of pairs of trajectories per round, over all processes", ge=1)
    round_epochs: int = option(1, "epochs over the pairs of a round", ge=1)
    candidates: int = option(2, "number of trajectories sampled for each pair, of which the best and the worst are kept", ge=2)
    same_start: bool = option(True, "whether both trajectories of a pair start from the same x_T")
    rollout_steps: int = option(20, "number of sampling steps, each a transition of a trajectory", ge=1)
    timestep_fraction: float = option(1.0, "share of the transitions, from the noisy end, that is learnt from", gt=0, le=1)
    eta: float = option(1.0, "noise of each DDIM step as a multiple of DDPM's", gt=0, le=1)
    guidance: float = option(5.0, "classifier-free guidance scale, in sampling and in learning; 1 is none", ge=0)

    def __post_init__(self) -> None:
        check_options(self)
        if self.loss == "clipped":
            refuse_extras(self, "clipped")
        else:
            refuse_unfit(self.chosen(), {"ratio"})

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.rollout_steps, "ddim", self.eta, self.guidance)

    @property
    def cost(self) -> Cost:
        """Per pair of trajectories. Learning from a transition takes both sides, with and without the prompt."""
        rows = 1 if self.guidance == 1.0 else 2
        learnt = rows * learnt_steps(self.rollout_steps, self.timestep_fraction)
        forward_only = self._passes * self.candidates + (0 if self.reference == "round" else 2 * learnt)
        return Cost(with_gradient=2 * learnt * self.round_epochs, forward_only=forward_only, at_once=2 * rows)

    @property
    def cost_of_stored(self) -> Cost:
        """The same for a pair that was sampled before."""
        return replace(self.cost, forward_only=self.cost.forward_only - self.candidates * self._passes)

    @property
    def _passes(self) -> int:
        """Passes of the network for one trajectory."""
        return self.rollout_steps * (1 if self.guidance == 1.0 else 2)

    def learner(self, run: RunContext) -> Learner:
        if self.loss != "clipped":
            refuse_small_batches(self.chosen(), run)
        if run.feedback is not None:
            chosen = run.feedback.source(run, self.sampling, self.reference, self.timestep_fraction)
            return Learner(chosen, lambda batch: _without_reward(self(batch, run.policy, run.unconditional)))
        plan = RoundPlan(
            self.round_pairs, self.round_epochs, self.same_start, self.reference, self.candidates, self.timestep_fraction
        )
        source = Rounds(run, self.sampling, plan, dominance)
        return Learner(source, lambda batch: self(batch, run.policy, run.unconditional), None, source.stateful)

    def __call__(self, batch: TransitionBatch, policy: Denoiser, unconditional: Conditioning | None = None) -> Outcome:
        """Losses [B] of transitions. One policy call; the reference's densities come with the batch."""
        predictor: Predictor = policy if self.guidance == 1.0 else Guided(policy, unconditional, self.guidance)
        ratio = log_ratio(transition(predictor, policy.schedule, batch.pair, self.eta), batch.reference)
        if self.loss == "clipped":
            loss = _pieces.d3po(ratio, batch.label, self.beta, self.clip)
        else:
            loss = self.chosen()(losses.Evidence(batch.label, _pieces.clipped(ratio, self.clip)), self.beta)
        return Outcome(loss, batch.pair.t, transition_health(ratio, batch, self.clip, self.beta))


def dominance(judged: Rewards, processes: Processes) -> tuple[Tensor, Tensor]:
    """Label [N] of a round's pairs; no advantages."""
    return _pieces.dominance(judged.values[:, 0], judged.values[:, 1]), torch.zeros_like(judged.values[..., 0])


@torch.no_grad()
def transition_health(ratio: LogRatio, batch: TransitionBatch, clip: float, scale: float) -> dict[str, Tensor]:
    """``margin`` and ``accuracy`` towards the preferred side (ties aside), the share of ratios outside the clip, the reward."""
    sign = 2.0 * batch.label.to(ratio.margin.dtype) - 1.0
    margin = scale * sign * ratio.margin
    low = math.log1p(-clip) if clip < 1.0 else -math.inf
    wide = widest(sign)
    outside = sum(((side < low) | (side > math.log1p(clip))).to(wide) for side in (ratio.winner, ratio.loser)) / 2
    return {
        "margin": margin,
        "accuracy": 0.5 * (1.0 + margin.sign()),
        "clipped": outside,
        "tie": (sign == 0).to(wide),
        "reward": batch.mean_reward.to(wide),
    }


def _without_reward(outcome: Outcome) -> Outcome:
    """People choose; they give no rewards that could be watched."""
    return replace(outcome, metrics={name: value for name, value in outcome.metrics.items() if name != "reward"})


Objective = D3PO
