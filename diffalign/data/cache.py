"""The cache of latents and prompt embeddings: everything that is frozen is encoded once.

``build_cache`` fills it (and goes on where it was killed), ``PairCache`` reads it. Pictures are deduplicated by content,
crop and orientation, prompts by text. Per picture it keeps mean and standard deviation of the latent, so that training
can still draw from the encoder's distribution, and how it was cut from the original. Layout of the folder: ``cache_files``.

Memory while filling: one shard and a few decoded pictures; besides, about a hundred bytes per picture and pair for the
index. Shapes: N pairs, [C, h, w] latents.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.data.ahead import default_workers
from diffalign.data.cache_build import COLUMNS, Images, fill_images, refuse_unreadable
from diffalign.data.cache_files import CacheFolder, plain, shard_name
from diffalign.data.cache_prompts import Prompts, fill_prompts
from diffalign.data.cache_values import Shards, check_settings
from diffalign.data.pairs import Progress
from diffalign.data.table import Kind, PairTable
from diffalign.data.transform import Transform
from diffalign.errors import UserError
from diffalign.protocols import Encoder

VERSION = 3
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
    check_settings(dtype, batch_size, shard_items)
    if not 0.0 <= max_unreadable <= 1.0:
        raise UserError(f"max_unreadable is {max_unreadable}; it is a share of the pairs and must be in [0, 1].")
    folder, expected = CacheFolder(directory), cache_fingerprint(table, encoder, transform, dtype)
    if not folder.complete:  # a complete one needs no lock: any number of processes may open it at once
        with folder.locked():
            folder.claim(expected)
            if not folder.complete:  # another process may have ended meanwhile
                started, common = time.monotonic(), {"batch_size": batch_size, "shard_items": shard_items, "dtype": dtype}
                threads = default_workers() if workers is None else workers
                reading = {"max_unreadable": max_unreadable, "workers": threads, "progress": progress}
                images = fill_images(folder, table, encoder, transform, **common, **reading)
                texts = (pair["prompt"] for pair in images.pairs)
                prompts = fill_prompts(folder, texts, encoder, **common, progress=progress)
                _finish(folder, images, prompts, time.monotonic() - started)
    cache = PairCache.open(directory, expected)
    refuse_unreadable(cache.skipped, len(table), max_unreadable, table.kind)
    return cache


def _finish(folder: CacheFolder, images: Images, prompts: Prompts, seconds: float) -> None:
    """Write the index; ``complete.json`` comes last."""
    number = {text: i for i, text in enumerate(prompts.texts)}
    pairs = (pair | {"prompt": number[pair["prompt"]]} for pair in images.pairs)
    rows = [tuple(np.nan if pair[name] is None else pair[name] for name, _ in COLUMNS) for pair in pairs]
    folder.write("pairs.npy", np.array(rows, dtype=COLUMNS))
    texts = {"prompts": prompts.texts, "origins": [p["origin"] for p in images.pairs], "skipped": images.skipped}
    folder.write_json("texts.json", texts)
    counts = {"unique_images": len(images.keys), "images_per_shard": images.per_shard, "seconds": round(seconds, 2)}
    folder.write_json("complete.json", counts | prompts.about())


class PairCache:
    """Encoded pairs, read through memory maps. Safe to use from several threads and to send to other processes.

    ``labels`` and ``weights`` are float32 [N]; ``scores`` is float32 [N, 2], a judge's of winner and loser, NaN where there
    is none; ``origins`` and ``prompts`` are lists of N; ``skipped`` lists (origin, reason) of the pairs that could not be
    read; ``fingerprint`` is what the content depends on. Of ``kind`` "pictures", winner and loser are the same picture.
    """

    def __init__(self, folder: CacheFolder) -> None:
        self._folder = folder
        self._about: dict[str, Any] = folder.read_json("complete.json")
        texts = folder.read_json("texts.json")
        shards = Shards(folder)
        self._shard, self._conditioning = shards.open, shards.conditioning
        self._pairs = shards.load("pairs.npy")
        self._texts: list[str] = texts["prompts"]
        self.fingerprint: dict[str, Any] = folder.read_json("fingerprint.json")
        self.labels = torch.from_numpy(self._pairs["label"].astype(np.float32))
        self.weights = torch.from_numpy(self._pairs["weight"].astype(np.float32))
        self.scores = torch.from_numpy(np.stack([self._pairs[f"{s}_score"] for s in ("winner", "loser")], 1).astype(np.float32))
        self.origins: list[str] = texts["origins"]
        self.prompts = [self._texts[i] for i in self._pairs["prompt"]]
        self.skipped = [(origin, reason) for origin, reason in texts["skipped"]]

    @classmethod
    def open(cls, directory: str | Path, expected_fingerprint: Mapping[str, Any] | None = None) -> PairCache:
        """Open a complete cache without touching the pictures.

        Raises ``StaleCacheError`` if it was made under other circumstances than ``expected_fingerprint`` (from
        ``cache_fingerprint``; None accepts any), ``UserError`` if there is none, or none that is complete.
        """
        return cls(CacheFolder(directory).opened("data", VERSION, expected_fingerprint))

    def __len__(self) -> int:
        return len(self._pairs)

    def __reduce__(self) -> tuple[Any, ...]:
        return PairCache.open, (os.fspath(self._folder.root),)

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

    def stats(self) -> dict[str, Any]:
        """Counts, bytes on disk, and seconds that the (last) build took."""
        names = ("unique_images", "unique_prompts", "seconds")
        counts = {"pairs": len(self), "skipped": len(self.skipped)}
        return counts | {name: self._about[name] for name in names} | {"bytes": self._folder.size_on_disk()}
