"""What stands in a cache's shards: from the encoder's tensors to arrays on the disk, and back through memory maps."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffalign.data.cache_files import CacheFolder, shard_name
from diffalign.errors import UserError

DTYPES = {"float16": np.float16, "float32": np.float32}
OPEN_SHARDS = 128  # each costs a file descriptor


def check_settings(dtype: str, batch_size: int, shard_items: int) -> None:
    """Raises ``UserError`` for what no cache can be filled with."""
    if dtype not in DTYPES:
        raise UserError(f"dtype of the cache is {dtype!r}; it must be one of {', '.join(DTYPES)}.")
    if batch_size < 1 or shard_items < 1:
        raise UserError(f"batch_size is {batch_size} and shard_items is {shard_items}; both must be at least 1.")


def cast(value: Tensor, dtype: str, labels: Sequence[str]) -> np.ndarray:
    """On the CPU in the cache's dtype; integers stay as they are. Raises ``UserError`` for what is not finite."""
    if not value.is_floating_point():
        return value.cpu().numpy()
    exact = value.detach().to("cpu", torch.float32).numpy()
    with np.errstate(over="ignore"):
        stored = exact.astype(DTYPES[dtype])
    for row in np.flatnonzero(~np.isfinite(stored.reshape(len(stored), -1)).all(axis=1)):
        if np.isfinite(exact[row]).all():
            reach = f"up to {np.abs(exact[row]).max():g}, more than float16 holds; use dtype float32 for the cache"
        else:
            reach = "values that are not finite; run the encoder in float32"
        raise UserError(f"The encoder gave {reach} (for {labels[row]}).")
    return stored


class Shards:
    """Memory maps of a cache's arrays; those used last stay open. Safe to use from several threads."""

    def __init__(self, folder: CacheFolder) -> None:
        self._folder = folder
        self.open = functools.lru_cache(maxsize=OPEN_SHARDS)(self.load)

    def load(self, name: str) -> np.ndarray:
        """A memory map of an array. Raises ``UserError`` for a file that is missing or damaged."""
        root = self._folder.root
        try:
            return np.load(root / name, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"The cache in {root} is damaged: {name}: {error}. Delete the folder to make it anew.") from error

    def conditioning(self, number: int, per_shard: int, names: Sequence[str]) -> dict[str, Tensor]:
        """The tensors ``names`` of the encoded prompt ``number``, without batch dimension, floats as float32."""
        shard, place = divmod(number, per_shard)
        found = {}
        for name in names:
            value = np.array(self.open(shard_name("prompts", shard, name))[place])
            found[name] = torch.from_numpy(value.astype(np.float32) if value.dtype.kind == "f" else value)
        return found
