"""The reference's errors at a few draws of every pair, kept on disk: one float32 per picture and draw.

    fingerprint.json     reference, precision, encoded data, schedule and draws: everything that the errors depend on
    errors/00000.npy     [n, K, 2] of winner and loser, of consecutive rows; while the folder is filled
    errors.npy           [N, K, 2], when it is complete

Shards are written aside and renamed, so a kill costs one of each process; the same command goes on from there. Processes share
the work by shards. The errors of a pair depend on nothing but what the fingerprint names, whatever the number of processes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.data.cache_files import ERRORS, Busy, CacheFolder
from diffalign.data.cache_values import Shards
from diffalign.data.draws import Draw, FixedDraws
from diffalign.data.loader import EncodedPairs, MadeWhenAsked, collate, shape_of
from diffalign.data.pairs import Progress
from diffalign.differences import plain
from diffalign.errors import UserError
from diffalign.processes import OneProcess, Processes, failing_together, turns
from diffalign.types import PairBatch

VERSION = 1
"""Raise it when the files change their meaning."""
LEAST, MOST, SHARDS = 32, 4096, 64
"""Draws of a shard: enough for one call of the network, few enough to be lost; in between, about so many shards to share."""

Ask = Callable[[PairBatch], Tensor]
"""The reference's errors [B, 2] of winner and loser."""


class CachedErrors:
    """Draws of every pair, and the reference's errors at them, read through a memory map."""

    def __init__(self, draws: FixedDraws, errors: np.ndarray, fingerprint: Mapping[str, Any], seconds: float) -> None:
        self.draws, self.fingerprint, self.seconds = draws, dict(fingerprint), seconds
        self._errors = errors

    def __len__(self) -> int:
        return len(self._errors)

    def visited(self, row: int, visit: int, shape: tuple[int, ...]) -> tuple[Draw, Tensor]:
        """The draw that a visit, counted from 0, has for a row with latents of ``shape``, and the errors [2] at it."""
        number = visit % self.draws.count
        return self.draws.draw(row, number, shape), torch.from_numpy(np.array(self._errors[row, number]))


def cache_errors(
    pairs: EncodedPairs,
    draws: FixedDraws,
    ask: Ask,
    directory: str | Path,
    depends_on: Mapping[str, Any],
    *,
    batch_size: int = 16,
    processes: Processes | None = None,
    progress: Progress | None = None,
    renew: bool = False,
    busy: Busy | None = None,
) -> CachedErrors:
    """Ask for whatever is not yet in ``directory``; a complete folder is only opened. All processes must call it.

    Args:
        ask: without gradient, in the precision of training; called with ``batch_size`` pairs of one shape at most.
        depends_on: what the errors depend on beside the draws, as plain values: reference, precision, data, schedule.
        renew: errors that were made under other circumstances go, instead of being refused.
        busy: called before this waits for another process that fills the folder; without it, that is refused.

    Raises:
        StaleCacheError: the folder holds errors made under other circumstances; the first that differ are named.
        UserError: the disk is full, the folder holds something else, or an error is not finite.
    """
    processes, folder = processes or OneProcess(), CacheFolder(directory, ERRORS)
    fingerprint = plain({"version": VERSION, **depends_on, "draws": draws.describe(), "pairs": len(pairs)})
    with failing_together(processes):
        if renew and processes.rank == 0:
            folder.drop_stale(fingerprint)
    complete = processes.all_gather_object(folder.complete)[0]
    if not complete:
        _fill_together(folder, fingerprint, _Filling(folder, pairs, draws, ask, batch_size, progress), processes, busy)
    folder.refuse_stale(fingerprint)
    errors = Shards(folder).load("errors.npy")
    return CachedErrors(draws, errors, fingerprint, folder.read_json("complete.json")["seconds"])


