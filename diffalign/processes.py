"""The processes of a run: what one of them may ask the others.

They wait for each other in two ways. The collectives of a step (``mean``, ``gather``, gradients, shares of weights) have the
timeout of their backend, ten minutes with NCCL: whoever is later than that has been lost. Where one process fills a cache,
judges, loads or saves, the others wait for it in ``all``, which goes from host to host over gloo and has ``PATIENCE``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from torch import Tensor, distributed

from diffalign.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

Result = TypeVar("Result")
PATIENCE = timedelta(days=1)
"""How long processes wait in ``all`` for one that works; of one that has ended they hear at once."""


class Processes(Protocol):
    """The processes of a run. ``OneProcess`` is one; ``ManyProcesses`` are several, by Accelerate."""

    rank: int
    world: int

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all entries on all processes, a scalar without gradient. All must call it with as many."""
        ...

    def gather(self, values: Tensor) -> Tensor:
        """[n, ...] -> [world * n, ...], by rank, without gradient."""
        ...

    def all(self, thing: Any) -> list[Any]:
        """Every process's ``thing`` (plain values and tensors), by rank, on every process. They may wait long for each other.

        Raises:
            UserError: another process has ended.
        """
        ...


def turns(count: int, rank: int, world: int) -> list[tuple[int, bool]]:
    """Which of ``count`` things a process takes, and whether it is its turn. Every process takes as many, because a call of
    sharded weights is for all of them: who runs out takes one again that is another's."""
    return [(place % count, place < count) for place in range(rank, count + rank, world)]


@dataclass(frozen=True)
class OneProcess:
    """One process."""

    rank: int = 0
    world: int = 1

    def mean(self, values: Tensor) -> Tensor:
        return values.detach().mean()

    def gather(self, values: Tensor) -> Tensor:
        return values.detach()

    def all(self, thing: Any) -> list[Any]:
        return [thing]


class ManyProcesses:
    """The processes of a run, by Accelerate: all of them make it, the first time as soon as they have begun."""

    def __init__(self, state: Accelerator | PartialState) -> None:
        self.rank, self.world = state.process_index, state.num_processes
        self._patient = patient_group() if self.world > 1 else None

    def mean(self, values: Tensor) -> Tensor:
        from accelerate.utils import reduce

        return reduce(values.detach().mean(), "mean")

    def gather(self, values: Tensor) -> Tensor:
        from accelerate.utils import gather

        return gather(values.detach())

    def all(self, thing: Any) -> list[Any]:
        if self.world == 1:
            return [thing]
        out = [None] * self.world
        try:
            distributed.all_gather_object(out, thing, group=self._patient)
        except RuntimeError as error:
            raise UserError(
                f"Process {self.rank} waited for the others, and one of them has ended. What it said last is the reason; "
                f"heard of it: {' '.join(str(error).split())[:200]}"
            ) from error
        return out


_PATIENT: dict[Any, Any] = {}
"""The group for long waits by the default group beside which it was made; never more than one."""


def patient_group() -> Any:
    """All processes, from host to host over gloo: for long waits, and for what no device should hold. All ask the first time."""
    default = distributed.group.WORLD
    if default not in _PATIENT:
        _PATIENT.clear()
        _PATIENT[default] = distributed.new_group(backend="gloo", timeout=PATIENCE)
    return _PATIENT[default]


@contextmanager
def failing_together(processes: Processes) -> Iterator[None]:
    """Within: work of one process, or checks that all of them make. Whatever fails on one fails on all, at the end.

    Nobody may wait for another inside. It is not for long work of which each has a part: that should fail where it fails, at
    once, and the others hear of it when they next wait.

    Raises:
        UserError: the work failed on another process: with its message, if it was a ``UserError`` there.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    told = processes.all(None if failed is None else _told(failed, processes.rank))
    if failed is not None:
        raise failed
    if reasons := [reason for reason in told if reason is not None]:
        raise UserError(reasons[0])


def _told(error: Exception, rank: int) -> str:
    return str(error) if isinstance(error, UserError) else f"Process {rank} failed with {type(error).__name__}: {error}"


def main_first(processes: Processes, work: Callable[[], Result]) -> Result:
    """What ``work`` gives, done by the main process and then by the others, which find on the disk what it has written.

    Raises:
        UserError: it failed on the main process; nobody else has tried then.
    """
    made: list[Result] = []
    with failing_together(processes):
        if processes.rank == 0:
            made.append(work())
    return made[0] if made else work()
