"""The cache of latents and prompt embeddings: everything that is frozen is encoded once.

``build_cache`` fills it (and goes on where it was killed), ``PairCache`` reads it. Pictures are deduplicated by content, crop and
orientation, prompts by text. Per picture it keeps mean and standard deviation of the latent, so that training can still draw from
the encoder's distribution, and how it was cut from the original. Layout of the folder: ``cache_files``.

Rows are read first, and numbered (``cache_rows``); then the pictures that differ are encoded, and the prompts, shard by shard
(``cache_shards``). So processes and jobs can share the work, and what comes out does not depend on how many there were. Memory
while filling: one shard, a part of the rows and a few decoded pictures, whatever the number of pairs.

Shapes: N pairs, [C, h, w] latents.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.data.cache_build import images_to_fill
from diffalign.data.cache_files import Busy, CacheFolder, journal_name, shard_name
from diffalign.data.cache_prompts import about as prompts_about
from diffalign.data.cache_prompts import prompts_to_fill
from diffalign.data.cache_rows import Index, Rows, refuse_unreadable
from diffalign.data.cache_shards import ShardFiller, Share
from diffalign.data.cache_values import DEFAULTS, FillOptions, Shards, Strings, Taken
from diffalign.data.pairs import Progress
from diffalign.data.table import Kind, PairTable
from diffalign.data.transform import Transform
from diffalign.differences import plain
from diffalign.errors import UserError
from diffalign.processes import OneProcess, Processes, failing_together
from diffalign.protocols import Encoder

VERSION = 5
"""Raise it when the files change their meaning."""


def cache_fingerprint(table: PairTable, encoder: Encoder, transform: Transform, dtype: str = "float16") -> dict[str, Any]:
    """Everything that the content of a cache depends on, as plain values."""
    data = {"fingerprint": table.fingerprint, "kind": table.kind, "ties": table.ties, "pairs": len(table)}
    parts = {
        "version": VERSION,
        "dtype": dtype,
        "transform": transform.describe(),
        "encoder": dict(encoder.fingerprint()),
        "data": data,
    }
    return plain(parts)


def build_cache(
    table: PairTable,
    encoder: Encoder,
    directory: str | Path,
    transform: Transform,
    options: FillOptions = DEFAULTS,
    *,
    processes: Processes | None = None,
    progress: Progress | None = None,
    renew: bool = False,
    busy: Busy | None = None,
) -> PairCache:
    """Encode every pair of ``table`` that is not yet in ``directory``; a complete cache is only opened.

    All ``processes`` must call it, and share the work. Arguments and errors are those of ``fill_cache``.
    """
    fill_cache(table, encoder, directory, transform, options, processes=processes, progress=progress, renew=renew, busy=busy)
    cache = PairCache.open(directory, cache_fingerprint(table, encoder, transform, options.dtype))
    refuse_unreadable(cache.skipped, len(table), options.max_unreadable, table.kind)
    return cache


def fill_cache(
    table: PairTable,
    encoder: Encoder,
    directory: str | Path,
    transform: Transform,
    options: FillOptions = DEFAULTS,
    *,
    processes: Processes | None = None,
    part: Share = (0, 1),
    progress: Progress | None = None,
    renew: bool = False,
    busy: Busy | None = None,
    mended: Callable[[list[str]], None] | None = None,
) -> int:
    """Encode a part of what is not yet in ``directory``; returns how many shards are still missing, 0 of a complete cache.

    Jobs with the other parts may run at the same time, on other machines that see the folder, or at any other; the last one
    completes the cache. Its content does not depend on how many there are.

    Args:
        processes: that share this part. All must call it.
        part: (which, of how many), the first of them 0.
        renew: a cache that was made under other circumstances goes, instead of being refused.
        busy: called before this waits for another process that fills the folder; without it, that is refused.
        mended: has every file of a complete cache checked, and is given the names of those that are made anew because they are
            lost or cut short.

    Raises:
        StaleCacheError: the folder holds a cache made under other circumstances.
        UserError: too many unreadable pairs (the first are named), a full disk, values that ``dtype`` cannot hold, or a folder
            with something else.
    """
    folder, processes, shared = CacheFolder(directory), processes or OneProcess(), part[1] > 1
    expected = cache_fingerprint(table, encoder, transform, options.dtype)
    filling = _Filling(folder, table, encoder, transform, options, progress)
    with failing_together(processes):
        if processes.rank == 0:
            _look_over(folder, expected, renew, mended)
    if processes.all_gather_object(folder.complete)[
        0
    ]:  # a complete one needs no lock: any number of processes may open it at once
        folder.refuse_stale(expected)
        return 0
    with folder.claimed(expected, processes, shared, busy):
        if processes.all_gather_object(folder.complete)[0]:  # another job may have ended meanwhile
            return 0
        return filling.fill(part, processes)


def _look_over(folder: CacheFolder, expected: Mapping[str, Any], renew: bool, mended: Callable[[list[str]], None] | None) -> None:
    """Drop what may be made anew: a cache of other circumstances, or files of this one that are lost."""
    if renew:
        folder.drop_stale(expected)
    if mended and folder.complete:
        folder.refuse_stale(expected)
        if lost := uncommit_damaged(folder):
            mended(lost)


def uncommit_damaged(folder: CacheFolder) -> list[str]:
    """Files of a complete cache that are lost or cut short; it is no longer complete then, and filling makes them anew."""
    shards, lost = Shards(folder), _lost_index(folder)

    def is_lost(name: str) -> bool:
        try:
            shards.load(name)
        except UserError:
            return True
        return False

    for kind in ("images", "prompts"):
        for entry in sorted((folder.root / "journal").glob(f"{kind}-*.json")):
            number = int(entry.stem.rpartition("-")[2])
            if found := [name for name in _arrays(folder, kind, number) if is_lost(name)]:
                lost += found
                entry.unlink()
    if lost:
        (folder.root / "complete.json").unlink()
    return lost


def _arrays(folder: CacheFolder, kind: str, number: int) -> list[str]:
    """The files of a shard, by its journal; the journal itself if that is damaged."""
    entry = journal_name(kind, number)
    try:
        return [shard_name(kind, number, name) for name in folder.read_json(entry)["names"]]
    except UserError:
        return [entry]


def _lost_index(folder: CacheFolder) -> list[str]:
    """What is written last, or counts the shards, and does not open."""
    found = []
    try:
        cache = PairCache(folder)
        for kind, last in (("images", cache.pictures), ("prompts", len(cache.unique_prompts))):
            shards = math.ceil(last / folder.read_json(f"journal/{kind}.json")["per_shard"])
            found += [name for n in range(shards) if not (folder.root / (name := journal_name(kind, n))).exists()]
        len(cache.origins), cache.skipped
    except UserError:
        found.append("the index")
    return found


class _Filling:
    """The stages: rows are read and numbered, pictures and prompts encoded, and the index is written."""

    def __init__(
        self,
        folder: CacheFolder,
        table: PairTable,
        encoder: Encoder,
        transform: Transform,
        options: FillOptions,
        progress: Progress | None,
    ) -> None:
        self._folder, self._table, self._encoder, self._transform = folder, table, encoder, transform
        self._options, self._progress = options, progress
        self._rows = Rows(folder, table, transform, options, progress)

    def fill(self, part: Share, processes: Processes) -> int:
        """Returns how many shards are still missing."""
        started, index = time.monotonic(), self._numbered(part, processes)
        if index is None:
            return 0
        self._rows.refuse_none(len(index.pairs))
        self._rows.refuse(index.skipped)
        images = images_to_fill(
            *(self._folder, self._table, index, self._encoder, self._transform, self._options, self._progress),
            refuse=lambda broken: self._rows.refuse([*index.skipped, *broken]),
        )
        prompts = prompts_to_fill(self._folder, index.prompts, self._encoder, self._options, self._progress)
        mine = part[0] * processes.world + processes.rank, part[1] * processes.world
        for filler in (images, prompts):
            filler.fill(mine, processes)
        processes.all_gather_object(None)
        missing = processes.all_gather_object(images.missing() + prompts.missing())[0]
        with failing_together(processes):
            if processes.rank == 0 and not missing:
                self._finish(index, images, prompts, started)
        return missing

    def _numbered(self, part: Share, processes: Processes) -> Index | None:
        """The rows, read and numbered; None, in all processes, if another job has completed the cache meanwhile."""
        self._rows.read(part, processes)
        with failing_together(processes), self._folder.unless_complete():
            if processes.rank == 0:
                self._rows.join()
        index = None
        with self._folder.unless_complete():
            index = self._rows.index()
        if all(processes.all_gather_object(index is not None)):
            return index
        if processes.rank == 0:
            self._rows.forget()  # what was read in vain
        return None

    def _finish(self, index: Index, images: ShardFiller, prompts: ShardFiller, started: float) -> None:
        """Write the index; ``complete.json`` comes last, and then goes what a complete cache does not need."""
        with self._folder.locked(wait=True):  # several jobs may be the last
            if not self._folder.complete:
                found = self._rows.finish(images.remembered()[1])
                stride = 2 if self._transform.flip else 1
                counts = {"unique_images": len(index.owners), "images_per_shard": images.per_shard * stride}
                about = {**counts, **prompts_about(prompts, len(index.prompts)), **found}
                self._folder.write_json("complete.json", {**about, "seconds": round(time.monotonic() - started, 2)})
            self._rows.forget()
            self._folder.sweep()  # of killed jobs; one that lives has nothing left to write that is not there


class PairCache:
    """Encoded pairs, read through memory maps: opening one takes no longer for more of them. Safe to use from several threads and
    to send to other processes.

    ``labels`` and ``weights`` are float32 [N]; ``scores`` is float32 [N, 2], a judge's of winner and loser, NaN where there
    is none, and None if no pair has any; ``origins`` and ``prompts`` are sequences of N texts; ``skipped`` lists (origin, reason)
    of the pairs that could not be read; ``fingerprint`` is what the content depends on. Of ``kind`` "pictures", winner and loser
    are the same picture.
    """

    def __init__(self, folder: CacheFolder) -> None:
        self._folder = folder
        self._about: dict[str, Any] = folder.read_json("complete.json")
        shards = Shards(folder)
        self._shard, self._conditioning = shards.open, shards.conditioning
        self._pairs = shards.load("pairs.npy")
        self.fingerprint: dict[str, Any] = folder.read_json("fingerprint.json")
        self.labels, self.weights = self._pairs["label"], self._pairs["weight"]
        self.unique_prompts, self.origins = Strings(folder, "prompts"), Strings(folder, "origins")
        self.scores: Tensor | None = None
        if self._about["scored"]:
            self.scores = torch.from_numpy(np.stack([self._pairs[f"{side}_score"] for side in ("winner", "loser")], axis=1))

    @classmethod
    def open(cls, directory: str | Path, expected_fingerprint: Mapping[str, Any] | None = None) -> PairCache:
        """Open a complete cache without touching the pictures.

        Raises ``StaleCacheError`` if it was made under other circumstances than ``expected_fingerprint`` (from
        ``cache_fingerprint``; None accepts any), ``UserError`` if there is none, or none that is complete.
        """
        return cls(CacheFolder(directory).opened(VERSION, expected_fingerprint))

    def __len__(self) -> int:
        return len(self._pairs)

    def __reduce__(self) -> tuple[Any, ...]:
        return PairCache.open, (os.fspath(self._folder.root),)

    @property
    def pictures(self) -> int:
        """How many different pictures are encoded."""
        return self._about["unique_images"]

    @property
    def prompts(self) -> Sequence[str]:
        """The prompt of every pair."""
        return Taken(self.unique_prompts, self._pairs["prompt"])

    @property
    def prompt_numbers(self) -> np.ndarray:
        """int64 [N], the place in ``unique_prompts`` of every pair's prompt."""
        return self._pairs["prompt"]

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(origin, reason) of the pairs that could not be read."""
        return [(origin, reason) for origin, reason in self._folder.read_json("skipped.json")]

    @property
    def skipped_count(self) -> int:
        """How many pairs could not be read, without a look at the folder."""
        return self._about["skipped"]

    @property
    def kind(self) -> Kind:
        """Whether a row is a pair or a single picture."""
        return self.fingerprint["data"]["kind"]

    @property
    def flip(self) -> bool:
        """Whether both orientations of every picture are here."""
        return self.fingerprint["transform"]["flip"]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one latent; of the first pair's where they differ."""
        return self.shape_of(0)

    @property
    def buckets(self) -> bool:
        """Whether the pairs have shapes of their own."""
        return self.fingerprint["transform"].get("buckets", False)

    @property
    def bucket_numbers(self) -> np.ndarray:
        """int32 [N], which of the transform's shapes every pair is cut to; all 0 without buckets."""
        return self._pairs["bucket"]

    def shape_of(self, pair_index: int) -> tuple[int, int, int]:
        """(C, h, w) of both latents of a pair."""
        _, _, *shape = self._shard(shard_name("images", 0, "moments")).shape
        if self.buckets:
            shape[1:] = self._of_picture("shape", pair_index, "winner", False).int().tolist()
        return tuple(shape)

    def rows(self) -> np.ndarray:
        """int64 [N], the index in the table of every pair."""
        return self._pairs["row"].copy()

    def moments(self, pair_index: int, side: str, flipped: bool = False) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latent, each float32 [C, h, w]; ``side`` is "winner" or "loser"."""
        both = self._of_picture("moments", pair_index, side, flipped)
        if self.buckets:
            _, high, wide = self.shape_of(pair_index)
            both = both[..., : high * wide].unflatten(-1, (high, wide))
        return both[0], both[1]

    def framing(self, pair_index: int, side: str, flipped: bool = False) -> Tensor:
        """How the picture was cut from the original, float32 [6], see ``types.FRAMING``."""
        return self._of_picture("framing", pair_index, side, flipped)

    def _of_picture(self, tensor: str, pair_index: int, side: str, flipped: bool) -> Tensor:
        if flipped and not self.flip:
            raise ValueError("this cache was built with flip=False; it has no mirrored pictures")
        if side not in ("winner", "loser"):
            raise ValueError(f"side is {side!r}; it must be 'winner' or 'loser'")
        shard, place = divmod(int(self._pairs[side][pair_index]) + int(flipped), self._about["images_per_shard"])
        return torch.from_numpy(self._shard(shard_name("images", shard, tensor))[place].astype(np.float32))

    def conditioning(self, pair_index: int | None) -> dict[str, Tensor]:
        """The conditioning tensors of one pair's prompt, without batch dimension; of the empty prompt for None."""
        number = 0 if pair_index is None else int(self._pairs["prompt"][pair_index])
        return self._conditioning(number, self._about["prompts_per_shard"], self._about["conditioning"])

    def remembered(self, name: str, make: Callable[[], Any]) -> Any:
        """A plain value that follows from what is encoded: made once, and kept in the folder if that can be written to."""
        if (self._folder.root / f"{name}.json").exists():
            return self._folder.read_json(f"{name}.json")
        value = make()
        with contextlib.suppress(UserError):
            self._folder.write_json(f"{name}.json", value)
        return value

    def stats(self) -> dict[str, Any]:
        """Counts, bytes on disk (every file is looked at), and seconds that the (last) build took."""
        names = ("unique_images", "unique_prompts", "seconds")
        counts = {"pairs": len(self), "skipped": self.skipped_count}
        return counts | {name: self._about[name] for name in names} | {"bytes": self._folder.size_on_disk()}
