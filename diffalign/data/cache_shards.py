"""Filling shards: inputs are encoded in batches and written a shard at a time, by any number of processes and jobs.

Every shard but the last holds equally many inputs, of consecutive numbers, and batches never straddle two shards. So whichever
processes fill them, however often they are killed, the same batches are encoded and the files come out identical. A shard is
committed when its journal entry exists; a kill costs each process the shard that it was filling.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np

from diffalign.data.cache_files import CacheFolder, journal_name, shard_name
from diffalign.data.cache_values import FillOptions
from diffalign.data.pairs import Progress
from diffalign.processes import Processes, failing_together

Thing = TypeVar("Thing")
Arrays = Mapping[str, np.ndarray]
"""By name, each with the items of a batch along its first axis, in their order."""
Share = tuple[int, int]
"""(which, of how many), the first of them 0."""


def share_of(count: int, share: Share) -> range:
    """One of several contiguous parts of ``range(count)`` whose sizes differ by one at most; 0 is in the first of them."""
    which, of = share
    return range(-(-which * count // of), -(-(which + 1) * count // of))


class ShardFiller(Generic[Thing]):
    """Fills the shards of ``count`` inputs (pictures, prompts), each of which becomes ``stride`` items of the arrays.

    ``load`` yields the inputs of some numbers, in that order, and ``encode`` makes arrays of a batch of them. ``remarks`` gives
    texts to be kept about inputs of a batch, by number.
    """

    MAX_BYTES = 64 * 2**20  # per shard, whatever ``FillOptions.shard_items`` says

    def __init__(
        self,
        folder: CacheFolder,
        kind: str,
        count: int,
        load: Callable[[Iterable[int]], Iterator[Thing]],
        encode: Callable[[Sequence[Thing]], Arrays],
        options: FillOptions,
        progress: Progress | None,
        *,
        stride: int = 1,
        remarks: Callable[[Sequence[Thing]], Mapping[int, str]] = lambda _: {},
    ) -> None:
        self._folder, self._kind, self._count, self._progress = folder, kind, count, progress
        self._load, self._encode, self._remarks = load, encode, remarks
        self._batch, self._most = max(1, options.batch_size // stride), max(1, options.shard_items // stride)
        self._stride = stride
        self._first: tuple[Sequence[Thing], Arrays] | None = None
        self.per_shard = 0  # inputs; known when filling has begun

    def fill(self, share: Share, processes: Processes) -> None:
        """Encode what is missing of a share of the shards. All processes must call it."""
        with failing_together(processes):
            settled = self._settled() if processes.rank == 0 else None
        self.per_shard = processes.all_gather_object(settled)[0]
        mine = [shard for shard in share_of(self.shards, share) if not self._committed(shard)]
        loaded = self._loaded(mine)
        left = sum(len(self._numbers(shard)) for shard in mine)
        for shard in mine:
            left -= self._fill_shard(shard, loaded, left)

    def _loaded(self, shards: Sequence[int]) -> Iterator[Thing]:
        """The inputs of some shards in order; those of the first batch are loaded already, if it is among them."""
        first = self._first[0] if self._first and 0 in shards else []
        numbers = itertools.chain.from_iterable(map(self._numbers, shards))
        return itertools.chain(first, self._load(itertools.islice(numbers, len(first), None)))

    @property
    def shards(self) -> int:
        return math.ceil(self._count / self.per_shard)

    def missing(self) -> int:
        """Shards that are not committed yet, of any process."""
        return sum(not self._committed(shard) for shard in range(self.shards))

    def remembered(self) -> tuple[list[str], dict[int, str]]:
        """The names of the arrays, and the remarks by number. Every shard must be committed."""
        names: list[str] = []
        remarks: dict[int, str] = {}
        for shard in range(self.shards):
            entry = self._folder.read_json(journal_name(self._kind, shard))
            names, remarks = entry["names"], remarks | {int(number): text for number, text in entry["remarks"].items()}
        return names, remarks

    def _committed(self, shard: int) -> bool:
        return (self._folder.root / journal_name(self._kind, shard)).exists()

    def _numbers(self, shard: int) -> range:
        return range(shard * self.per_shard, min((shard + 1) * self.per_shard, self._count))

    def _settled(self) -> int:
        """Inputs in a shard, by the bytes of one, which the first batch shows; it is not encoded again for its shard."""
        name = f"journal/{self._kind}.json"
        if not (self._folder.root / name).exists():
            things = list(self._load(range(min(self._batch, self._count))))
            arrays = self._encode(things)
            self._first = things, arrays
            fitting = int(self.MAX_BYTES * len(things) / sum(array.nbytes for array in arrays.values()))
            self._folder.write_json(name, {"per_shard": max(min(self._most, fitting), self._batch)})
        return self._folder.read_json(name)["per_shard"]

    def _fill_shard(self, shard: int, loaded: Iterator[Thing], left: int) -> int:
        """Encode and write a shard; returns its number of inputs. ``left`` of this process's inputs are still to be done."""
        numbers, whole, remarks = self._numbers(shard), {}, {}
        for low in range(0, len(numbers), self._batch):
            things = [next(loaded) for _ in range(min(self._batch, len(numbers) - low))]
            arrays = self._encoded(shard, low, things)
            remarks |= self._remarks(things)
            for name, array in arrays.items():
                if name not in whole:
                    whole[name] = np.empty((len(numbers) * self._stride, *array.shape[1:]), array.dtype)
                whole[name][low * self._stride :][: len(array)] = array
            if self._progress:
                self._progress(self._kind, self._count - left + low + len(things), self._count)
        for name in sorted(whole):
            self._folder.write(shard_name(self._kind, shard, name), whole[name])
        self._folder.write_json(journal_name(self._kind, shard), {"names": sorted(whole), "remarks": remarks})
        return len(numbers)

    def _encoded(self, shard: int, low: int, things: Sequence[Thing]) -> Arrays:
        if shard == low == 0 and self._first is not None:
            first, self._first = self._first, None
            return first[1]
        return self._encode(things)