def _fill_together(
    folder: CacheFolder, fingerprint: Mapping[str, Any], filling: _Filling, processes: Processes, busy: Busy | None
) -> None:
    started = time.monotonic()
    with folder.claimed(fingerprint, processes, busy=busy):
        if processes.all_gather_object(folder.complete)[0]:  # another run may have ended meanwhile
            return
        filling.fill(processes)
        processes.all_gather_object(None)
        with failing_together(processes):
            if processes.rank == 0:
                filling.finish(time.monotonic() - started)


class _Filling:
    """Rows into shards."""

    def __init__(
        self, folder: CacheFolder, pairs: EncodedPairs, draws: FixedDraws, ask: Ask, batch_size: int, progress: Progress | None
    ) -> None:
        self._folder, self._pairs, self._draws, self._ask = folder, pairs, draws, ask
        self._batch_size, self._progress = batch_size, progress
        least, most = math.ceil(LEAST / draws.count), max(1, MOST // draws.count)
        rows = min(max(math.ceil(len(pairs) / SHARDS), least), most)
        self._shards = [range(first, min(first + rows, len(pairs))) for first in range(0, len(pairs), rows)]

    def fill(self, processes: Processes) -> None:
        """This process's part of the shards that are not there yet."""
        missing = [n for n in range(len(self._shards)) if not self._there(n)]
        mine = [n for n in missing if n % processes.world == processes.rank]
        for done, number in enumerate(mine, start=1):
            self._folder.write(_shard(number), self._errors(self._shards[number]))
            if self._progress:
                self._progress("reference", len(self._shards) - len(mine) + done, len(self._shards))

    def _there(self, number: int) -> bool:
        """Whether a shard is on the disk and whole; a torn one is computed again."""
        try:
            found = Shards(self._folder).load(_shard(number))
        except UserError:
            return False
        return found.shape == (len(self._shards[number]), self._draws.count, 2)

    def _errors(self, rows: range) -> np.ndarray:
        """[n, K, 2] of some rows."""
        found = np.full((len(rows), self._draws.count, 2), np.nan, dtype=np.float32)
        for items in self._batches(rows):
            drawn = [self._draws.draw(row, number, shape_of(self._pairs, row)) for row, number in items]
            batch = collate(self._pairs, [row for row, _ in items], drawn, self._draws.latent_mode)
            errors = self._ask(batch).float().cpu().numpy()
            if not np.isfinite(errors).all():
                row, number = items[int(np.flatnonzero(~np.isfinite(errors).all(axis=1))[0])]
                raise UserError(f"The reference's error of pair {row} at draw {number} is not finite; try another precision.")
            for (row, number), both in zip(items, errors, strict=True):
                found[row - rows.start, number] = both
        return found

    def _batches(self, rows: range) -> Iterator[list[tuple[int, int]]]:
        """(row, number) of pairs of one shape, ``batch_size`` at most."""
        alike: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for row in rows:
            alike.setdefault(shape_of(self._pairs, row), []).extend((row, number) for number in range(self._draws.count))
        for items in alike.values():
            for first in range(0, len(items), self._batch_size):
                yield items[first : first + self._batch_size]

    def finish(self, seconds: float) -> None:
        """All shards as one array; ``complete.json`` comes last, and then the shards go."""
        names, shards = [_shard(number) for number in range(len(self._shards))], Shards(self._folder)
        self._folder.write("errors.npy", np.concatenate([shards.load(name) for name in names]))
        self._folder.write_json("complete.json", {"shards": len(names), "seconds": round(seconds, 2)})
        for name in names:
            (self._folder.root / name).unlink()


def _shard(number: int) -> str:
    return f"errors/{number:05d}.npy"


def with_known(batches: Sequence[PairBatch], ask: Ask, processes: Processes | None = None) -> Sequence[PairBatch]:
    """Batches of validation, whose draws are fixed anyway, with the reference's errors; without where this process is
    never shown them."""
    rank, world = (processes.rank, processes.world) if processes else (0, 1)
    known = {place: ask(batches[place]).float().cpu() for place, _ in turns(len(batches), rank, world)}
    return MadeWhenAsked(len(batches), lambda place: replace(batches[place], known=known.get(place)))
