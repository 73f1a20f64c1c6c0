"""DDPO: Black et al. 2023, "Training Diffusion Models with Reinforcement Learning", arXiv 2305.13301: the on-line control.

No pairs and no reference: the policy gradient of a reward, with PPO's clipped ratio against the policy that sampled.

    A    = (r - mean) / deviation                       per prompt or over the round, within +-5
    q    = exp( log p_policy(x_next | x_t, c) - log p_sampler(x_next | x_t, c) )        mean over dimensions
    loss = max( -A q, -A clip(q) )                       q within [1 - 1e-4, 1 + 1e-4]

In our frame: source = rounds (``sources.rounds``), two trajectories per prompt from different x_T; likelihood = transition
density; the "reference" is the policy that sampled. A pair's loss is the mean over its two trajectories.

``baseline``: ``prompt`` normalises by the prompt's own rewards of the last rounds as soon as there are ``least`` of them (the
released code's tracker), ``round`` by the round's. ``candidates`` K > 2 samples K pictures of each prompt and learns from the
best and the worst (of two, what max-variance down-sampling keeps: Xu et al. 2025, arXiv 2504.13818); their advantages are
measured among what is kept. ``timestep_fraction`` leaves out the last transitions, whose gradients are the largest (``d3po``
says why).

Numbers of the released code (kvablack/ddpo-pytorch; SD1.4): 50 steps of DDIM with eta 1 and guidance 5, AdamW at 3e-4 with weight
decay 1e-4, LoRA of rank 4, 256 samples per round, 2 optimizer steps each, a tracker of 16 to 32 rewards per prompt.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffalign.learner import Learner, RunContext
from diffalign.likelihood import transition
from diffalign.objectives import _pieces
from diffalign.objectives._about import PROMPTS, About, Cost
from diffalign.processes import Processes
from diffalign.protocols import Denoiser, Predictor
from diffalign.settings import check_options, option
from diffalign.solvers import Guided
from diffalign.sources.rollout import Sampling
from diffalign.sources.rounds import Rewards, RoundPlan, Rounds, TransitionBatch, learnt_steps
from diffalign.types import Conditioning, LogLikelihood, Outcome, widest

ABOUT = About("2305.13301", "rounds of its own trajectories", "the policy that sampled", "ppo", (PROMPTS,), "needed")


@dataclass(frozen=True)
class DDPO:
    """The objective."""

    about: ClassVar[About] = ABOUT
    clip: float = option(1e-4, "clip range: distance from 1 at which a ratio loses its gradient", gt=0)
    clip_advantage: float = option(5.0, "bound of the advantages", gt=0)
    baseline: Literal["prompt", "round"] = option("prompt", "group in which rewards are normalised: prompt or round")
    tracked: int = option(32, "number of rewards remembered per prompt", ge=2)
    least: int = option(16, "number of rewards of a prompt from which on its own statistics are used", ge=2)
    round_pairs: int = option(128, "number of pairs of trajectories per round, over all processes", ge=1)
    round_epochs: int = option(1, "epochs over the trajectories of a round", ge=1)
    candidates: int = option(
        2, "number of pictures sampled for each prompt of a round, of which the best and the worst are kept", ge=2
    )
    rollout_steps: int = option(50, "number of sampling steps, each a transition of a trajectory", ge=1)
    timestep_fraction: float = option(1.0, "share of the transitions, from the noisy end, that is learnt from", gt=0, le=1)
    eta: float = option(1.0, "noise of each DDIM step as a multiple of DDPM's", gt=0, le=1)
    guidance: float = option(5.0, "classifier-free guidance scale, in sampling and in learning; 1 is none", ge=0)

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.rollout_steps, "ddim", self.eta, self.guidance)

    @property
    def cost(self) -> Cost:
        rows = 2 if self.guidance == 1.0 else 4
        learnt = rows * learnt_steps(self.rollout_steps, self.timestep_fraction)
        forward_only = rows * self.rollout_steps * self.candidates / 2
        return Cost(with_gradient=learnt * self.round_epochs, forward_only=forward_only, at_once=rows)

    def first_own(self, prompts: int) -> int:
        """The round, from 1, in which the first of so many prompts has ``least`` rewards; 1 where rounds are the baseline.

        A visit leaves two, and no prompt is visited again before all others were.
        """
        visits = math.ceil(self.least / 2) if self.baseline == "prompt" else 1
        return (visits - 1) * prompts // self.round_pairs + 1

    def learner(self, run: RunContext) -> Learner:
        plan = RoundPlan(self.round_pairs, self.round_epochs, False, "round", self.candidates, self.timestep_fraction)
        tracker = PromptRewards(self.tracked, self.least if self.baseline == "prompt" else None)
        source = Rounds(run, self.sampling, plan, tracker)
        stateful = {**source.stateful, "rewards": tracker}
        return Learner(source, lambda batch: self(batch, run.policy, run.unconditional), None, stateful)

    def __call__(self, batch: TransitionBatch, policy: Denoiser, unconditional: Conditioning | None = None) -> Outcome:
        """Losses [B] of transitions of two trajectories. One policy call."""
        predictor: Predictor = policy if self.guidance == 1.0 else Guided(policy, unconditional, self.guidance)
        now = transition(predictor, policy.schedule, batch.pair, self.eta)
        both = [
            _pieces.ppo(density, old, advantage, self.clip, self.clip_advantage)
            for density, old, advantage in zip(
                (now.winner, now.loser), (batch.made_by.winner, batch.made_by.loser), batch.advantage.unbind(1), strict=True
            )
        ]
        loss = (both[0] + both[1]) / 2
        return Outcome(loss, batch.pair.t, self._health(now, batch))

    def _health(self, now: LogLikelihood, batch: TransitionBatch) -> dict[str, Tensor]:
        with torch.no_grad():
            wide = widest(now.winner)
            ratios = torch.stack([now.winner - batch.made_by.winner, now.loser - batch.made_by.loser], dim=1)
            outside = ((ratios.exp() - 1.0).abs() > self.clip).to(wide).mean(dim=1)
            advantage = batch.advantage.to(wide)
            margin = (ratios.to(wide) * advantage).mean(dim=1)
        return {
            "margin": margin,
            "clipped": outside,
            "advantage": advantage.abs().mean(dim=1),
            "reward": batch.mean_reward.to(wide),
        }


class PromptRewards:
    """Rewards of each prompt's last pictures, which new ones are measured against.

    ``least`` None measures against the round instead. A round that is judged twice, because a run was resumed in its middle,
    counts once.
    """

    def __init__(self, tracked: int, least: int | None) -> None:
        self._tracked, self._least = tracked, least
        self._round = -1
        self._before: dict[int, list[float]] = {}  # without the round
        self._held: dict[int, list[float]] = {}

    def __call__(self, judged: Rewards, processes: Processes) -> tuple[Tensor, Tensor]:
        """Label [N] (the larger reward) and advantage [N, 2], both from all judges in one number."""
        mine = judged.total  # [N, 2]
        everyone = torch.cat(
            processes.all_gather_object(mine.to(torch.float64))
        )  # [world * N, 2]; on the CPU, where NCCL gathers nothing
        mean, deviation = everyone.mean(), everyone.std(correction=0)
        if self._least is not None:
            self._remember(judged, everyone, processes)
        advantage = torch.stack([self._normalised(r, p, mean, deviation) for r, p in zip(mine, judged.prompts, strict=True)])
        return 0.5 + 0.5 * (mine[:, 0] - mine[:, 1]).sign(), advantage

    def _remember(self, judged: Rewards, everyone: Tensor, processes: Processes) -> None:
        if judged.round != self._round:
            self._round, self._before = judged.round, {p: list(r) for p, r in self._held.items()}
        where = torch.cat(processes.all_gather_object(torch.tensor([judged.positions, judged.prompts]).T))  # [world * N, 2]
        held = {p: deque(r, maxlen=self._tracked) for p, r in self._before.items()}
        for i in where[:, 0].argsort().tolist():  # by position, so that the number of processes does not matter
            held.setdefault(int(where[i, 1]), deque(maxlen=self._tracked)).extend(everyone[i].tolist())
        self._held = {p: list(r) for p, r in held.items()}

    def _normalised(self, rewards: Tensor, prompt: int, mean: Tensor, deviation: Tensor) -> Tensor:
        known = self._held.get(prompt, [])
        if self._least is not None and len(known) >= self._least:
            own = torch.tensor(known, dtype=torch.float64)
            mean, deviation = own.mean(), own.std(correction=0)
        return (rewards - mean) / (deviation + 1e-6)

    def state_dict(self) -> dict[str, Any]:
        return {"round": self._round, "before": self._before, "held": self._held}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._round, self._before, self._held = state["round"], state["before"], state["held"]


Objective = DDPO
