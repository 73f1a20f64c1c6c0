"""Rounds of on-line learning: the policy samples, somebody judges, and the policy learns from its own transitions.

D3PO (arXiv 2311.13231) and DDPO (arXiv 2305.13301) in turn sample with the policy as it is, and take the same transitions as
actions to be made likelier or not. Two trajectories are made for each prompt of a round, from the same x_T or not; or more, of
which the best and the worst are kept.

An optimizer step takes ``accumulation`` pairs per process with all their transitions, ``batch_size`` transitions to a
micro-batch, in a random order. Trajectories of a round are sampled together and with what learning needs later: the
log-density of each transition under the policy that made it, so that a reference which is the round's beginning costs
nothing any more. The frozen start as reference is called once per transition, in large batches.

Only the policy's weights at the beginning of the round are saved: the seeds decide everything else, and a resumed run samples
its round again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diffalign.data.draws import Order, derived_seed
from diffalign.errors import UserError
from diffalign.grids import steps_down
from diffalign.learner import Prompts, RunContext
from diffalign.processes import Processes
from diffalign.protocols import Predictor
from diffalign.references import Snapshot
from diffalign.schedule import Schedule
from diffalign.solvers import Guided
from diffalign.sources.rollout import Sampling, Trajectory, rollout
from diffalign.types import Conditioning, LogLikelihood, TransitionPair, placed

RoundReference = Literal["round", "start"]
_STREAMS = {"trajectory": 31, "start": 32, "order": 33}
_RULING = 0.5
"""Part of the gradient's energy above which one transition rules the others."""


# ------------------------------------------------------------------------------------------------------------- nouns


@dataclass(frozen=True)
class TransitionBatch:
    """The same steps of two trajectories, and what is known about them. B = transitions."""

    pair: TransitionPair
    reference: LogLikelihood  # [B] log-densities under the reference, mean over dimensions
    made_by: LogLikelihood  # [B] log-densities under the policy that made the trajectories
    label: Tensor  # [B] probability that the first trajectory is preferred: 1, 0, or 1/2
    rewards: Tensor  # [B, 2] of the two final pictures, the mean over the judges; NaN where people chose
    mean_reward: Tensor  # [B] the same over all that were sampled of the prompt: what the policy earns
    advantage: Tensor  # [B, 2] the rewards, normalised
    weight: Tensor  # [B]
    index: Tensor  # [B] int64, the prompt

    def __len__(self) -> int:
        return len(self.weight)

    def to(self, device: torch.device | str) -> TransitionBatch:
        return placed(self, device)


@dataclass(frozen=True)
class Rewards:
    """The judges' scores of this process's part of a round."""

    values: Tensor  # [N, 2, R] float64
    total: Tensor  # [N, 2] all judges in one number: their mean, of several in deviations of the round
    prompts: Sequence[int]  # N
    positions: Sequence[int]  # N, where each pair stands in the whole run
    round: int


Verdict = Callable[[Rewards, Processes], tuple[Tensor, Tensor]]
"""From rewards to labels [N] and advantages [N, 2]."""


@dataclass(frozen=True)
class JudgedPairs:
    """Pairs of trajectories with verdicts. N = pairs, S = transitions, R = judges."""

    first: Trajectory  # N
    second: Trajectory  # N, for the same prompts
    reference: tuple[Tensor, Tensor]  # [N, S] each
    label: Tensor  # [N]
    rewards: Tensor  # [N, 2]
    mean_reward: Tensor  # [N] over all candidates, of which the pair may be the best and the worst
    advantage: Tensor  # [N, 2]


# ------------------------------------------------------------------------------------------------------------- source


@dataclass(frozen=True)
class RoundPlan:
    """How large a round is and what is done with it."""

    pairs: int  # per round, over all processes
    epochs: int  # how often each of them is learnt from
    same_start: bool  # both trajectories of a pair from the same x_T
    reference: RoundReference
    candidates: int = 2  # trajectories for each pair; of more than two the best and the worst are the pair
    learnt: float = 1.0  # share of a trajectory's transitions, from the noisy end, that is learnt from


def refuse_broken_rounds(pairs: int, at_once: int) -> None:
    """Raises UserError if a round of ``pairs`` is not a whole number of optimizer steps of ``at_once``."""
    if pairs % at_once:
        raise UserError(
            f"A round of {pairs} pairs is not a whole number of optimizer steps of {at_once} pairs "
            "(accumulation times processes)."
        )


