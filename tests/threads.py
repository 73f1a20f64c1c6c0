"""Processes of a run that are threads here (``learner.Processes``)."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier
from typing import Any


@dataclass(frozen=True)
class Process:
    """One of several that share a barrier and what each brings to it."""

    rank: int
    world: int
    barrier: Barrier
    brought: list[Any]

    def all_gather_object(self, value: Any) -> list[Any]:
        self.brought[self.rank] = value
        self.barrier.wait(60)
        found = list(self.brought)
        self.barrier.wait(60)
        return found


def in_threads(world: int, work: Callable[[Process], Any]) -> list[Any]:
    """What ``work`` returns for each of ``world`` processes; the first exception is raised when all have ended."""
    barrier, brought = Barrier(world), [None] * world
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(lambda rank: work(Process(rank, world, barrier, brought)), range(world)))
