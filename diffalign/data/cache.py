"""The cache of latents and prompt embeddings: everything that is frozen is encoded once.

``build_cache`` fills it (and goes on where it was killed), ``PairCache`` reads it. Pictures are deduplicated by content,
crop and orientation, prompts by text. Per picture it keeps mean and standard deviation of the latent, so that training
can still draw from the encoder's distribution. Layout of the folder: ``cache_files``.

Memory while filling: one shard and a few decoded pictures; besides, about a hundred bytes per picture and pair for the
index. Shapes: N pairs, [C, h, w] latents.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.data.ahead import default_workers
from diffalign.data.cache_build import COLUMNS, DTYPES, fill_images, fill_prompts, refuse_unreadable
from diffalign.data.cache_files import CacheFolder, plain, shard_name
from diffalign.data.pairs import Progress
from diffalign.data.table import PairTable
from diffalign.data.transform import Transform
from diffalign.errors import UserError
from diffalign.protocols import Encoder

VERSION = 1
"""Raise it when the files change their meaning."""

OPEN_SHARDS = 128  # each costs a file descriptor


def cache_fingerprint(table: PairTable, encoder: Encoder, transform: Transform, dtype: str = "float16") -> dict[str, Any]:
    """Everything that the content of a cache depends on, as plain values."""
    data = {"fingerprint": table.fingerprint, "ties": table.ties, "pairs": len(table)}
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
    *,
    batch_size: int = 8,
    max_unreadable: float = 0.01,
    progress: Progress | None = None,
    dtype: str = "float16",
    shard_items: int = 256,
    workers: int | None = None,
) -> PairCache:
    """Encode every pair of ``table`` that is not yet in ``directory``; a complete cache is only opened.

    ``max_unreadable`` is the share of pairs, in [0, 1], that may be skipped because they cannot be read. ``workers``
    threads decode ahead of the encoder. A shard holds ``shard_items`` items, fewer if they are large; it is what a kill
    can cost. Raises ``StaleCacheError`` if the folder holds a cache made under other circumstances, and ``UserError`` for
    too many unreadable pairs (naming the first), a full disk, or values that ``dtype`` cannot hold.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype of the cache is {dtype!r}; it must be one of {', '.join(DTYPES)}.")
    if not 0.0 <= max_unreadable <= 1.0:
        raise UserError(f"max_unreadable is {max_unreadable}; it is a share of the pairs and must be in [0, 1].")
    if batch_size < 1 or shard_items < 1:
        raise UserError(f"batch_size is {batch_size} and shard_items is {shard_items}; both must be at least 1.")
    folder, expected = CacheFolder(directory), cache_fingerprint(table, encoder, transform, dtype)
    if not folder.complete:  # a complete one needs no lock: any number of processes may open it at once
        with folder.locked():
            folder.claim(expected)
            if not folder.complete:  # another process may have ended meanwhile
                started, common = time.monotonic(), {"batch_size": batch_size, "shard_items": shard_items, "dtype": dtype}
                threads = default_workers() if workers is None else workers
                reading = {"max_unreadable": max_unreadable, "workers": threads, "progress": progress}
                images = fill_images(folder, table, encoder, transform, **common, **reading)
                prompts = fill_prompts(folder, images, encoder, **common, progress=progress)
                _finish(folder, images, prompts, time.monotonic() - started)
    cache = PairCache.open(directory, expected)
    refuse_unreadable(cache.skipped, len(table), max_unreadable)
    return cache


def _finish(folder: CacheFolder, images: Any, prompts: Any, seconds: float) -> None:
    """Write the index; ``complete.json`` comes last."""
    number = {text: i for i, text in enumerate(prompts.texts)}
    rows = [(p["row"], p["winner"], p["loser"], number[p["prompt"]], p["label"], p["weight"]) for p in images.pairs]
    folder.write("pairs.npy", np.array(rows, dtype=COLUMNS))
    texts = {"prompts": prompts.texts, "origins": [p["origin"] for p in images.pairs], "skipped": images.skipped}
    folder.write_json("texts.json", texts)
    shards = {"images_per_shard": images.per_shard, "prompts_per_shard": prompts.per_shard, "conditioning": prompts.names}
    counts = {"unique_images": len(images.keys), "unique_prompts": len(prompts.texts), "seconds": round(seconds, 2)}
    folder.write_json("complete.json", counts | shards)


