"""Pairs of a picture from the data set and one that an earlier checkpoint of the policy made for the same prompt.

SePPO (arXiv 2410.05255, algorithm 1): the checkpoints theta_0, theta_1, ... are all kept, one per round; at round k one of the
k earlier ones is drawn, makes the other picture and is the reference as well.

Everything is a function of the seed and the position: which checkpoint, and the noise of every picture. So the bank is all
that must be saved, and pictures made for a step need not outlive it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diffalign.data.draws import derived_seed
from diffalign.learner import RunContext
from diffalign.references import Snapshot
from diffalign.sharding import Gathered, is_main
from diffalign.sources.rollout import Sampling, rollout
from diffalign.types import PairBatch, against_sampled
from diffalign.weights import TrainedWeights, Weights

Choice = Literal["uniform", "first", "last"]
_STREAMS = {"round": 11, "picture": 12}


class Bank:
    """Weights of past moments, on the CPU, oldest first.

    Every moment is held once, however many processes there are: by the main process, which sends the one that is needed, or,
    where the weights are sharded, by all processes in shares.
    """

    copies_on_load = True

    def __init__(self, weights: TrainedWeights) -> None:
        self._weights, self._gathered = weights, Gathered()
        self._holds = weights.sharded or is_main()
        self._held: list[Weights | None] = []  # None where the main process has them

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, which: int) -> Weights:
        """The weights of moment ``which``, on the parameters' device. All processes must take the same one."""
        return self._weights.fetched(self._held[which])

    def append(self) -> None:
        """Add the weights as they are now."""
        self._held.append(self._weights.stored() if self._holds else None)

    def clear(self) -> None:
        self._held = []

    def collect(self) -> None:
        """Before sharded ones are saved, on all processes; on the device there is one moment at a time."""
        if self._weights.sharded:
            whole = [self._whole(stored) for stored in self._held]
            self._gathered.collect(whole if is_main() else [])

    def _whole(self, stored: Weights | None) -> Weights:
        one = Gathered()
        one.collect(self._weights.gathered(self._weights.fetched(stored)))
        return one.taken()

    def state_dict(self) -> dict[str, Any]:
        """In the main process."""
        return {"held": self._gathered.taken() if self._weights.sharded else [dict(weights) for weights in self._held]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._held = [self._weights.stored(weights) if self._holds else None for weights in state["held"]]


def chosen(choice: Choice, bank: int, round_: int, seed: int) -> int:
    """Which of the ``bank`` checkpoints that there are in round ``round_`` (from 0) makes the pictures."""
    if choice == "first":
        return 0
    if choice == "last":
        return bank - 1
    return int(np.random.default_rng([seed, _STREAMS["round"], round_]).integers(bank))


class SelfSampled:
    """``PairBatch`` whose loser is a sample of a past checkpoint; the winner is the data's. ``reference`` is that checkpoint.

    A round is ``round_steps`` optimizer steps. At its beginning the policy joins the bank and a checkpoint is drawn, among
    those up to and including the one that has just joined (in the first round there is no other). Losers of a whole step are
    sampled together, with the batch's own conditioning: for a dropped prompt the empty one.
    """

    def __init__(self, run: RunContext, sampling: Sampling, round_steps: int, choice: Choice) -> None:
        self._run, self._sampling, self._round_steps, self._choice = run, sampling, round_steps, choice
        self.bank, self.reference = Bank(run.weights), Snapshot(run.policy, run.weights)
        self._round: int | None = None

    def steps(self, start: int, stop: int) -> Iterator[Sequence[PairBatch]]:
        for step, batches in zip(range(start, stop), self._run.pairs.steps(start, stop), strict=True):
            round_, within = divmod(step, self._round_steps)
            if within == 0:
                self._join()
            if round_ != self._round:
                self._round = round_
                self.reference.become(self.bank[chosen(self._choice, len(self.bank), round_, self._run.seed)])
            yield self._with_losers(batches, step)

    def _join(self) -> None:
        """Add the policy as it is to the bank, if it may ever be drawn, and drop what no longer can be."""
        if self._choice == "first" and len(self.bank):
            return
        if self._choice == "last":
            self.bank.clear()
        self.bank.append()

    def _with_losers(self, batches: Sequence[PairBatch], step: int) -> Sequence[PairBatch]:
        run, sizes = self._run, [len(batch) for batch in batches]
        first = step * run.global_batch + run.processes.rank * sum(sizes)
        seeds = [derived_seed(run.seed, _STREAMS["picture"], first + i) for i in range(sum(sizes))]
        conditioning = {name: torch.cat([b.conditioning[name] for b in batches]) for name in batches[0].conditioning}
        made = rollout(
            self.reference,
            run.policy.schedule,
            conditioning,
            self._sampling,
            shape=run.latent_shape,
            seeds=seeds,
            unconditional=run.unconditional,
            batch_size=run.sampling_batch,
            device=run.device,
        )
        losers = made.final.to(batches[0].winner.dtype).split(sizes)
        return [_against(batch, loser) for batch, loser in zip(batches, losers, strict=True)]


def _against(batch: PairBatch, loser: Tensor) -> PairBatch:
    """The batch with other losers, which were sampled and lost for certain."""
    framing = None if batch.framing is None else against_sampled(batch.framing[:, 0])
    return replace(batch, loser=loser, label=torch.ones_like(batch.label), framing=framing)
