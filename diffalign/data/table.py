"""A data set of pairs or of single pictures: rows as somebody stored them, seen through a layout that knows what columns mean."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from diffalign.data.pairs import (
    LOSER,
    PICTURE,
    WINNER,
    ImageSource,
    PreferencePair,
    RowProblem,
    image_from,
    number_from,
    printable,
    score_from,
    text_from,
)
from diffalign.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa


Kind = Literal["pairs", "pictures"]
"""What a row is: two pictures, or a single one. Also the noun for several of them, in messages."""


class Rows(Protocol):
    """Rows in some form of storage (``readers/``), read one at a time."""

    columns: tuple[str, ...]
    base: Path | None  # the folder from which relative picture paths start
    description: str  # what this is, for reports

    def __len__(self) -> int: ...

    def row(self, index: int, columns: Sequence[str]) -> Mapping[str, Any]:
        """The named cells of one row. Raises ``RowProblem`` where that row cannot be read."""
        ...

    def cells(self, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """The named cells of every row, of light columns; None where a row cannot be read."""
        ...

    def schema(self) -> pa.Schema | None:
        """Arrow's types of the columns, where the storage states them."""
        ...

    def origin(self, index: int) -> str:
        """File and row, for messages."""
        ...

    def identity(self, images: Sequence[str], others: Sequence[str]) -> list[Any] | Iterator[Any]:
        """Plain values that change when the data change; an iterator stands for the list of what it gives.

        ``images`` names the columns that hold pictures or their paths, ``others`` the rest of those that are used.
        """
        ...


class Layout(Protocol):
    """What columns mean: a module of ``layouts/``. A role is what a column is for; each has the names it may go by."""

    FORM: str
    KIND: Kind
    REQUIRED: Mapping[str, tuple[str, ...]]
    OPTIONAL: Mapping[str, tuple[str, ...]]
    PROMPT: str
    IMAGES: tuple[str, str]  # the first and the second; of single pictures twice the same role
    LABELS: tuple[str, ...]
    SCORES: tuple[str, str]  # of ``IMAGES``

    def probability(self, row: Mapping[str, Any]) -> float | None:
        """Probability that the first picture is preferred (that the only one is wanted), from ``LABELS``; None if nobody said.

        Raises ``ValueError`` with the reason for a label that makes no sense.
        """
        ...


@dataclass(frozen=True)
class StoredPair:
    """A pair and the row that it was read from, for those who write the data again."""

    pair: PreferencePair
    cells: Mapping[str, Any]  # of all columns
    images: tuple[ImageSource, ImageSource]  # in the order of ``PairTable.image_columns``, whichever is preferred
    probability: float  # that the first of them is preferred


@dataclass(frozen=True)
class Shown:
    """A picture, the prompt it was shown for, and its place."""

    prompt: str
    image: ImageSource
    origin: str  # file and row
    column: str


def check_table(table: object) -> None:
    """Raises ``UserError`` for what is no opened table, such as the name of its file."""
    if not hasattr(table, "kind"):
        what = f"{table!r}" if isinstance(table, str | Path) else f"a {type(table).__name__}"
        raise UserError(f"This takes a table of preference data, opened by open_pairs(...); got {what}.")


