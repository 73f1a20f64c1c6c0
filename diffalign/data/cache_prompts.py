"""Filling a cache with prompts, of pairs or by themselves; what is committed is not encoded again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from diffalign.data.cache_files import CacheFolder
from diffalign.data.cache_shards import ShardFiller
from diffalign.data.cache_values import FillOptions, cast
from diffalign.data.pairs import Progress
from diffalign.protocols import Encoder


def prompts_to_fill(
    folder: CacheFolder, texts: Sequence[str], encoder: Encoder, options: FillOptions, progress: Progress | None
) -> ShardFiller[str]:
    """The filler for ``texts``, which all differ, the empty one first."""

    def encode(prompts: Sequence[str]) -> dict[str, np.ndarray]:
        with torch.no_grad():
            encoded = encoder.encode_prompts(list(prompts))
        labels = [f"the prompt {text!r}" for text in prompts]
        return {name: cast(value, options.dtype, labels) for name, value in encoded.items()}

    return ShardFiller(folder, "prompts", len(texts), lambda numbers: (texts[n] for n in numbers), encode, options, progress)


def about(prompts: ShardFiller[str], count: int) -> dict[str, object]:
    """The entries of ``complete.json`` about ``count`` prompts that are all encoded."""
    return {"unique_prompts": count, "prompts_per_shard": prompts.per_shard, "conditioning": prompts.remembered()[0]}
