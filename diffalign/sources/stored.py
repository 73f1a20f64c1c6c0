"""Pairs of stored trajectories that people have judged: D3PO's other source (arXiv 2311.13231, section 5).

An optimizer step takes ``accumulation`` pairs per process with all their transitions, as ``rounds`` does; pairs come in a seeded
order, every epoch in another one. Which pairs a step takes is a function of the seed and the step, so nothing has to be saved,
and any number of processes takes the same.

The reference is the model that made the trajectories (``round``): its densities lie beside them. Or the frozen start of the run
(``start``): it is called once for all transitions of a trajectory together, when the trajectory first occurs. A batch never
mixes trajectories, so these numbers do not depend on what a resumed run has met before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.data.draws import Order
from diffalign.differences import differences
from diffalign.errors import UserError
from diffalign.learner import RunContext
from diffalign.sources.choices import CHOICES, Choices, read_choices
from diffalign.sources.rollout import Sampling, Trajectory
from diffalign.sources.rounds import JudgedPairs, RoundReference, TransitionBatch, densities, micro_batches
from diffalign.sources.store import Store, schedule_fingerprint


class Stored:
    """Trajectories, and what was chosen among their pictures."""

    def __init__(self, store: Store, choices: Choices) -> None:
        self.store, self.choices = store, choices

    @classmethod
    def open(cls, where: str | Path) -> Stored:
        """A folder with ``choices.jsonl`` in it, or another file of choices in such a folder.

        Raises:
            UserError: there are no trajectories, or no choices, or not as they should be.
        """
        folder, file = located(where)
        store = Store.open(folder)
        return cls(store, read_choices(file, store.made))

    @property
    def prompts(self) -> tuple[str, ...]:
        """The run must give its objective these, encoded, in this order."""
        return self.store.made.prompts

    def stats(self) -> dict[str, Any]:
        """Counts of prompts, pictures and choices."""
        chosen, made = self.choices, self.store.made
        return {
            "pairs": len(chosen),
            "ties": chosen.ties,
            "equal_scores_skipped": chosen.skipped,
            "prompts_with_choices": len({made.group(first) for first, _ in chosen.pairs}),
            "lines_by_judges": chosen.judged,
            "prompts": len(made.prompts),
            "trajectories": len(made),
        }

    def fingerprint(self) -> dict[str, Any]:
        """Everything that a run which learns from them depends on, as plain values."""
        made = {name: value for name, value in self.store.made.to_plain().items() if name != "called"}
        return {"made": made, "choices": self.choices.sha256}

    def source(
        self, run: RunContext, sampling: Sampling, reference: RoundReference = "round", learnt: float = 1.0
    ) -> StoredPairs:
        """The pairs, as micro-batches. Raises UserError if ``sampling`` is not how the trajectories were made."""
        return StoredPairs(self, run, sampling, reference, learnt)


def located(where: str | Path) -> tuple[Path, Path]:
    """The folder of a rollout and the file with the choices, from either of them."""
    path = Path(where)
    return (path.parent, path) if path.suffix == ".jsonl" or path.is_file() else (path, path / CHOICES)


class StoredPairs:
    """``TransitionBatch`` from stored trajectories."""

    def __init__(
        self, stored: Stored, run: RunContext, sampling: Sampling, reference: RoundReference, learnt: float = 1.0
    ) -> None:
        run.require(prompts="the prompts of the stored trajectories")
        _check(stored, run, sampling)
        self._stored, self._run, self._sampling = stored, run, sampling
        self._reference, self._learnt = reference, learnt
        self._order = Order(len(stored.choices), run.seed)
        self._under_start: dict[int, Tensor] = {}  # [S] by trajectory

    def steps(self, start: int, stop: int) -> Iterator[Sequence[TransitionBatch]]:
        accumulation, processes = self._run.accumulation, self._run.processes
        for step in range(start, stop):
            first = (step * processes.world + processes.rank) * accumulation
            chosen = [self._order.row(first + a) for a in range(accumulation)]
            yield micro_batches(self._judged(chosen), range(accumulation), self._run, step, self._learnt)

    def _judged(self, which: Sequence[int]) -> JudgedPairs:
        choices = self._stored.choices
        sides = [[choices.pairs[i][side] for i in which] for side in (0, 1)]
        first, second = (self._stored.store.read(numbers) for numbers in sides)
        nobody = torch.zeros(len(which), 2, dtype=torch.float64)
        return JudgedPairs(
            first=first,
            second=second,
            reference=(self._densities(sides[0], first), self._densities(sides[1], second)),
            label=torch.tensor([choices.labels[i] for i in which], dtype=torch.float64),
            rewards=nobody + torch.nan,
            mean_reward=nobody[:, 0] + torch.nan,
            advantage=nobody,
        )

    def _densities(self, numbers: Sequence[int], made: Trajectory) -> Tensor:
        """[N, S] under the reference."""
        if self._reference == "round":
            return made.log_density
        for row, number in enumerate(numbers):
            if number not in self._under_start:
                found = densities(made.rows([row]), self._run.start, self._run, self._sampling, self._learnt)
                self._under_start[number] = found[0]
        return torch.stack([self._under_start[number] for number in numbers])


def _check(stored: Stored, run: RunContext, sampling: Sampling) -> None:
    """Raises UserError where the run's chain is not the stored one."""
    made, folder = stored.store.made, stored.store.folder
    if differing := differences(asdict(made.sampling), asdict(sampling)):
        raise UserError(
            f"The trajectories in {folder} were sampled otherwise than this objective would: {differing}. "
            "Leave these settings out (they are then taken from the trajectories), or roll out again."
        )
    if not sampling.stochastic:
        raise UserError(f"The trajectories in {folder} have no noise and so no density: roll out with eta greater than 0.")
    if differing := differences(made.schedule, schedule_fingerprint(run.policy.schedule)):
        raise UserError(f"The noise schedule of this run is not that of the trajectories in {folder}: {differing}.")
    if tuple(run.prompts.prompts) != made.prompts:
        raise ValueError("the prompts that the run gives are not those of the stored trajectories")
