"""A cache of prompts without pictures, for methods that draw their pictures themselves (D3PO, DDPO, rounds of rollouts).

It is kept and filled as the cache of pairs is: encoded once, resumable shard by shard, refused when it is stale.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from diffalign.data.cache_files import PROMPTS, Busy, CacheFolder
from diffalign.data.cache_prompts import about, prompts_to_fill
from diffalign.data.cache_values import DEFAULTS, FillOptions, Shards
from diffalign.data.pairs import Progress
from diffalign.differences import plain
from diffalign.digests import digest_of
from diffalign.errors import UserError
from diffalign.processes import OneProcess
from diffalign.protocols import Encoder

VERSION = 1
"""Raise it when the files change their meaning."""


def prompt_fingerprint(prompts: Sequence[str], encoder: Encoder, dtype: str = "float16") -> dict[str, Any]:
    """Everything that the content of a cache of prompts depends on, as plain values."""
    named = {"count": len(prompts), "sha256": digest_of(list(prompts))}
    return plain({"version": VERSION, "dtype": dtype, "encoder": dict(encoder.fingerprint()), "prompts": named})


def build_prompt_cache(
    prompts: Sequence[str],
    encoder: Encoder,
    directory: str | Path,
    options: FillOptions = DEFAULTS,
    *,
    progress: Progress | None = None,
    option: str = PROMPTS.option,
    renew: bool = False,
    busy: Busy | None = None,
) -> PromptCache:
    """Encode every prompt that is not yet in ``directory``; a complete cache is only opened. Equal prompts are encoded once.

    ``option`` is what a refusal names as the way to choose another folder. With ``renew`` a cache that was made under other
    circumstances goes, instead of being refused. ``busy`` is called before this waits for another process that fills the folder;
    without it, that is refused.

    Raises ``StaleCacheError`` if the folder holds a cache of other prompts or another encoder, and ``UserError`` for no prompt
    at all, a full disk, or values that ``dtype`` cannot hold.
    """
    if isinstance(prompts, str):
        raise UserError(f"prompts is one text, {prompts!r}; expected a list of them.")
    if not len(prompts):
        raise UserError("There are no prompts to encode.")
    folder = CacheFolder(directory, replace(PROMPTS, option=option))
    expected = prompt_fingerprint(prompts, encoder, options.dtype)
    if renew:
        folder.drop_stale(expected)
    if not folder.complete:
        with folder.locked(busy=busy):
            folder.claim(expected)
            if not folder.complete:  # another process may have ended meanwhile
                _fill(folder, prompts, encoder, options, progress)
    return PromptCache(folder.opened(VERSION, expected))


def _fill(folder: CacheFolder, prompts: Sequence[str], encoder: Encoder, options: FillOptions, progress: Progress | None) -> None:
    """``complete.json`` comes last."""
    started = time.monotonic()
    texts = list(dict.fromkeys(["", *prompts]))
    filler = prompts_to_fill(folder, texts, encoder, options, progress)
    filler.fill((0, 1), OneProcess())
    number = {text: i for i, text in enumerate(texts)}
    folder.write_json("texts.json", {"prompts": texts, "order": [number[prompt] for prompt in prompts]})
    folder.write_json("complete.json", {"seconds": round(time.monotonic() - started, 2), **about(filler, len(texts))})


class PromptCache:
    """Encoded prompts, read through memory maps. Safe to use from several threads and to send to other processes.

    ``prompts`` is the list that was given, in its order and with its repetitions; ``fingerprint`` is what the content
    depends on.
    """

    def __init__(self, folder: CacheFolder) -> None:
        self._folder = folder
        self._about: dict[str, Any] = folder.read_json("complete.json")
        texts = folder.read_json("texts.json")
        self._order: list[int] = texts["order"]
        self._conditioning = Shards(folder).conditioning
        self.prompts: list[str] = [texts["prompts"][number] for number in self._order]
        self.fingerprint: dict[str, Any] = folder.read_json("fingerprint.json")

    @classmethod
    def open(cls, directory: str | Path, expected_fingerprint: Mapping[str, Any] | None = None) -> PromptCache:
        """Open a complete cache. Raises ``StaleCacheError`` if it was made under other circumstances than
        ``expected_fingerprint`` (from ``prompt_fingerprint``; None accepts any), ``UserError`` if there is none.
        """
        return cls(CacheFolder(directory, PROMPTS).opened(VERSION, expected_fingerprint))

    def __len__(self) -> int:
        return len(self.prompts)

    def __reduce__(self) -> tuple[Any, ...]:
        return PromptCache.open, (os.fspath(self._folder.root),)

    def conditioning(self, index: int | None) -> dict[str, Tensor]:
        """The conditioning tensors of one prompt, without batch dimension; of the empty prompt for None."""
        number = 0 if index is None else self._order[index]
        return self._conditioning(number, self._about["prompts_per_shard"], self._about["conditioning"])

    def stats(self) -> dict[str, Any]:
        """Counts, bytes on disk, and seconds that the (last) build took."""
        counts = {name: self._about[name] for name in ("unique_prompts", "seconds")}
        return {"prompts": len(self), **counts, "bytes": self._folder.size_on_disk()}
