"""What the C library does with memory that is free, where the CPU does the work: glibc's malloc.

With another C library, or an accelerator, nothing here does anything.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""Of glibc's malloc.h."""
_NEVER, _USUAL_MMAPS = -1, 2**16
_LARGE, _TOP = 32 * 2**20, 64 * 2**20
"""Where glibc's own thresholds end once blocks of 32 MiB have been freed; setting one of them stops their growth."""


@contextmanager
def kept() -> Iterator[None]:
    """Have the C library keep what is free till the end of the block, and give all of it back then. Not to be nested.

    For work without gradients, which takes blocks of the same sizes again and again and holds few at a time. Left to itself glibc
    gives blocks above 32 MB back at once, and the system zeroes every page that it hands out: with SD1.5's autoencoder at 512
    pixels a third of the time (on a virtual machine). Training holds too many blocks, of too many sizes, to gain much.
    """
    library = _glibc()
    if not library:
        yield
        return
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        library.mallopt(_MMAP_MAX, _USUAL_MMAPS)
        library.mallopt(_MMAP_THRESHOLD, _LARGE)
        library.mallopt(_TRIM_THRESHOLD, _TOP)
        library.malloc_trim(0)


def _glibc() -> Any:
    import torch

    if sys.platform != "linux" or torch.accelerator.is_available():
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") else None
