"""What the C library does with memory that is free, where a CPU does the work. Each in a process of its own: it stays so."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

BLOCKS = """
import contextlib, resource, sys, torch
from pipelines import heap
byte = b"1"

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def faults(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        byte * size
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = resident()
with heap.kept() if sys.argv[1] == "kept" else contextlib.nullcontext():
    faults(2**26)
    print(faults(2**26), resident() - before)
print(resident() - before)
faults(2**24)
print(faults(2**24), faults(2**26))
"""
"""Prints pages handed out for ten blocks of 64 MiB, one after the other, and bytes that are resident beyond those before when the
last is free; these bytes once that is over; and then pages for blocks of 16 and of 64 MiB."""


def said(how: str) -> list[int]:
    run = subprocess.run([sys.executable, "-c", BLOCKS, how], capture_output=True, text=True, check=True)
    return [int(word) for word in run.stdout.split()]


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt") or torch.accelerator.is_available(),
    reason="of glibc, on CPUs",
)
def test_blocks_are_kept_for_as_long_as_that_is_asked_for() -> None:
    faults, inside, after, small, large = said("kept")
    plain_faults, plain_inside, *_, plain_small, plain_large = said("plainly")
    many = 10 * 2**26 // 4096 // 20  # huge pages would be fewer
    assert faults < 100 < many < plain_faults
    assert inside > 2**25 > 2**24 > plain_inside
    assert after < 2**24  # all is given back,
    assert max(small, plain_small) < 100 < many < min(large, plain_large)  # and then it goes on as if nothing had been
