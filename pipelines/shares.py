"""The division of work among the processes that ``accelerate launch`` or ``torchrun`` started."""

from __future__ import annotations

from collections.abc import Callable

from diffalign.processes import ManyProcesses, OneProcess, Processes


def started() -> Processes:
    """The processes that were started together, which may fail together from here on (``failing_together``): the first thing a
    command does that several of them can share.

    Raises:
        UserError: Accelerate is set to an engine that training is not written for, or that is missing.
    """
    import os

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return OneProcess()
    import torch
    from accelerate import PartialState

    from pipelines import devices

    devices.refuse_other_engines()  # before Accelerate fails for want of one
    return ManyProcesses(PartialState(cpu=not torch.accelerator.is_available()))  # by default it starts no group on a CPU


def processes() -> tuple[tuple[int, int], Callable[[], None], str | None]:
    """This process among those that ``accelerate launch`` started: (number, of how many), a barrier at which they may wait long,
    its device."""
    everyone = started()
    if everyone.world == 1:
        return (0, 1), lambda: None, None
    from accelerate import PartialState

    def wait() -> None:
        everyone.all_gather_object(None)

    return (everyone.rank, everyone.world), wait, str(PartialState().device)
