"""Filling a cache with pictures: decoded ahead by threads, encoded in batches, each by the number that ``cache_rows`` gave it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.data.ahead import map_ahead
from diffalign.data.cache_files import CacheFolder
from diffalign.data.cache_rows import Index, Skipped, pair_of
from diffalign.data.cache_shards import ShardFiller
from diffalign.data.cache_values import FillOptions, cast
from diffalign.data.pairs import PreferencePair, Progress, RowProblem, UnreadableImage
from diffalign.data.table import PairTable
from diffalign.data.transform import Framing, Transform
from diffalign.protocols import Encoder

View = tuple[Tensor, Framing]
"""Pixels [3, H, W] in [-1, 1], and how they were cut from the picture."""


@dataclass(frozen=True)
class Picture:
    """A picture ready for the encoder, in its orientations; a blank one where it cannot be decoded."""

    number: int
    views: list[View]
    row: int  # to which it belongs
    side: str
    origin: str
    problem: str | None = None


def images_to_fill(
    folder: CacheFolder,
    table: PairTable,
    index: Index,
    encoder: Encoder,
    transform: Transform,
    options: FillOptions,
    progress: Progress | None,
    *,
    refuse: Callable[[Sequence[Skipped]], None],
) -> ShardFiller[Picture]:
    """The filler for the pictures of ``index``. ``refuse`` gets the rows that turn out broken, and raises if too many."""
    broken: list[Skipped] = []

    def remarks(pictures: Sequence[Picture]) -> dict[int, str]:
        found = [picture for picture in pictures if picture.problem]
        broken.extend((picture.row, picture.origin, f"{picture.side}: {picture.problem}") for picture in found)
        if found:
            refuse(broken)
        return {picture.number: picture.problem for picture in found}

    load = partial(_loaded, table, index.owners, transform, options.workers)
    encode = partial(_encode, encoder, options.dtype, transform)
    stride = 2 if transform.flip else 1
    return ShardFiller(folder, "images", len(index.owners), load, encode, options, progress, stride=stride, remarks=remarks)


def _loaded(
    table: PairTable, owners: np.ndarray, transform: Transform, workers: int, numbers: Iterable[int]
) -> Iterator[Picture]:
    """Pictures by number, in the order of ``numbers``; neighbours are often of one row, which is read once."""

    def read() -> Iterator[tuple[int, int, int, PreferencePair | RowProblem]]:
        known, pair = -1, None
        for number in numbers:
            row, place = divmod(int(owners[number]), 2)
            known, pair = (row, pair) if row == known else (row, pair_of(table, row))
            yield number, row, place, pair

    return map_ahead(partial(_prepared, transform), read(), workers)


def _prepared(transform: Transform, read: tuple[int, int, int, PreferencePair | RowProblem]) -> Picture:
    number, row, place, pair = read
    if isinstance(pair, RowProblem):  # it could be read when the rows were
        return _blank(transform, number, row, pair.side or "row", pair.origin, pair.reason)
    position, target, side = transform.position(row), transform.square, pair.sides[place]
    try:
        if transform.buckets:
            target = transform.target(pair.side(pair.sides[0]).size())
        image = pair.side(side).open()
    except UnreadableImage as error:
        return _blank(transform, number, row, side, pair.origin, str(error))
    framings = transform.framings(image.size, position, target)
    views = list(zip(transform.views(image, position, target), framings, strict=True))
    return Picture(number, views, row, side, pair.origin)


def _blank(transform: Transform, number: int, *about: Any) -> Picture:
    """Takes the place of a picture that cannot be decoded, so that all others keep theirs."""
    views = [(torch.zeros(3, *transform.square), (0,) * 6)] * (2 if transform.flip else 1)
    return Picture(number, views, *about)


def _encode(encoder: Encoder, dtype: str, transform: Transform, pictures: Sequence[Picture]) -> dict[str, np.ndarray]:
    pixels, framings = zip(*(view for picture in pictures for view in picture.views), strict=True)
    moments = _moments(encoder, pixels)  # each [2, C, h, w]
    found = {"framing": np.array(framings, dtype=np.int32)}
    if transform.buckets:
        found["shape"] = np.array([each.shape[-2:] for each in moments], dtype=np.int32)
        most = max(high * wide for high, wide in transform.shapes) * moments[0][0, 0].numel() // pixels[0][0].numel()
        moments = [F.pad(each.flatten(2), (0, most - each[0, 0].numel())) for each in moments]
    labels = [f"a picture of {picture.origin}" for picture in pictures for _ in picture.views]
    return {"moments": cast(torch.stack(moments), dtype, labels), **found}


@torch.no_grad()
def _moments(encoder: Encoder, pixels: Sequence[Tensor]) -> list[Tensor]:
    """Mean and deviation of each picture, [2, C, h, w]; pictures of one shape go through the encoder together."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, one in enumerate(pixels):
        places.setdefault(tuple(one.shape), []).append(place)
    found: dict[int, Tensor] = {}
    for alike in places.values():
        encoded = encoder.encode_images(torch.stack([pixels[place] for place in alike]))
        found |= zip(alike, torch.stack([encoded["mean"], encoded["std"]], dim=1), strict=True)
    return [found[place] for place in range(len(pixels))]
