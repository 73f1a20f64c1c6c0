"""The processes of a run: what one of them may ask the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


class Processes(Protocol):
    """The processes of a run. ``Alone`` is one; ``Together`` are several, by Accelerate."""

    rank: int
    world: int

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all entries on all processes, a scalar without gradient. All must call it with as many."""
        ...

    def gather(self, values: Tensor) -> Tensor:
        """[n, ...] -> [world * n, ...], by rank, without gradient."""
        ...

    def all(self, thing: Any) -> list[Any]:
        """Every process's ``thing`` (plain values and tensors), by rank, on every process."""
        ...


def turns(count: int, rank: int, world: int) -> list[tuple[int, bool]]:
    """Which of ``count`` things a process takes, and whether it is its turn. Every process takes as many, because a call of
    sharded weights is for all of them: who runs out takes one again that is another's."""
    return [(place % count, place < count) for place in range(rank, count + rank, world)]


@dataclass(frozen=True)
class Alone:
    """One process."""

    rank: int = 0
    world: int = 1

    def mean(self, values: Tensor) -> Tensor:
        return values.detach().mean()

    def gather(self, values: Tensor) -> Tensor:
        return values.detach()

    def all(self, thing: Any) -> list[Any]:
        return [thing]


class Together:
    """The processes of a run, by Accelerate."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.rank, self.world = accelerator.process_index, accelerator.num_processes

    def mean(self, values: Tensor) -> Tensor:
        return self._accelerator.reduce(values.detach().mean(), "mean")

    def gather(self, values: Tensor) -> Tensor:
        return self._accelerator.gather(values.detach())

    def all(self, thing: Any) -> list[Any]:
        out = [thing]
        if self.world > 1:
            out = [None] * self.world
            torch.distributed.all_gather_object(out, thing)
        return out
