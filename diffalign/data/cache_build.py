"""Filling a cache with pictures: the stream of rows into image shards. Goes on where a journal ends."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.data.ahead import map_ahead
from diffalign.data.buckets import Shape
from diffalign.data.cache_files import CacheFolder, ShardWriter, journal_name
from diffalign.data.cache_values import cast
from diffalign.data.pairs import ImageSource, PreferencePair, Progress, RowProblem, UnreadableImage
from diffalign.data.table import Kind, PairTable
from diffalign.data.transform import Framing, Position, Transform
from diffalign.errors import UserError
from diffalign.protocols import Encoder

COLUMNS = [
    *[(name, "<i8") for name in ("row", "winner", "loser", "prompt")],
    *[(name, "<f4") for name in ("label", "weight", "winner_score", "loser_score")],
]
NAMED = 5  # unreadable rows named in a refusal


@dataclass
class Images:
    """What the image phase knows; the committed part of it is what the journal holds."""

    pairs: list[dict[str, Any]] = field(default_factory=list)  # by ``COLUMNS``, with items for pictures and text for the prompt
    skipped: list[tuple[str, str]] = field(default_factory=list)  # origin, reason
    keys: dict[str, int] = field(default_factory=dict)  # content and crop -> number of the first orientation
    items: int = 0
    next_row: int = 0
    per_shard: int | None = None


@dataclass(frozen=True)
class _Prepared:
    """A pair ready for the encoder: per picture its key, and its orientations where they are not yet known."""

    pair: PreferencePair
    keys: tuple[str, ...]
    views: tuple[list[View] | None, ...]


View = tuple[Tensor, Framing]
"""Pixels [3, H, W] in [-1, 1], and how they were cut from the picture."""


def refuse_unreadable(skipped: Sequence[tuple[str, str]], total: int, limit: float, kind: Kind) -> None:
    """Raises ``UserError`` if more than the share ``limit`` of ``total`` pairs (or pictures) was skipped."""
    if len(skipped) <= limit * total:
        return
    first = "; ".join(f"{origin}: {reason}" for origin, reason in skipped[:NAMED])
    more = f"; and {len(skipped) - NAMED} more" if len(skipped) > NAMED else ""
    raise UserError(
        f"{len(skipped)} of {total} {kind} cannot be used, which is more than the limit of {limit:.2%}: {first}{more}. "
        "Repair or remove them (`diffalign data check` lists them all), or raise the limit (max_unreadable)."
    )


# -------------------------------------------------------------------------------------------------------------------- images


def fill_images(
    folder: CacheFolder,
    table: PairTable,
    encoder: Encoder,
    transform: Transform,
    *,
    batch_size: int,
    shard_items: int,
    dtype: str,
    max_unreadable: float,
    workers: int,
    progress: Progress | None,
) -> Images:
    """Encode every picture that is not committed yet; returns the whole index."""
    journal = folder.journal("images")
    state, shards = _restored(journal)
    phase = _ImagePhase(folder, state, len(journal))
    encode = partial(_encode_images, encoder, dtype, transform)
    stride = 2 if transform.flip else 1
    phase.writer = ShardWriter(
        folder, "images", encode, batch_size=batch_size, shard_items=shard_items, stride=stride, committed=phase.commit
    )
    phase.writer.resume(shards, state.per_shard)
    refuse_unreadable(state.skipped, len(table), max_unreadable, table.kind)
    start, skipped = state.next_row, len(state.skipped)
    for row, outcome in enumerate(_prepared(table, start, transform, phase.keys, workers), start):
        phase.take(row, outcome)
        if isinstance(outcome, RowProblem):
            skipped += 1
            if skipped > max_unreadable * len(table):
                refuse_unreadable([*state.skipped, *phase.waiting_problems()], len(table), max_unreadable, table.kind)
        if progress:
            progress("images", row + 1, len(table))
    if start < len(table):
        phase.writer.flush()
    if not state.pairs:
        raise UserError(f"None of the {len(table)} {table.kind} can be used; `diffalign data check` says why.")
    return state


class _ImagePhase:
    """Rows wait here until a shard is committed; then the journal names them.

    A shard is committed at the moment its last picture is added and both orientations of a picture share a shard, so all
    pictures of the rows that wait are committed with it. The row being taken is not among them yet.
    """

    def __init__(self, folder: CacheFolder, state: Images, entries: int) -> None:
        self._folder, self._state, self._entries = folder, state, entries
        self.keys = dict(state.keys)  # also what is not committed yet
        self._added = state.items
        self._waiting: list[RowProblem | dict[str, Any]] = []
        self._new_keys: dict[str, int] = {}
        self.writer: ShardWriter

    def take(self, row: int, outcome: _Prepared | RowProblem) -> None:
        if isinstance(outcome, RowProblem):
            self._waiting.append(outcome)
            return
        pair = outcome.pair
        items = [self._item(key, views, pair.origin) for key, views in zip(outcome.keys, outcome.views, strict=True)]
        scores = dict(zip(("winner_score", "loser_score"), pair.scores or (None, None), strict=True))
        record = {"row": row, "winner": items[0], "loser": items[-1], "prompt": pair.prompt}
        self._waiting.append(record | {"label": pair.label, "weight": pair.weight, **scores, "origin": pair.origin})

    def _item(self, key: str, views: list[View] | None, origin: str) -> int:
        if key not in self.keys:
            assert views is not None, "a picture that is not known comes with its pixels"
            self.keys[key] = self._new_keys[key] = self._added
            self._added += len(views)
            for view in views:
                self.writer.add(view, origin)
        return self.keys[key]

    def commit(self, shards: int, items: int) -> None:
        """Called by the writer when a shard is on the disk."""
        state, ready = self._state, self._waiting
        state.items += items
        state.next_row += len(ready)
        state.per_shard = self.writer.per_shard
        assert state.items == self._added, "a commit covers every picture that was added"
        entry = {
            "shards": shards,
            "items": state.items,
            "per_shard": state.per_shard,
            "next_row": state.next_row,
            "keys": self._new_keys,
            "pairs": [r for r in ready if isinstance(r, dict)],
            "skipped": [[r.origin, _reason(r)] for r in ready if isinstance(r, RowProblem)],
        }
        self._folder.write_json(journal_name("images", self._entries), entry)
        self._entries += 1
        self._waiting, self._new_keys = [], {}
        _extend(state, entry)

    def waiting_problems(self) -> list[tuple[str, str]]:
        return [(r.origin, _reason(r)) for r in self._waiting if isinstance(r, RowProblem)]


def _restored(journal: Sequence[Mapping[str, Any]]) -> tuple[Images, int]:
    """The committed state, and the number of shards."""
    state = Images()
    for entry in journal:
        _extend(state, entry)
    if not journal:
        return state, 0
    last = journal[-1]
    state.items, state.next_row, state.per_shard = last["items"], last["next_row"], last["per_shard"]
    return state, last["shards"]


def _extend(state: Images, entry: Mapping[str, Any]) -> None:
    state.pairs.extend(entry["pairs"])
    state.skipped.extend((origin, reason) for origin, reason in entry["skipped"])
    state.keys.update(entry["keys"])


def _reason(problem: RowProblem) -> str:
    return f"{problem.side}: {problem.reason}" if problem.side else problem.reason


def _prepared(
    table: PairTable, start: int, transform: Transform, known: Mapping[str, int], workers: int
) -> Iterator[_Prepared | RowProblem]:
    """Every row from ``start``, in order. ``known`` grows meanwhile; a picture decoded in vain is dropped later."""

    def read() -> Iterator[tuple[int, PreferencePair | RowProblem]]:
        for row in range(start, len(table)):
            try:
                yield row, table[row]
            except RowProblem as problem:
                yield row, problem

    def prepare(read_row: tuple[int, PreferencePair | RowProblem]) -> _Prepared | RowProblem:
        row, pair = read_row
        if isinstance(pair, RowProblem):
            return pair
        position, target, keys, views = transform.position(row), transform.square, [], []
        for side in pair.sides:
            try:
                source = pair.side(side).held()
                if transform.buckets and side == pair.sides[0]:
                    target = transform.target(source.size())
                keys.append(_key(source, transform, position, target))
                views.append(None if keys[-1] in known else _views(source, transform, position, target))
            except UnreadableImage as error:
                return RowProblem(pair.origin, side, str(error))
        return _Prepared(pair, tuple(keys), tuple(views))

    return map_ahead(prepare, read(), workers)


def _views(source: ImageSource, transform: Transform, position: Position, target: Shape) -> list[View]:
    image = source.open()
    framings = transform.framings(image.size, position, target)
    return list(zip(transform.views(image, position, target), framings, strict=True))


def _key(source: ImageSource, transform: Transform, position: Position, target: Shape) -> str:
    """What makes two encodings equal: the file's content, and the crop where it is drawn, and the shape where there are several.
    32 hexadecimal digits."""
    place = ("" if transform.crop == "center" else repr(position)) + (repr(target) if transform.buckets else "")
    return hashlib.sha256((source.digest() + place).encode()).hexdigest()[:32]


def _encode_images(
    encoder: Encoder, dtype: str, transform: Transform, views: list[View], origins: list[str]
) -> dict[str, np.ndarray]:
    pixels, framings = zip(*views, strict=True)
    moments = _moments(encoder, pixels)  # each [2, C, h, w]
    found = {"framing": np.array(framings, dtype=np.int32)}
    if transform.buckets:
        found["shape"] = np.array([each.shape[-2:] for each in moments], dtype=np.int32)
        most = max(high * wide for high, wide in transform.shapes) * moments[0][0, 0].numel() // pixels[0][0].numel()
        moments = [F.pad(each.flatten(2), (0, most - each[0, 0].numel())) for each in moments]
    labels = [f"a picture of {origin}" for origin in origins]
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
