"""Two real gloo processes, forked from the one that runs the tests: what it has imported, they need not import again.

They find each other by the environment, as under ``torchrun``; that command itself is run in test_processes, test_score_command
and test_many_devices.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from torch.multiprocessing import start_processes

METHOD = "fork" if sys.platform == "linux" and not torch.accelerator.is_available() else "spawn"
"""What has computed gradients beside a GPU cannot be forked."""
WORLD = 2


def in_two_processes(work: Callable[..., Any], *given: Any, folder: Path, limit: float = 300.0) -> str:
    """What was printed while each of them did ``work(*given)``, into files of ``folder`` first.

    Raises:
        ProcessRaisedException: one of them failed; with its traceback.
        TimeoutError: they were not done after ``limit`` seconds.
    """
    said = [folder / f"said-{rank}.txt" for rank in range(WORLD)]
    context = start_processes(_begin, (work, given, said, _free_port()), WORLD, join=False, start_method=METHOD)
    end = time.monotonic() + limit
    while not context.join(timeout=1.0):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"after {limit:.0f} s two processes were not done")
    return "".join(file.read_text() for file in said)


def _begin(rank: int, work: Callable[..., Any], given: Sequence[Any], said: Sequence[Path], port: int) -> None:
    """With nothing of what Accelerate knows of the process that was forked."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with said[rank].open("w") as file, redirect_stdout(file):
        work(*given)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
