"""An objective at work: what a run gives it, and what it gives the loop.

An objective is settings and mathematics. ``learner(run)`` puts it together with what one run has: a source of
micro-batches, the losses of one of them, and whatever must be saved so that the run can go on as if it had never stopped
(past checkpoints, a replay buffer, a round's start, a baseline). The loop knows nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from diffalign.checkpoint import Stateful
from diffalign.data.texts import TextLoader
from diffalign.errors import UserError
from diffalign.processes import OneProcess, Processes
from diffalign.protocols import Denoiser, LanguageModel, Predictor, TextPolicy
from diffalign.references import Snapshot
from diffalign.types import Conditioning, Outcome, PairBatch
from diffalign.weights import TrainedWeights

# ------------------------------------------------------------------------------------------------- what the loop calls


class Batch(Protocol):
    """A micro-batch of whatever the objective learns from. B = its length."""

    weight: Tensor  # [B]

    def __len__(self) -> int: ...

    def to(self, device: torch.device | str) -> Batch: ...


class Source(Protocol):
    """Where micro-batches come from."""

    def steps(self, start: int, stop: int) -> Iterator[Sequence[Batch]]:
        """The micro-batches of optimizer steps ``start`` to ``stop``, a list for each step.

        The loop takes a step when the one before it is done, so a source may sample from the policy as it is now.
        """
        ...


@dataclass(frozen=True)
class Learner:
    """An objective at work in one run."""

    source: Source
    losses: Callable[[Any], Outcome]
    """of a micro-batch, for training"""
    validate: Callable[[Any], Outcome] | None = None
    """of held-out pairs, without gradient and without a trace; None where pairs mean nothing to the objective"""
    stateful: Mapping[str, Stateful] = field(default_factory=dict)
    """what is saved with the run beside the weights"""
    reference: Snapshot | None = None
    """what training compares with, if it is to become the policy anew at the beginning of every round of the loop"""


# ----------------------------------------------------------------------------------------------------- what a run gives


class Prompts(Protocol):
    """Encoded prompts (``data.prompt_cache.PromptCache``, or the prompts of ``data.cache.PairCache``)."""

    prompts: Sequence[str]

    def __len__(self) -> int: ...

    def conditioning(self, index: int | None) -> Conditioning:
        """The conditioning of one prompt, without batch dimension; that of the empty prompt for None."""
        ...


class PairSource(Source, Protocol):
    """A source of ``PairBatch`` (``data.loader.PairLoader``)."""

    def steps(self, start: int, stop: int) -> Iterator[Sequence[PairBatch]]: ...


Judge = Callable[[Tensor, Sequence[int]], Tensor]
"""Clean latents [N, C, H, W] and the prompts' indices -> rewards [N, R] float64 on the CPU, larger is better."""


Kind = Literal["pairs", "pictures"]
"""The kind of a data set: two pictures for each prompt, or one, which then stands on both sides of its pair."""


@dataclass(frozen=True)
class RunContext:
    """What a run gives its objective. An objective calls ``require`` for what it needs and may be None."""

    policy: Denoiser
    weights: TrainedWeights
    start: Predictor  # the frozen start
    latent_shape: tuple[int, ...]  # (C, H, W)
    pairs: PairSource | None = None
    kind: Kind = "pairs"
    reference: Snapshot | None = None  # in training, instead of the frozen start: the policy when the loop's round began
    prompts: Prompts | None = None
    unconditional: Conditioning | None = None  # of the empty prompt, each [1, ...], on the device
    judge: Judge | None = None
    feedback: Any = None  # sources.stored.Stored: trajectories on disk that people have judged
    score_range: tuple[float, float] | None = None  # least and greatest score in the data set
    unscored: int = 0  # pairs to train on that have no scores, where others have
    batch_size: int = 1
    accumulation: int = 1
    sampling_batch: int = 16
    seed: int = 0
    device: torch.device | str = "cpu"
    processes: Processes = field(default_factory=OneProcess)

    @property
    def compared_with(self) -> Predictor:
        """The reference of training, for objectives that have no other of their own."""
        return self.start if self.reference is None else self.reference

    @property
    def global_batch(self) -> int:
        """Samples per optimizer step over all processes."""
        return self.batch_size * self.accumulation * self.processes.world

    def require(self, **reasons: str) -> None:
        """Raise UserError for each named field that is None; ``reasons`` say what it is."""
        if missing := [why for name, why in reasons.items() if getattr(self, name) is None]:
            raise UserError(f"This objective needs {'; and '.join(missing)}.")


@dataclass(frozen=True)
class TextRunContext:
    """What a run gives an objective that trains a language model on rewrites of prompts."""

    policy: TextPolicy
    weights: TrainedWeights
    start: LanguageModel  # the frozen start
    texts: TextLoader
    reference: Snapshot | None = None  # of training instead of the frozen start, as in ``RunContext``
    processes: Processes = field(default_factory=OneProcess)

    @property
    def compared_with(self) -> LanguageModel:
        """The reference of training."""
        return self.start if self.reference is None else self.reference

    @property
    def batch_size(self) -> int:
        return self.texts.batch_size


class Objective(Protocol):
    """Settings and mathematics of one paper, a frozen dataclass whose fields are its settings; ``objectives/`` has one per file,
    and ``objectives.register`` takes more."""

    @property
    def about(self) -> Any:
        """``objectives.About``: what it learns from and compares with. Of the class."""
        ...

    @property
    def cost(self) -> Any:
        """``objectives.Cost``: samples through the network for one pair."""
        ...

    def learner(self, run: Any) -> Learner:
        """``run``: ``RunContext``, or ``TextRunContext`` where the objective learns from rewrites."""
        ...