class Rounds:
    """``TransitionBatch`` from rounds of sampling and judging.

    Raises:
        UserError: there are no prompts or no judge, or a round is not a whole number of optimizer steps.
    """

    def __init__(self, run: RunContext, sampling: Sampling, plan: RoundPlan, verdict: Verdict) -> None:
        run.require(prompts="prompts to sample for", judge="a judge to reward pictures by (--reward)")
        self._at_once = run.accumulation * run.processes.world  # pairs per optimizer step
        refuse_broken_rounds(plan.pairs, self._at_once)
        if not sampling.stochastic:
            raise UserError("Transitions have a density only where they have noise: eta must be greater than 0.")
        self._run, self._sampling, self._plan, self._verdict = run, sampling, plan, verdict
        self._policy = Snapshot(run.policy, run.weights)  # as it was when the round began
        self._order = Order(len(run.prompts), run.seed)
        self._round: int | None = None
        self._judged: JudgedPairs

    @property
    def stateful(self) -> dict[str, Any]:
        """The objects that are saved with the run, by name."""
        return {"round": self._policy}

    def steps(self, start: int, stop: int) -> Iterator[Sequence[TransitionBatch]]:
        per_epoch = self._plan.pairs // self._at_once
        for step in range(start, stop):
            round_, within = divmod(step, per_epoch * self._plan.epochs)
            if within == 0:
                self._policy.keep()
            if round_ != self._round:
                self._round, self._judged = round_, self._sampled(round_)
            epoch, nth = divmod(within, per_epoch)
            share = int(_shuffled(self._run.seed, per_epoch, round_, epoch)[nth]) * self._run.accumulation
            pairs = range(share, share + self._run.accumulation)
            yield micro_batches(self._judged, pairs, self._run, step, self._plan.learnt)

    # ------------------------------------------------------------------------------------------ sampling and judging

    def _sampled(self, round_: int) -> JudgedPairs:
        """This process's pairs of a round, in the order of the optimizer steps that they are for."""
        run, acc, p = self._run, self._run.accumulation, self._run.processes
        mine = [s * self._at_once + p.rank * acc + a for s in range(self._plan.pairs // self._at_once) for a in range(acc)]
        positions = [round_ * self._plan.pairs + i for i in mine]
        prompts = [self._order.row(position) for position in positions]
        made = self._trajectories(positions, prompts)
        rewards = run.judge(made.final, prompts * self._plan.candidates).view(self._plan.candidates, len(mine), -1)
        total = on_one_scale(rewards, p)
        chosen = extremes(total)  # [2, N]
        kept = made.rows((chosen * len(mine) + torch.arange(len(mine))).flatten())
        first, second = (kept.rows(slice(k * len(mine), (k + 1) * len(mine))) for k in (0, 1))
        reference = self._reference_densities(kept)
        values, of_pair = rewards[chosen, torch.arange(len(mine))].transpose(0, 1), total[chosen, torch.arange(len(mine))].T
        label, advantage = self._verdict(Rewards(values, of_pair, prompts, positions, round_), p)
        earned = rewards.mean(dim=(0, 2))
        return JudgedPairs(first, second, reference.chunk(2), label, values.mean(dim=2), earned, advantage)

    def _trajectories(self, positions: Sequence[int], prompts: Sequence[int]) -> Trajectory:
        """All first ones, then all second ones, and so on."""
        run, seeds, starts = self._run, [], []
        for side in range(self._plan.candidates):
            seeds += [derived_seed(run.seed, _STREAMS["trajectory"], side, position) for position in positions]
            start = 0 if self._plan.same_start else side
            starts += [derived_seed(run.seed, _STREAMS["start"], start, position) for position in positions]
        return rollout(
            self._policy,
            run.policy.schedule,
            stacked(run.prompts, prompts),
            self._sampling,
            shape=run.latent_shape,
            seeds=seeds,
            start_seeds=starts,
            index=list(range(len(prompts))) * self._plan.candidates,
            unconditional=run.unconditional,
            batch_size=run.sampling_batch,
            device=run.device,
        ).labelled(torch.tensor(list(prompts) * self._plan.candidates))

    def _reference_densities(self, made: Trajectory) -> Tensor:
        """[2N, S]. The policy at the round's beginning made the trajectories: its densities are there already."""
        if self._plan.reference == "round":
            return made.log_density
        return densities(made, self._run.start, self._run, self._sampling, self._plan.learnt)


def on_one_scale(rewards: Tensor, processes: Processes) -> Tensor:
    """[K, N] from the rewards [K, N, R]: one judge's as they are; of several the mean, each in deviations of the whole round."""
    if rewards.shape[2] == 1:
        return rewards[..., 0]
    whole = torch.cat([part.flatten(0, 1) for part in processes.all_gather_object(rewards.to(torch.float64))])
    return ((rewards - whole.mean(dim=0)) / (whole.std(dim=0, correction=0) + 1e-6)).mean(dim=2)


def extremes(total: Tensor) -> Tensor:
    """[2, N] int64: of K candidates' rewards [K, N] the numbers of the best and the worst; of two, 0 and 1.

    Equal ones: the best is the first of them and the worst the last, so that a pair is never one trajectory twice.
    """
    if len(total) == 2:
        return torch.tensor([[0], [1]]).expand(2, total.shape[1])
    return torch.stack([total.argmax(dim=0), len(total) - 1 - total.flip(0).argmin(dim=0)])


def micro_batches(
    judged: JudgedPairs, pairs: Sequence[int], run: RunContext, step: int, learnt: float = 1.0
) -> list[TransitionBatch]:
    """The transitions of some ``pairs``, in an order of this step and process, ``batch_size`` at a time.

    Of the share ``learnt`` from the noisy end, those that have a density.
    """
    noisy = judged.first.has_noise[0]
    usable = noisy[: learnt_steps(len(noisy), learnt)].nonzero().flatten().tolist()
    items = [(pair, j) for pair in pairs for j in usable]
    items = [items[i] for i in _shuffled(run.seed, len(items), step, run.processes.rank)]
    chunks = [items[i : i + run.batch_size] for i in range(0, len(items), run.batch_size)]
    return [transitions(judged, chunk, run.prompts) for chunk in chunks]


def learnt_steps(transitions: int, share: float) -> int:
    """How many of a trajectory's transitions a share of them is, one at least; a half counts."""
    return max(1, math.floor(share * transitions + 0.5))


def ruling_transition(schedule: Schedule, sampling: Sampling, shape: tuple[int, ...], share: float) -> tuple[float, float] | None:
    """Whether one transition of those that are learnt from has most of the gradient's energy (``Schedule.gradient_shares``).

    Args:
        shape: of a latent, [C, H, W].
        share: of the transitions, from the noisy end, that is learnt from.

    Returns:
        Its part, and the largest share of the transitions in which none has more than half, or else the one in which none has
        as little; nan if that is no less. None where no transition has more than half, or there is but one.
    """
    grid = schedule.grid(sampling.steps, shape, sampling.spacing, sampling.offset)
    shares = schedule.gradient_shares(grid, steps_down(grid), sampling.eta)
    tops = [(shares[:count].max() / shares[:count].sum()).item() for count in range(1, len(shares) + 1)]
    learnt = learnt_steps(len(shares), share)
    part = tops[learnt - 1]
    if learnt == 1 or part <= _RULING:
        return None
    fewer = range(2, learnt)
    calm = max((count for count in fewer if tops[count - 1] <= _RULING), default=None)
    calm = calm or min((count for count in fewer if tops[count - 1] < part), key=lambda count: tops[count - 1], default=None)
    return part, calm / len(shares) if calm else math.nan


def transitions(judged: JudgedPairs, items: Sequence[tuple[int, int]], prompts: Prompts) -> TransitionBatch:
    """The batch of some (pair, transition)."""
    rows, at = torch.tensor([i for i, _ in items]), torch.tensor([j for _, j in items])
    one, two, index = judged.first, judged.second, judged.first.index[rows]
    pair = TransitionPair(
        winner=one.x[rows, at],
        loser=two.x[rows, at],
        winner_next=one.x[rows, at + 1],
        loser_next=two.x[rows, at + 1],
        t=one.t[rows, at],
        t_previous=one.t_previous[rows, at],
        conditioning=stacked(prompts, index.tolist()),
    )
    return TransitionBatch(
        pair=pair,
        reference=LogLikelihood(*(side[rows, at] for side in judged.reference)),
        made_by=LogLikelihood(one.log_density[rows, at], two.log_density[rows, at]),
        label=judged.label[rows],
        rewards=judged.rewards[rows],
        mean_reward=judged.mean_reward[rows],
        advantage=judged.advantage[rows],
        weight=torch.ones(len(items)),
        index=index,
    )


@torch.no_grad()
def densities(made: Trajectory, predictor: Predictor, run: RunContext, sampling: Sampling, learnt: float = 1.0) -> Tensor:
    """Log-densities [N, S] of the transitions of ``made`` under another model; 0 where one has no noise, or is not ``learnt``."""
    predictor = Guided(predictor, run.unconditional, sampling.guidance) if sampling.guidance != 1.0 else predictor
    schedule, out = run.policy.schedule, torch.zeros_like(made.log_density)
    items = made.has_noise[:, : learnt_steps(made.has_noise.shape[1], learnt)].nonzero()
    for low in range(0, len(items), run.sampling_batch):
        rows, at = items[low : low + run.sampling_batch].T
        out[rows, at] = _density(made, rows, at, predictor, schedule, run, sampling.eta).to(out)
    return out


def _density(
    made: Trajectory, rows: Tensor, at: Tensor, predictor: Predictor, schedule: Schedule, run: RunContext, eta: float
) -> Tensor:
    shown = made.x[rows, at], made.x[rows, at + 1], made.t[rows, at], made.t_previous[rows, at]
    x_t, x_next, t, t_previous = placed(shown, run.device)
    conditioning = placed(stacked(run.prompts, made.index[rows].tolist()), run.device)
    return schedule.log_density(x_next, x_t, predictor(x_t, t, conditioning), t, t_previous, eta).cpu()


def stacked(prompts: Prompts, index: Sequence[int]) -> Conditioning:
    """The conditioning [B, ...] of some prompts."""
    found = {i: prompts.conditioning(i) for i in dict.fromkeys(index)}
    return {name: torch.stack([found[i][name] for i in index]) for name in found[index[0]]}


def _shuffled(seed: int, n: int, *where: int) -> np.ndarray:
    return np.random.default_rng([seed, _STREAMS["order"], *where]).permutation(n)
