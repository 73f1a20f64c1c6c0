"""Work shared out among the processes that ``accelerate launch`` or ``torchrun`` started."""

from __future__ import annotations

from collections.abc import Callable


def processes() -> tuple[tuple[int, int], Callable[[], None], str | None]:
    """This process among those that ``accelerate launch`` started: (number, of how many), a barrier, its device."""
    import os

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return (0, 1), lambda: None, None
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.accelerator.is_available())
    return (state.process_index, state.num_processes), state.wait_for_everyone, str(state.device)
