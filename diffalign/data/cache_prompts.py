"""Filling a cache with prompts, of pairs or by themselves; what a journal names is not encoded again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from diffalign.data.cache_files import CacheFolder, ShardWriter, journal_name
from diffalign.data.cache_values import cast
from diffalign.data.pairs import Progress
from diffalign.protocols import Encoder


@dataclass(frozen=True)
class Prompts:
    """What was encoded: the number of a prompt is its place in ``texts``."""

    texts: list[str]  # the empty prompt first, then by first appearance
    names: list[str]  # of the conditioning tensors
    per_shard: int

    def about(self) -> dict[str, object]:
        """What ``complete.json`` says of them."""
        return {"unique_prompts": len(self.texts), "prompts_per_shard": self.per_shard, "conditioning": self.names}


def fill_prompts(
    folder: CacheFolder,
    prompts: Iterable[str],
    encoder: Encoder,
    *,
    batch_size: int,
    shard_items: int,
    dtype: str,
    progress: Progress | None,
) -> Prompts:
    """Encode the empty prompt and every one of ``prompts`` that is not committed yet, each once."""
    texts = list(dict.fromkeys(["", *prompts]))
    journal = folder.journal("prompts")
    done, entries = (journal[-1]["items"], len(journal)) if journal else (0, 0)
    names: list[str] = journal[-1]["names"] if journal else []

    def encode(items: list[str], labels: list[str]) -> dict[str, np.ndarray]:
        with torch.no_grad():
            encoded = encoder.encode_prompts(items)
        names[:] = sorted(encoded)
        return {name: cast(value, dtype, labels) for name, value in encoded.items()}

    def commit(shards: int, items: int) -> None:
        nonlocal done, entries
        done += items
        entry = {"shards": shards, "items": done, "per_shard": writer.per_shard, "names": names}
        folder.write_json(journal_name("prompts", entries), entry)
        entries += 1

    writer = ShardWriter(folder, "prompts", encode, batch_size=batch_size, shard_items=shard_items, stride=1, committed=commit)
    writer.resume(journal[-1]["shards"] if journal else 0, journal[-1]["per_shard"] if journal else None)
    for number, text in enumerate(texts[done:], done):
        writer.add(text, f"the prompt {text!r}")
        if progress:
            progress("prompts", number + 1, len(texts))
    if done < len(texts):
        writer.flush()
    return Prompts(texts, names, writer.per_shard)
