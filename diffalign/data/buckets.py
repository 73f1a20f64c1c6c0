"""Pictures of several shapes: the shapes there are, and an order in which every batch holds one of them only.

A bucket is a shape of about ``resolution`` squared pixels whose sides are multiples of ``step`` (as SDXL was trained, Podell et
al. 2023, arXiv 2307.01952, section 2.3 and appendix I). A pair goes into the bucket nearest to its winner's ratio, so of a winner
no more is cut than a ratio between two buckets asks for; the loser is cut to the same shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from diffalign.data.draws import generator

Shape = tuple[int, int]
"""(height, width) in pixels."""
WIDEST = 4.0
"""The greatest ratio of a bucket's sides."""


@lru_cache
def shapes(resolution: int, step: int) -> tuple[Shape, ...]:
    """For every length of one side the longest other one, both multiples of ``step``, with no more than ``resolution`` squared
    pixels."""
    found = set()
    for side in range(step, round(resolution * math.sqrt(WIDEST)) + 1, step):
        other = resolution**2 // side // step * step
        if other and max(side, other) <= WIDEST * min(side, other):
            found |= {(side, other), (other, side)}
    return tuple(sorted(found))


def nearest(size: tuple[int, int], resolution: int, step: int) -> Shape:
    """The bucket whose ratio is nearest to that of a picture of ``size`` (width, height); of equals the larger."""
    width, height = size
    return min(shapes(resolution, step), key=lambda s: (abs(math.log(s[0] * width / (s[1] * height))), -s[0] * s[1]))


class BucketOrder:
    """Each epoch visits all rows, in blocks of ``batch_size`` positions that hold rows of one bucket, in a seeded order.

    ``of_row`` is the number of each row's bucket. Where a bucket's rows do not fill its last block, the first of them come again:
    nothing is left out. Blocks are what a micro-batch takes, so the order does not depend on the number of processes.
    """

    def __init__(self, of_row: Sequence[int] | np.ndarray, batch_size: int, seed: int) -> None:
        self._batch_size, self._seed = batch_size, seed
        _, sizes = np.unique(of_row, return_counts=True)
        self._groups = np.split(np.argsort(of_row, kind="stable"), np.cumsum(sizes)[:-1])
        self._ends = np.cumsum(-(-sizes // batch_size))  # of each group's blocks

    @property
    def _blocks(self) -> int:
        return int(self._ends[-1])

    def row(self, position: int) -> int:
        """The row at a position."""
        epoch, g, rank = self._place(position)
        group = self._groups[g]
        return int(group[_shuffled(len(group), self._seed, epoch, g)[rank % len(group)]])

    def visit(self, position: int) -> int:
        """Which visit to its row a position is, from 0: where a row comes again in an epoch, that is its next one.

        An epoch counts as many visits as all rows of its bucket have in it; what some have beyond is the next epoch's first.
        """
        epoch, g, rank = self._place(position)
        rows, blocks = len(self._groups[g]), int(self._ends[g] - self._first(g))
        return epoch * (blocks * self._batch_size // rows) + rank // rows

    def _place(self, position: int) -> tuple[int, int, int]:
        """The epoch of a position, the bucket that its block holds, and its rank among that bucket's positions of the epoch."""
        block, place = divmod(position, self._batch_size)
        epoch, number = divmod(block, self._blocks)
        chosen = int(_shuffled(self._blocks, self._seed, epoch, -1)[number])
        g = int(np.searchsorted(self._ends, chosen, side="right"))
        return epoch, g, (chosen - self._first(g)) * self._batch_size + place

    def _first(self, g: int) -> int:
        """The first block of a bucket."""
        return int(self._ends[g - 1]) if g else 0


def told_rare(of_row: Sequence[int] | np.ndarray, batch_size: int) -> str:
    """A line on rows whose bucket does not fill a batch, and which therefore come again within it; empty if there are none.

    ``of_row`` [N] is the number of each row's bucket.
    """
    _, sizes = np.unique(of_row, return_counts=True)
    if not (rare := sizes[sizes < batch_size]).size:
        return ""
    return (
        f"{rare.sum()} of {sizes.sum()} pairs have one of {rare.size} shapes that do not fill a batch of {batch_size}: they come "
        f"up to {math.ceil(batch_size / rare.min())} times an epoch, where others come once. A smaller --batch-size with more "
        "--accumulation, or a larger --bucket-step, which makes fewer shapes, evens that out."
    )


@lru_cache(maxsize=256)
def _shuffled(n: int, seed: int, epoch: int, group: int) -> Tensor:
    """A permutation of the ``n`` members of a group in an epoch, int64 [n]; group -1 is the blocks."""
    return torch.randperm(n, generator=generator(seed, "buckets", epoch, group + 1))