class PairCache:
    """Encoded pairs, read through memory maps. Safe to use from several threads and to send to other processes.

    ``labels`` and ``weights`` are float32 [N]; ``origins`` and ``prompts`` are lists of N; ``skipped`` lists
    (origin, reason) of the pairs that could not be read; ``fingerprint`` is what the content depends on.
    """

    def __init__(self, folder: CacheFolder) -> None:
        self._folder = folder
        self._about: dict[str, Any] = folder.read_json("complete.json")
        texts = folder.read_json("texts.json")
        self._pairs = _load(folder, "pairs.npy")
        self._texts: list[str] = texts["prompts"]
        self.fingerprint: dict[str, Any] = folder.read_json("fingerprint.json")
        self.labels = torch.from_numpy(self._pairs["label"].astype(np.float32))
        self.weights = torch.from_numpy(self._pairs["weight"].astype(np.float32))
        self.origins: list[str] = texts["origins"]
        self.prompts = [self._texts[i] for i in self._pairs["prompt"]]
        self.skipped = [(origin, reason) for origin, reason in texts["skipped"]]
        self._shard = functools.lru_cache(maxsize=OPEN_SHARDS)(functools.partial(_load, folder))

    @classmethod
    def open(cls, directory: str | Path, expected_fingerprint: Mapping[str, Any] | None = None) -> PairCache:
        """Open a complete cache without touching the pictures.

        Raises ``StaleCacheError`` if it was made under other circumstances than ``expected_fingerprint`` (from
        ``cache_fingerprint``; None accepts any), ``UserError`` if there is none, or none that is complete.
        """
        folder = CacheFolder(directory)
        if not (folder.root / "fingerprint.json").exists():
            raise UserError(f"There is no cache in {folder.root}.")
        if expected_fingerprint is not None:
            folder.refuse_stale(expected_fingerprint)
        if not folder.complete:
            raise UserError(f"The cache in {folder.root} is not complete; build it again, it goes on where it stopped.")
        return cls(folder)

    def __len__(self) -> int:
        return len(self._pairs)

    def __reduce__(self) -> tuple[Any, ...]:
        return PairCache.open, (os.fspath(self._folder.root),)

    @property
    def flip(self) -> bool:
        """Whether both orientations of every picture are here."""
        return self.fingerprint["transform"]["flip"]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one latent."""
        _, _, *shape = self._shard(shard_name("images", 0, "moments")).shape
        return tuple(shape)

    def rows(self) -> np.ndarray:
        """int64 [N], the index in the table of every pair."""
        return self._pairs["row"].copy()

    def moments(self, pair_index: int, side: str, flipped: bool = False) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latent, each float32 [C, h, w]; ``side`` is "winner" or "loser"."""
        if flipped and not self.flip:
            raise ValueError("this cache was built with flip=False; it has no mirrored pictures")
        if side not in ("winner", "loser"):
            raise ValueError(f"side is {side!r}; it must be 'winner' or 'loser'")
        shard, place = divmod(int(self._pairs[side][pair_index]) + int(flipped), self._about["images_per_shard"])
        both = torch.from_numpy(self._shard(shard_name("images", shard, "moments"))[place].astype(np.float32))
        return both[0], both[1]

    def conditioning(self, pair_index: int | None) -> dict[str, Tensor]:
        """The conditioning tensors of one pair's prompt, without batch dimension; of the empty prompt for None."""
        number = 0 if pair_index is None else int(self._pairs["prompt"][pair_index])
        shard, place = divmod(number, self._about["prompts_per_shard"])
        found = {}
        for name in self._about["conditioning"]:
            value = np.array(self._shard(shard_name("prompts", shard, name))[place])
            found[name] = torch.from_numpy(value.astype(np.float32) if value.dtype.kind == "f" else value)
        return found

    def stats(self) -> dict[str, Any]:
        """Counts, bytes on disk, and seconds that the (last) build took."""
        names = ("unique_images", "unique_prompts", "seconds")
        counts = {"pairs": len(self), "skipped": len(self.skipped)}
        return counts | {name: self._about[name] for name in names} | {"bytes": self._folder.size_on_disk()}


def _load(folder: CacheFolder, name: str) -> np.ndarray:
    """A memory map of an array. Raises ``UserError`` for a file that is missing or damaged."""
    try:
        return np.load(folder.root / name, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"The cache in {folder.root} is damaged: {name}: {error}. Delete the folder to make it anew.") from error
