"""Locks on open files, as the system has them; it releases them when the process dies.

POSIX has them for one alone and for many together (flock). Windows has only the first kind: who would share takes none there.
"""

from __future__ import annotations

import errno
import time
from typing import IO, Any

try:
    import fcntl
except ImportError:
    fcntl = None
    import msvcrt

SECONDS_BETWEEN_TRIES = 0.5
"""On Windows, whose own waiting gives up after ten seconds."""


def lock(file: IO[Any], shared: bool, wait: bool) -> None:
    """Until ``file`` is closed.

    Raises:
        BlockingIOError: another process has it, and this one is not to wait.
        OSError: a file system without locks, among other things.
    """
    if fcntl is not None:
        how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(file, how if wait else how | fcntl.LOCK_NB)
        return
    while not shared and not _taken(file):
        if not wait:
            raise BlockingIOError(errno.EAGAIN, "another process has it")
        time.sleep(SECONDS_BETWEEN_TRIES)


def _taken(file: IO[Any]) -> bool:
    """Whether Windows gives it to us. What is locked is the first byte, which need not be there."""
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except PermissionError:
        return False
    return True
