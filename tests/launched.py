"""Several real gloo processes without a launcher, which would end all of them as soon as one fails: as on several hosts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence

import pytest


def together(words: Sequence[Sequence[object]], patience: float = 240, **environment: str) -> list[tuple[int, str, str]]:
    """Run Python once for each of ``words``, as processes of one run: exit status, stdout, and stderr on one line, of each.
    One that hangs fails the test after ``patience`` seconds."""
    around = {**os.environ, **environment, **_meeting(), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(len(words))}
    begun = [_started(list(map(str, one)), around, rank) for rank, one in enumerate(words)]
    try:
        said = [process.communicate(timeout=patience) for process in begun]
    except subprocess.TimeoutExpired:
        pytest.fail(f"processes hang: {[process.poll() for process in begun]}")
    finally:
        for process in begun:
            process.kill()
    return [(process.returncode, out, " ".join(told.split())) for process, (out, told) in zip(begun, said, strict=True)]


def _started(words: list[str], around: Mapping[str, str], rank: int) -> subprocess.Popen[str]:
    own = {**around, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *words], stdout=pipe, stderr=pipe, text=True, env=own)


def _meeting() -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
