"""Settings of glibc's malloc for free memory, where the CPU does the work.

With another C library, or an accelerator, these functions do nothing.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LARGE_BLOCK = 2 * 2**20
"""Bytes. Smaller ones are quicker to have from the heap."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""Constants of glibc's malloc.h."""
_NEVER, _USUAL_MMAPS = -1, 2**16
_large = 32 * 2**20
"""Bytes from which on a freed block goes back to the system outside ``kept``; at first the most that glibc's own threshold grows
to, for setting a threshold stops its growth."""


def give_back_large_blocks() -> None:
    """Have the C library give blocks above ``LARGE_BLOCK`` back to the system as soon as they are free. For training.

    Left to itself it soon keeps blocks of up to 32 MB in its heap, where those that live on between micro-steps hold apart what
    is free: SD1.5's LoRA by the tiny recipe at 256 pixels then takes up to 4 GiB more, and never less. The price is time, for the
    system zeroes every page that it hands out: nothing to speak of on one machine, 8 to 20 % on another, a virtual one.
    """
    global _large
    _large = LARGE_BLOCK
    if library := _glibc():
        library.mallopt(_MMAP_THRESHOLD, LARGE_BLOCK)


@contextmanager
def kept() -> Iterator[None]:
    """Have it keep what is free till the end of the block, and give all of it back then: the other way round. Not to be nested.

    For work without gradients, which takes blocks of the same sizes again and again and holds few at a time. SD1.5's autoencoder
    takes 1.3 times longer at 512 pixels, one at a time, and 2.2 times at 256, four at a time, where large blocks are given back
    (on that virtual machine).
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
        library.mallopt(_MMAP_THRESHOLD, _large)
        library.mallopt(_TRIM_THRESHOLD, 2 * _large)
        library.malloc_trim(0)


def _glibc() -> Any:
    import torch

    if sys.platform != "linux" or torch.accelerator.is_available():
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") else None
