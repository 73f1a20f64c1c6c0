"""Diffusion-DRO: Wu et al. 2025, "Ranking-based Preference Optimization for Diffusion Models from Implicit User Feedback",
arXiv 2510.18353.

Max-margin inverse reinforcement learning. Experts are well-liked pictures; what they are compared with are steps of the
policy's own trajectories, for the same prompt and at the same t:

    E    = |eps' - policy(x'_t)|^2 - |eps' - reference(x'_t)|^2        x'_t = the expert, noised with eps'
    Q    = |e - policy(x_t)|^2     - |e - reference(x_t)|^2             x_t on a trajectory, e what was predicted there
    loss = max(0, m + E - Q)                                              m = 0.001, means over C, H, W

In our frame: source = data-set pictures and a replay buffer (``sources.policy_steps``); reference = the frozen start;
likelihood = denoising error; loss = a hinge at m, or any other of ``losses`` by ``--loss``. Experts are chosen beforehand:
``diffalign relabel --top 500`` (by HPSv2 or PickScore in the paper).

**With ``refresh`` M = 1, as in the paper and its code, Q has no gradient.** The trajectory then comes from the very weights that
are being trained, so e - policy(x_t) = 0: its square is at its minimum. What is left is SFT on the experts, switched off where
the margin is met. The metric ``policy_gap`` = |e - policy(x_t)|^2 shows it (zero at M = 1); M > 1 gives the term a gradient.
Always run SFT on the same experts beside it.

Departures of the released code (basiclab/DiffusionDRO) from what is done here:

* its gradient clipping does nothing (an exhausted iterator); here the loop clips, by ``max_grad_norm``;
* pure bfloat16 weights, moving average and reference error (one unit in the last place of an error of 0.1 is half the margin);
  here errors are float64;
* its sampler takes the first sample's noise levels for the whole batch (``Sampling.released``);
* it saves a buffer that cannot be loaded;
* the margin is written max(m, .) in the paper: the same up to a constant.

Numbers of the paper (SD1.5): m 0.001, M 1, 20 steps of DPM-Solver++ without guidance on grids shifted per trajectory, a buffer of
4 for micro-batches of 4, AdamW at 1e-4, 256 experts per step, 1600 steps, 20 % of the prompts dropped, 500 experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffalign import losses
from diffalign.health import denoising_health
from diffalign.learner import Learner, RunContext
from diffalign.likelihood import denoising, log_ratio, pair_errors
from diffalign.objectives import _pieces
from diffalign.objectives._about import PAIRS, PICTURES, About, Cost
from diffalign.objectives._denoising import DenoisingLosses, plainly_noised
from diffalign.objectives._family import LossChoice, refuse_extras, refuse_small_batches, refuse_unfit
from diffalign.protocols import Denoiser, Predictor
from diffalign.schedule import Schedule
from diffalign.settings import check_options, option
from diffalign.sources.policy_steps import PolicySteps, ReplayBatch
from diffalign.sources.rollout import Sampling, SolverName
from diffalign.types import FRAMING, NoisyPair, Outcome, against_sampled

ABOUT = About("2510.18353", "experts, and the policy's own steps", "frozen start", "margin", (PICTURES, PAIRS), takes_loss=True)


@dataclass(frozen=True)
class DiffusionDRO(LossChoice):
    """The objective. ``beta`` is only used by a ``loss`` other than the paper's."""

    about: ClassVar[About] = ABOUT
    loss: str = option(
        "margin", "loss on the two log-ratios; margin is the paper's, `diffalign objectives --losses` lists the others"
    )
    margin: float = option(0.001, "margin by which an expert must be preferred, in units of the mean error", ge=0)
    refresh: int = option(1, "M: optimizer steps between refreshes of the policy that walks", ge=1)
    walk_every: int = option(1, "optimizer steps between new trajectories; the buffer's are visited again in between", ge=1)
    buffer: int = option(0, "number of trajectories kept, per process; 0 keeps as many as are needed", ge=0)
    solver: SolverName = option("dpm-solver++", "solver of the trajectories: dpm-solver++ or ddim (without noise)")
    rollout_steps: int = option(20, "number of sampling steps of a trajectory", ge=1)
    guidance: float = option(1.0, "classifier-free guidance scale of a trajectory; 1 is none", ge=0)
    beta: float = option(2000.0, "strength of the tie to the reference, for losses other than margin; as in Diffusion-DPO", gt=0)

    def __post_init__(self) -> None:
        check_options(self)
        self.sampling  # noqa: B018  checks what it is made of
        if self.loss == "margin":
            refuse_extras(self, "margin")
        else:
            refuse_unfit(self.chosen(), {"ratio", "policy", "reference"})

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.rollout_steps, self.solver, 0.0, self.guidance, offset=0, perturbed=True)

    @property
    def cost(self) -> Cost:
        walking = self.rollout_steps * (1 if self.guidance == 1.0 else 2)
        return Cost(with_gradient=2, forward_only=2 + walking / self.walk_every)

    def learner(self, run: RunContext) -> Learner:
        """Raises UserError for a buffer smaller than a micro-batch, or a loss that needs scores or a baseline."""
        run.require(pairs="pictures with prompts (experts), or preference pairs")
        if self.loss != "margin":
            refuse_small_batches(self.chosen(), run)
        source = PolicySteps(run, self.sampling, self.buffer, self.refresh, self.walk_every)
        dpo = losses.load("dpo")
        held_out = DenoisingLosses(run.policy, run.start, plainly_noised, dpo, self.beta / 2)
        return Learner(
            source=source,
            losses=lambda batch: self(batch, run.policy, run.compared_with),
            validate=held_out.validate if run.kind == PAIRS else None,
            stateful=source.stateful,
            reference=run.reference,
        )

    def __call__(self, batch: ReplayBatch, policy: Denoiser, reference: Predictor) -> Outcome:
        """Losses [B] of experts against steps of the policy. One policy and one reference call."""
        pair = side_by_side(batch, policy.schedule)
        before, now = pair_errors(reference, pair), pair_errors(policy, pair)
        ratio = log_ratio(denoising(*now), denoising(*before))
        one = ratio.winner.new_ones(len(batch))
        if self.loss == "margin":
            loss = _pieces.dro(ratio, self.margin)
        else:
            loss = self.chosen()(losses.Evidence(one, ratio, denoising(*now), denoising(*before)), self.beta / 2)
        metrics = denoising_health(ratio, now, before, 1.0, one)
        active = (ratio.margin.detach() < self.margin).to(loss.dtype)
        return Outcome(loss, pair.t, {**metrics, "policy_gap": now[1].detach(), "active": active})


def side_by_side(batch: ReplayBatch, schedule: Schedule) -> NoisyPair:
    """The expert, noised to its step's t, as the winner; the step, with what was predicted there as target, as the loser."""
    r = batch.replayed
    prompt = {name: value for name, value in r.conditioning.items() if name != FRAMING}
    return NoisyPair(
        winner=schedule.add_noise(r.x_0, batch.noise, r.t),
        loser=r.x_t,
        winner_target=schedule.target(r.x_0, batch.noise, r.t),
        loser_target=r.prediction,
        t=r.t,
        error_weight=schedule.error_weight(r.t),
        conditioning=prompt,
        framing=against_sampled(r.conditioning.get(FRAMING)),
    )


Objective = DiffusionDRO
