"""The processes of a run, and how they exchange values and wait for each other.

They wait in two ways. The collectives of a step (``mean``, ``gather``, gradients, shares of weights) have the timeout of their
backend, ten minutes with NCCL: a process that is later than that counts as lost. Where one process fills a cache, judges, loads
or saves, the others wait for it in ``all_gather_object``, which goes from host to host over gloo and waits for ``PATIENCE``.
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
"""How long processes wait in ``all_gather_object`` for one that works; one that has ended is noticed at once."""


class Processes(Protocol):
    """The processes of a run. ``OneProcess`` is one; ``ManyProcesses`` are several, by Accelerate."""

    rank: int
    world: int

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all entries on all processes, [], without gradient. All must call it with equally many entries."""
        ...

    def gather(self, values: Tensor) -> Tensor:
        """[n, ...] -> [world * n, ...], by rank, without gradient."""
        ...

    def all_gather_object(self, value: Any) -> list[Any]:
        """The ``value`` (plain values and tensors) of every process, by rank, on every process. It may wait for ``PATIENCE``.

        Raises:
            UserError: another process has ended.
        """
        ...


def turns(count: int, rank: int, world: int) -> list[tuple[int, bool]]:
    """Which of ``count`` items process ``rank`` takes: (index, whether its result counts), one for each.

    Every process takes equally many, because all of them must take part in a call of sharded weights: one that runs out
    takes an item of another process again, whose result does not count.
    """
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

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value]


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

    def all_gather_object(self, value: Any) -> list[Any]:
        if self.world == 1:
            return [value]
        out = [None] * self.world
        try:
            distributed.all_gather_object(out, value, group=self._patient)
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
    """A block for work of one process, or checks that all of them make: an error in one is raised in all, at its end.

    Inside, no process may wait for another. It is not for long work that is shared: there a process should fail at once, and
    the others notice it when they next wait.

    Raises:
        UserError: the work failed on another process: with its message, if it was a ``UserError`` there.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    told = processes.all_gather_object(None if failed is None else _told(failed, processes.rank))
    if failed is not None:
        raise failed
    if reasons := [reason for reason in told if reason is not None]:
        raise UserError(reasons[0])


def _told(error: Exception, rank: int) -> str:
    return str(error) if isinstance(error, UserError) else f"Process {rank} failed with {type(error).__name__}: {error}"


def main_process_first(processes: Processes, work: Callable[[], Result]) -> Result:
    """The result of ``work``, which the main process does first; the others then find on the disk what it has written.

    Raises:
        UserError: it failed on the main process, and the others have not tried.
    """
    made: list[Result] = []
    with failing_together(processes):
        if processes.rank == 0:
            made.append(work())
    return made[0] if made else work()