class PairTable:
    """Pairs by index, read at every access. Where ``kind`` is "pictures", each is a single picture on both sides.

    ``table[i]`` raises ``RowProblem`` for a row that cannot be used; pictures are decoded only by ``ImageSource.open``.
    ``rows`` is what they are read from: all of its rows and columns, also those that are not used.
    ``left_out`` counts the rows that were left out when the data set was opened, by reason.
    """

    def __init__(
        self, rows: Rows, layout: Layout, names: Mapping[str, str], kept: Sequence[int], ties: str, left_out: Mapping[str, int]
    ) -> None:
        self.rows = rows
        self._layout, self._names, self._kept = layout, dict(names), kept
        self.ties = ties
        self.left_out = dict(left_out)
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> PreferencePair:
        where = self._kept[self._checked(index)]
        found = self.rows.row(where, tuple(self._names.values()))
        return self._pair(self._by_role(found), self._origin(where))

    @property
    def kind(self) -> Kind:
        return self._layout.KIND

    def __iter__(self) -> Iterator[PreferencePair]:
        return (self[i] for i in range(len(self)))

    def stored(self, index: int) -> StoredPair:
        """Pair ``index`` as it is stored. Raises ``RowProblem`` where ``table[index]`` does."""
        where = self._kept[self._checked(index)]
        cells = self.rows.row(where, self.rows.columns)
        by_role = self._by_role(cells)
        pair = self._pair(by_role, self._origin(where))
        probability = self._layout.probability(by_role)
        images = (pair.winner, pair.loser) if probability >= 0.5 else (pair.loser, pair.winner)
        return StoredPair(pair, cells, images, probability)

    def shown(self, row: int) -> Iterator[Shown | RowProblem]:
        """Every picture of a row of ``rows``, also of one that is left out or whose label makes no sense."""
        columns, prompt = tuple(dict.fromkeys(self.image_columns)), self._names[self._layout.PROMPT]
        origin = self._origin(row)
        try:
            cells = self.rows.row(row, (prompt, *columns))
            text = _prompt(cells[prompt], prompt)
        except RowProblem as problem:
            yield problem
            return
        except ValueError as error:
            yield RowProblem(origin, None, str(error))
            return
        for column in columns:
            try:
                yield Shown(text, self._image(cells[column], column, origin), origin, column)
            except RowProblem as problem:
                yield problem

    @property
    def image_columns(self) -> tuple[str, str]:
        """The columns that hold the first and the second picture."""
        first, second = (self._names[role] for role in self._layout.IMAGES)
        return first, second

    @property
    def sides(self) -> tuple[str, str]:
        """What the first and the second picture are called in this kind of data: 0 and 1, or chosen and rejected."""
        return _sides(self._layout)

    @property
    def scored(self) -> bool:
        """Whether there are columns for a judge's scores."""
        return all(role in self._names for role in self._layout.SCORES)

    @property
    def label_columns(self) -> tuple[str, ...]:
        """The columns for the probability of the first picture, which need not be there, and of the second, if that is there."""
        first = self._layout.LABELS[0]
        columns = (self._names.get(first, first), self._names.get("label_1"))
        return tuple(column for column in columns if column is not None)

    def score_columns(self, judge: str) -> tuple[str, str]:
        """The columns for a judge's scores of the first and of the second picture."""
        return score_columns(self._layout, judge)

    def origin(self, index: int) -> str:
        """File and row of pair ``index``, without reading it."""
        return self._origin(self._kept[self._checked(index)])

    def _origin(self, row: int) -> str:
        return printable(self.rows.origin(row))

    @property
    def description(self) -> str:
        """One line: where the data are, in which form, and how many rows."""
        left = "".join(f", {n} {why} left out" for why, n in self.left_out.items() if n)
        return f"{printable(self.rows.description)}: {self._layout.FORM}, {len(self)} {self.kind}{left}"

    @property
    def fingerprint(self) -> str:
        """sha256 of the files' identity (names, sizes, and content or samples of it) and of how they are read."""
        if self._fingerprint is None:
            others = [name for name in dict.fromkeys(self._names.values()) if name not in self.image_columns]
            digest = hashlib.sha256()
            for piece in _json([self.rows.identity(self.image_columns, others), self._names, self.ties, len(self)]):
                digest.update(piece.encode())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def _checked(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} {self.kind}")
        return index % len(self)

    def _by_role(self, cells: Mapping[str, Any]) -> dict[str, Any]:
        return {role: cells.get(name) for role, name in self._names.items()}

    def _pair(self, cells: Mapping[str, Any], origin: str) -> PreferencePair:
        try:
            probability = self._layout.probability(cells)
            if probability is None:
                raise ValueError("nobody said which picture is preferred")
            weight = cells.get("weight")
            weight = 1.0 if weight in (None, "") else number_from(weight, self._names["weight"], 0.0, math.inf)
            prompt = _prompt(cells[self._layout.PROMPT], self._names[self._layout.PROMPT])
            scores = self._larger_is_better(cells)
        except ValueError as error:
            raise RowProblem(origin, None, str(error)) from error
        if self.kind == "pictures":
            picture = self._image(cells[self._layout.IMAGES[0]], PICTURE, origin)
            return PreferencePair(prompt, picture, picture, probability, weight, origin, scores, single=True)
        order = self._layout.IMAGES
        if probability < 0.5:
            order, scores = order[::-1], scores and scores[::-1]
        winner, loser = (self._image(cells[role], side, origin) for role, side in zip(order, (WINNER, LOSER), strict=True))
        return PreferencePair(prompt, winner, loser, max(probability, 1.0 - probability), weight, origin, scores)

    def _larger_is_better(self, cells: Mapping[str, Any]) -> tuple[float, float] | None:
        """The scores of both pictures, turned round where the judge likes small ones; None unless both are there."""
        first, second = (score_from(cells.get(role), self._names.get(role, role)) for role in self._layout.SCORES)
        if first is None or second is None:
            return None
        return (-first, -second) if str(cells.get(LOWER)).lower() in ("true", "1") else (first, second)

    def _image(self, cell: Any, side: str, origin: str) -> ImageSource:
        try:
            return image_from(cell, self.rows.base)
        except ValueError as error:
            raise RowProblem(origin, side, str(error)) from error


LOWER = "lower_is_better"
"""The column after a judge's name, and the role, that says so of its scores; absent of other judges."""


def score_columns(layout: Layout, judge: str) -> tuple[str, str]:
    """Where the scores of a judge stand in data of this layout, as ``diffalign relabel`` writes them."""
    first, second = _sides(layout)
    return f"{judge}_{first}", f"{judge}_{second}"


def _sides(layout: Layout) -> tuple[str, str]:
    first, second = (role.rpartition("_")[2] for role in layout.SCORES)
    return first, second


def _json(value: Any) -> Iterator[str]:
    """``json.dumps`` in pieces, so that a list of a million files need not exist; iterators become lists."""
    if isinstance(value, Iterator):
        yield "["
        comma = ""
        while some := list(islice(value, 1024)):
            yield comma + json.dumps(some, sort_keys=True)[1:-1]
            comma = ", "
        yield "]"
    elif isinstance(value, list):
        yield "["
        for number, inner in enumerate(value):
            yield ", " if number else ""
            yield from _json(inner)
        yield "]"
    else:
        yield json.dumps(value, sort_keys=True)


def _prompt(value: Any, name: str) -> str:
    return "" if value is None else text_from(value, name)
