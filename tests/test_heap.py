"""What the C library does with memory that is free, where a CPU does the work. Each in a process of its own: it stays so."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from pipelines import heap, run_folder

of_glibc = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt") or torch.accelerator.is_available(),
    reason="of glibc, on CPUs",
)

BEGIN = """
import contextlib, resource, sys, torch
from pipelines import heap
byte = b"1"
if "given back" in sys.argv[1]:
    heap.give_back_large_blocks()

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def faults(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        byte * size
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = resident()
"""

HOLES = """
byte * 2**22  # glibc now takes blocks of this size from its heap, if it is let
large, small = zip(*[(byte * 2**22, byte * 100_000) for _ in range(100)])
del large
print(resident() - before)
"""
"""Prints how many bytes more are resident once 100 blocks of 4 MiB are free that smaller ones lay between.

Those are too large for the holes that imports left."""

BLOCKS = """
with heap.kept() if "kept" in sys.argv[1] else contextlib.nullcontext():
    faults(2**26)
    print(faults(2**26), resident() - before)
print(resident() - before)
faults(2**24)
print(faults(2**24), faults(2**26))
"""
"""Prints pages handed out for ten blocks of 64 MiB, one after the other, and bytes that are resident beyond those before when the
last is free; these bytes once that is over; and then pages for blocks of 16 and of 64 MiB."""

MANY = 10 * 2**24 // 4096 // 20
"""Pages of ten blocks of 16 MiB; huge pages would be fewer."""


def said(code: str, how: str) -> list[int]:
    run = subprocess.run([sys.executable, "-c", BEGIN + code, how], capture_output=True, text=True, check=True)
    return [int(word) for word in run.stdout.split()]


@of_glibc
def test_large_blocks_are_given_back() -> None:
    assert said(HOLES, "plainly")[0] - said(HOLES, "given back")[0] > 300 * 2**20


@of_glibc
def test_blocks_are_kept_for_as_long_as_that_is_asked_for() -> None:
    faults, inside, after, *later = said(BLOCKS, "kept")
    plain_faults, plain_inside, _, *plain_later = said(BLOCKS, "plainly")
    assert faults < 100 < MANY < plain_faults
    assert inside > 2**25 > 2**24 > plain_inside
    assert after < 2**24  # all is given back,
    assert later[0] < 100 < MANY < later[1] and plain_later[0] < 100 < MANY < plain_later[1]  # and it goes on as without


@of_glibc
def test_what_was_kept_is_given_back_in_training() -> None:
    faults, _, after, *later, holes = said(BLOCKS + HOLES, "kept, then given back")
    assert faults < 100 and after < 2**24 and min(later) > MANY and holes < 100 * 2**20


def test_a_run_on_a_cpu_gives_large_blocks_back(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(heap, "give_back_large_blocks", lambda: asked.append(True))
    compute = SimpleNamespace(tracker="none", mixed_precision="no")
    run_folder.start_accelerator(SimpleNamespace(compute=compute, output="nowhere"))
    assert asked == [True]
