"""Experts of a data set beside steps of the policy's own trajectories, from a replay buffer (Diffusion-DRO, arXiv 2510.18353).

For every expert of a step the policy (or a copy of it that is refreshed every M steps) walks one trajectory for the expert's
prompt; the newest ones are in the buffer. Each expert is then compared with one step of one of them, at the same t. All
trajectories of an optimizer step are made at once, in batches as large as the device likes.

Seeds belong to the visit of a row, so trajectories and steps are the same on any number of processes, as long as the buffer
holds no more than is needed. A larger buffer is each process's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.data.draws import derived_seed
from diffalign.errors import UserError
from diffalign.learner import RunContext
from diffalign.references import Snapshot
from diffalign.sharding import all_on_main
from diffalign.sources.replay import ReplayBuffer, Replayed
from diffalign.sources.rollout import Sampling, rollout
from diffalign.types import PairBatch, placed

_STREAMS = {"trajectory": 21, "step": 22}


@dataclass(frozen=True)
class ReplayBatch:
    """Experts and steps of the policy, side by side. B = its length."""

    replayed: Replayed
    noise: Tensor  # [B, C, H, W], the expert's
    weight: Tensor  # [B]

    def __len__(self) -> int:
        return len(self.weight)

    def to(self, device: torch.device | str) -> ReplayBatch:
        return ReplayBatch(self.replayed.to(device), placed(self.noise, device), placed(self.weight, device))


class PolicySteps:
    """``ReplayBatch`` for every ``PairBatch`` of the data set: its winners are the experts.

    With ``walk_every`` above 1 there are no new trajectories in the optimizer steps between: those in the buffer are visited
    again, with the experts that they were made for, at other steps of theirs.

    Raises:
        UserError: the buffer is too small for what is drawn from it.
    """

    def __init__(self, run: RunContext, sampling: Sampling, buffer: int, refresh: int, walk_every: int = 1) -> None:
        enough = run.batch_size * (1 if walk_every == 1 else run.accumulation)
        if buffer and buffer < enough:
            of = "a micro-batch" if walk_every == 1 else "the micro-batches of a step"
            raise UserError(f"A buffer of {buffer} trajectories is less than {of} of {enough}; 0 means as many.")
        self._run, self._sampling, self._refresh, self._walk_every = run, sampling, refresh, walk_every
        self._exact = buffer in (0, enough)  # every sample has a trajectory of its own
        self._buffer = ReplayBuffer(buffer or enough)
        self._delayed = Snapshot(run.policy, run.weights)
        self.buffer = GatheredBuffer(self._buffer, run)

    @property
    def stateful(self) -> dict[str, Any]:
        """The objects that are saved with the run, by name."""
        return {"buffer": self.buffer, "delayed": self._delayed}

    def steps(self, start: int, stop: int) -> Iterator[Sequence[ReplayBatch]]:
        for step, batches in zip(range(start, stop), self._run.pairs.steps(start, stop), strict=True):
            if step % self._refresh == 0:
                self._delayed.keep()
            yield self._replayed(batches, step)

    def _replayed(self, batches: Sequence[PairBatch], step: int) -> Sequence[ReplayBatch]:
        run, out = self._run, []
        first = step * run.global_batch + run.processes.rank * sum(len(b) for b in batches)
        walks = step % self._walk_every == 0 or not len(self._buffer)
        made = self._walked(batches, first) if walks else None
        for number, batch in enumerate(batches):
            n = len(batch)
            if made is not None:
                mine, made = made.rows(slice(0, n)), made.rows(slice(n, None))
                self._buffer.push(replace(mine, index=batch.index), batch.winner, batch.winner_conditioning, batch.weight)
            own = len(self._buffer) - n if walks else number * n  # the newest, or those that this place had before
            drawn = self._drawn(n, first, own)
            out.append(ReplayBatch(drawn, batch.noise, drawn.weight))
            first += n
        return out

    def _walked(self, batches: Sequence[PairBatch], first: int) -> Any:
        run = self._run
        conditioning = {name: torch.cat([b.conditioning[name] for b in batches]) for name in batches[0].conditioning}
        return rollout(
            self._delayed,
            run.policy.schedule,
            conditioning,
            self._sampling,
            shape=run.latent_shape,
            seeds=[derived_seed(run.seed, _STREAMS["trajectory"], first + i) for i in range(sum(len(b) for b in batches))],
            unconditional=run.unconditional,
            batch_size=run.sampling_batch,
            device=run.device,
        )

    def _drawn(self, n: int, first: int, own: int) -> Replayed:
        """One step each of ``n`` trajectories: of those from ``own`` on if there are no others to choose from, else of any."""
        held, steps = len(self._buffer), self._sampling.steps
        draws = [np.random.default_rng([self._run.seed, _STREAMS["step"], first + i]) for i in range(n)]
        at = torch.tensor([int(draw.integers(steps)) for draw in draws])
        any_of = not self._exact and held > n
        rows = torch.tensor([int(draw.integers(held)) for draw in draws]) if any_of else torch.arange(own, own + n)
        return self._buffer.at(rows, at)


class GatheredBuffer:
    """The buffers of all processes as one object to save, which only the main process holds.

    A resume with another number of processes deals the trajectories out by the samples' places in the step, if each sample has
    one of its own. Larger buffers were filled by each process's own draws: then the resume starts with empty ones.
    """

    copies_on_load = True

    def __init__(self, buffer: ReplayBuffer, run: RunContext) -> None:
        self._buffer, self._processes = buffer, run.processes
        self._ranks: list[dict[str, Any]] = []

    def collect(self) -> None:
        self._ranks = all_on_main(self._buffer.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """What was collected, handed out once: it is as large as all buffers."""
        ranks, self._ranks = self._ranks or [self._buffer.state_dict()], []
        return {"ranks": ranks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        ranks, rank, world = state["ranks"], self._processes.rank, self._processes.world
        if len(ranks) == world:
            self._buffer.load_state_dict(ranks[rank])
            return
        size = self._buffer.state_dict()["size"]
        held = [one["held"] for one in ranks if one["held"]]
        if held and sum(len(one["t"]) for one in held) == size * world:
            of_mine = slice(rank * size, (rank + 1) * size)
            mine = {name: torch.cat([one[name] for one in held])[of_mine].clone() for name in held[0]}
            self._buffer.load_state_dict({"size": size, "held": mine})
