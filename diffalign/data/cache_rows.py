"""What the rows of a data set say, before anything is encoded: read in parts, then numbered together.

A part is read by one process and forgotten; on the disk it leaves the numbers of its rows, the texts, and a key for every
picture: what its encoding depends on. Joined, equal keys get one number and equal prompts another, by first appearance, so that
both are encoded once, whoever read them. Every picture belongs to the first row that shows it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffalign.data.ahead import map_ahead
from diffalign.data.buckets import Shape
from diffalign.data.cache_files import CacheFolder
from diffalign.data.cache_shards import Share, share_of
from diffalign.data.cache_values import FillOptions, Numbering, Shards, Strings, mapped, npy_header
from diffalign.data.pairs import LOSER, PICTURE, WINNER, ImageSource, PreferencePair, Progress, RowProblem, UnreadableImage
from diffalign.data.table import Kind, PairTable
from diffalign.data.transform import Position, Transform
from diffalign.errors import UserError
from diffalign.processes import Processes

PART = 4096
"""Rows that are read at a time; a kill costs each process the part that it was about."""
VALUES = [(name, "<f4") for name in ("label", "weight", "winner_score", "loser_score")]
BUCKET = ("bucket", "<i4")
KEYS = np.dtype([("row", "<i8"), ("winner", "V16"), ("loser", "V16"), BUCKET, *VALUES])
COLUMNS = np.dtype([*((name, "<i8") for name in ("row", "winner", "loser", "prompt")), BUCKET, *VALUES])
Skipped = tuple[int, str, str]
"""Row, origin, reason."""
NAMED = 5  # unreadable rows named in a refusal


class Rows:
    """The rows of ``table`` on their way into ``folder``. A picture has ``stride`` orientations, which are items of their own."""

    def __init__(
        self,
        folder: CacheFolder,
        table: PairTable,
        transform: Transform,
        options: FillOptions,
        progress: Progress | None,
    ) -> None:
        self._folder, self._table, self._transform = folder, table, transform
        self._options, self._progress = options, progress
        self._parts = math.ceil(len(table) / PART)
        self._stride = 2 if transform.flip else 1
        self._sides = (PICTURE,) if table.kind == "pictures" else (WINNER, LOSER)
        self._skipped: list[Skipped] = []

    # ------------------------------------------------------------------------------------------------------------ reading

    def read(self, share: Share, processes: Processes) -> None:
        """Read what is missing of a share of the parts, then what other jobs have not read: none waits for one that is not there.

        Nothing more of a cache that another job completes meanwhile. All processes must call it.
        """
        if processes.all_gather_object(self._joined)[0]:
            return
        self._read(share_of(self._parts, share))
        missing = processes.all_gather_object([part for part in range(self._parts) if not self._there(part)])[0]
        self._read(missing[::-1][processes.rank :: processes.world])  # from the end: their own jobs come from the beginning
        processes.all_gather_object(None)

    def _there(self, part: int) -> bool:
        return (self._folder.root / _name(part, "json")).exists()

    def _read(self, parts: list[int] | range) -> None:
        with self._folder.unless_complete():
            for part in parts:
                if not (self._there(part) or self._folder.complete):
                    self._read_part(part)

    def _read_part(self, part: int) -> None:
        """The numbers, then the texts, which commit the part."""
        rows = range(part * PART, min((part + 1) * PART, len(self._table)))
        kept, texts, skipped = [], {"prompts": [], "origins": []}, []
        for row, outcome in zip(rows, map_ahead(self._keyed, self._pairs(rows), self._options.workers), strict=True):
            if isinstance(outcome, RowProblem):
                skipped.append((row, outcome.origin, _reason(outcome)))
            else:
                pair, keys, bucket = outcome
                kept.append((row, keys[0], keys[-1], bucket, pair.label, pair.weight, *(pair.scores or (np.nan, np.nan))))
                texts["prompts"].append(pair.prompt)
                texts["origins"].append(pair.origin)
            if self._progress:
                self._progress("rows", row + 1, len(self._table))
        self._folder.write(_name(part, "npy"), np.array(kept, dtype=KEYS))
        self._folder.write_json(_name(part, "json"), {**texts, "skipped": skipped})
        self._skipped += skipped
        self.refuse([])

    def refuse(self, more: Sequence[Skipped]) -> None:
        """Raises ``UserError`` if more rows than the limit cannot be used: those met in reading, and ``more``."""
        found = sorted({*self._skipped, *more})
        named = [(origin, why) for _, origin, why in found]
        refuse_unreadable(named, len(self._table), self._options.max_unreadable, self._table.kind)

    def refuse_none(self, usable: int) -> None:
        """Raises ``UserError`` if nothing is usable."""
        if not usable:
            raise UserError(f"None of the {len(self._table)} {self._table.kind} can be used; `diffalign data check` says why.")

    def _pairs(self, rows: range) -> Iterator[tuple[int, PreferencePair | RowProblem]]:
        for row in rows:
            yield row, pair_of(self._table, row)

    def _keyed(self, read: tuple[int, PreferencePair | RowProblem]) -> tuple[PreferencePair, list[bytes], int] | RowProblem:
        """A pair, the keys of its pictures, and which of the transform's shapes it is cut to."""
        row, pair = read
        if isinstance(pair, RowProblem):
            return pair
        position, target, keys = self._transform.position(row), self._transform.square, []
        for side in pair.sides:
            try:
                source = pair.side(side).held()
                if self._transform.buckets and side == pair.sides[0]:
                    target = self._transform.target(source.size())
                keys.append(_key(source, self._transform, position, target))
            except UnreadableImage as error:
                return RowProblem(pair.origin, side, str(error))
        return pair, keys, self._transform.shapes.index(target)

    # ------------------------------------------------------------------------------------------------------------ joining

    @property
    def _joined(self) -> bool:
        return (self._folder.root / "rows/joined.json").exists()

    def join(self) -> None:
        """Number pictures and prompts of all parts, which must be there; nothing is kept in memory but one part."""
        if self._joined:
            return
        skipped: list[Skipped] = []
        with contextlib.ExitStack() as stack:
            pictures, prompts = (stack.enter_context(contextlib.closing(Numbering())) for _ in range(2))
            write_pairs, write_owners = (stack.enter_context(self._folder.writing(name)) for name in (PAIRS, OWNERS))
            write_prompts = stack.enter_context(Strings.writing(self._folder, "prompts"))
            prompts.of([b""])
            write_prompts([""])
            for part in range(self._parts):
                keys, texts = self._part(part)
                pairs = np.empty(len(keys), COLUMNS)
                for name, _ in (("row", "<i8"), BUCKET, *VALUES):
                    pairs[name] = keys[name]
                shown, new = pictures.of(np.stack([keys["winner"], keys["loser"]], axis=1).ravel().tolist())
                pairs["winner"], pairs["loser"] = np.array(shown, dtype=np.int64).reshape(-1, 2).T * self._stride
                write_owners((2 * keys["row"][new // 2] + new % 2).astype("<i8").tobytes())
                pairs["prompt"], new = prompts.of([text.encode("utf-8", "surrogatepass") for text in texts["prompts"]])
                write_prompts(texts["prompts"][place] for place in new)
                write_pairs(pairs.tobytes())
                skipped += texts["skipped"]
            counts = {"pictures": len(pictures), "prompts": len(prompts)}
        self._folder.write_json(JOINED, {**counts, "skipped": skipped})

    def _part(self, part: int) -> tuple[np.ndarray, dict[str, Any]]:
        return Shards(self._folder).load(_name(part, "npy")), self._folder.read_json(_name(part, "json"))

    # ---------------------------------------------------------------------------------------------------------- afterwards

    def index(self) -> Index:
        """The rows as they were joined."""
        about = self._folder.read_json(JOINED)
        pairs, owners = mapped(self._folder, PAIRS, COLUMNS), mapped(self._folder, OWNERS, "<i8")
        return Index(pairs, owners, Strings(self._folder, "prompts"), [tuple(one) for one in about["skipped"]])

    def finish(self, broken: Mapping[int, str]) -> dict[str, Any]:
        """The index of the cache, without the rows that show one of the ``broken`` pictures (why, by number); what it has."""
        index = self.index()
        lost = index.rows_with(broken, self._stride, self._sides)
        self.refuse_none(len(index.pairs) - len(lost))
        skipped, start, scored = list(index.skipped), 0, False
        with self._folder.writing("pairs.npy") as write, Strings.writing(self._folder, "origins") as write_origins:
            write(npy_header(COLUMNS, len(index.pairs) - len(lost)))
            for part in range(self._parts):
                origins = self._part(part)[1]["origins"]
                pairs = np.array(index.pairs[start : (start := start + len(origins))])
                kept = [row not in lost for row in pairs["row"].tolist()]
                write(pairs[kept].tobytes())
                write_origins(itertools.compress(origins, kept))
                gone = [place for place, stays in enumerate(kept) if not stays]
                skipped += [(int(pairs["row"][place]), origins[place], lost[int(pairs["row"][place])]) for place in gone]
                scored = scored or not np.isnan(pairs[kept]["winner_score"]).all()
        self._folder.write_json("skipped.json", [[origin, reason] for _, origin, reason in sorted(skipped)])
        return {"scored": scored, "skipped": len(skipped)}

    def forget(self) -> None:
        """Remove what a complete cache does not need."""
        shutil.rmtree(self._folder.root / "rows", ignore_errors=True)


PAIRS, OWNERS, JOINED = "rows/joined.pairs", "rows/joined.owners", "rows/joined.json"


@dataclass(frozen=True)
class Index:
    """The rows of a data set that can be read, numbered. P pictures."""

    pairs: np.ndarray  # [N] of ``COLUMNS``; pictures by their first item
    owners: np.ndarray  # [P] twice the row to which the picture belongs, and one more if it is the loser's
    prompts: Strings  # by number, the empty one first
    skipped: list[Skipped]

    def rows_with(self, broken: Mapping[int, str], stride: int, sides: Sequence[str]) -> dict[int, str]:
        """The rows that show one of these pictures, and why that is none; where both are broken it is the first's."""
        items, lost = np.array(sorted(broken), dtype=np.int64) * stride, {}
        for low in range(0, len(self.pairs) if broken else 0, PART):
            some = self.pairs[low : low + PART]
            for side in reversed(sides):
                column = WINNER if side == PICTURE else side
                found = some[np.isin(some[column], items)]
                shown = zip(found["row"].tolist(), found[column].tolist(), strict=True)
                lost |= {row: f"{side}: {broken[item // stride]}" for row, item in shown}
        return lost


def refuse_unreadable(skipped: Sequence[tuple[str, str]], total: int, limit: float, kind: Kind) -> None:
    """Raises ``UserError`` if more than the share ``limit`` of ``total`` pairs (or pictures) was skipped (origin, reason)."""
    if len(skipped) <= limit * total:
        return
    first = "; ".join(f"{origin}: {reason}" for origin, reason in skipped[:NAMED])
    more = f"; and {len(skipped) - NAMED} more" if len(skipped) > NAMED else ""
    raise UserError(
        f"{len(skipped)} of {total} {kind} cannot be used, which is more than the limit of {limit:.2%}: {first}{more}. "
        "Repair or remove them (`diffalign data check` lists them all), or raise the limit (max_unreadable)."
    )


def pair_of(table: PairTable, row: int) -> PreferencePair | RowProblem:
    """A row of a table, or what is wrong with it."""
    try:
        return table[row]
    except RowProblem as problem:
        return problem


def _reason(problem: RowProblem) -> str:
    return f"{problem.side}: {problem.reason}" if problem.side else problem.reason


def _name(part: int, kind: str) -> str:
    return f"rows/{part:05d}.{kind}"


def _key(source: ImageSource, transform: Transform, position: Position, target: Shape) -> bytes:
    """What makes two encodings equal: the file's content, and the crop where it is drawn, and the shape where there are several.
    16 bytes."""
    place = ("" if transform.crop == "center" else repr(position)) + (repr(target) if transform.buckets else "")
    return hashlib.sha256((source.digest() + place).encode()).digest()[:16]
