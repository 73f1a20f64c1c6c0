"""A data set of pairs: rows as somebody stored them, seen through a layout that knows what the columns mean."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from diffalign.data.pairs import ImageSource, PreferencePair, RowProblem, image_from, number_from


class Rows(Protocol):
    """Rows in some form of storage (``readers/``), read one at a time."""

    columns: tuple[str, ...]
    base: Path | None  # the folder from which relative picture paths start
    description: str  # what this is, for reports

    def __len__(self) -> int: ...

    def row(self, index: int, columns: Sequence[str]) -> Mapping[str, Any]:
        """The named cells of one row. Raises ``RowProblem`` where that row cannot be read."""
        ...

    def column(self, name: str) -> Sequence[Any]:
        """One light column in full; None where a row cannot be read."""
        ...

    def origin(self, index: int) -> str:
        """File and row, for messages."""
        ...

    def identity(self, images: Sequence[str]) -> list[Any]:
        """Plain values that change when the data change; ``images`` names the columns that may hold paths."""
        ...


class Layout(Protocol):
    """What columns mean: a module of ``layouts/``. A role is what a column is for; each has the names it may go by."""

    FORM: str
    REQUIRED: Mapping[str, tuple[str, ...]]
    OPTIONAL: Mapping[str, tuple[str, ...]]
    PROMPT: str
    IMAGES: tuple[str, str]
    LABELS: tuple[str, ...]

    def probability(self, row: Mapping[str, Any]) -> float | None:
        """Probability that the first picture is preferred, from the cells of ``LABELS``; None if nobody said.

        Raises ``ValueError`` with the reason for a label that makes no sense.
        """
        ...


class PairTable:
    """Pairs by index, read when asked for.

    ``table[i]`` raises ``RowProblem`` for a row that cannot be used; pictures are decoded only by ``ImageSource.open``.
    ``left_out`` counts the rows that were left out when the data set was opened, by reason.
    """

    def __init__(
        self, rows: Rows, layout: Layout, names: Mapping[str, str], kept: Sequence[int], ties: str, left_out: Mapping[str, int]
    ) -> None:
        self._rows, self._layout, self._names, self._kept = rows, layout, dict(names), kept
        self.ties = ties
        self.left_out = dict(left_out)
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> PreferencePair:
        where = self._kept[self._checked(index)]
        origin = self._rows.origin(where)
        found = self._rows.row(where, tuple(self._names.values()))
        cells = {role: found.get(name) for role, name in self._names.items()}
        return self._pair(cells, origin)

    def __iter__(self) -> Iterator[PreferencePair]:
        return (self[i] for i in range(len(self)))

    def origin(self, index: int) -> str:
        """File and row of pair ``index``, without reading it."""
        return self._rows.origin(self._kept[self._checked(index)])

    @property
    def description(self) -> str:
        """One line: where the data are, in which form, and how many rows."""
        left = "".join(f", {n} {why} left out" for why, n in self.left_out.items() if n)
        return f"{self._rows.description}: {self._layout.FORM}, {len(self)} pairs{left}"

    @property
    def fingerprint(self) -> str:
        """sha256 of the files' identity (names, and content or size and time) and of how they are read."""
        if self._fingerprint is None:
            images = [self._names[role] for role in self._layout.IMAGES]
            parts = [self._rows.identity(images), self._names, self.ties, len(self)]
            self._fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        return self._fingerprint

    def _checked(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        return index % len(self)

    def _pair(self, cells: Mapping[str, Any], origin: str) -> PreferencePair:
        try:
            probability = self._layout.probability(cells)
            if probability is None:
                raise ValueError("nobody said which picture is preferred")
            weight = cells.get("weight")
            weight = 1.0 if weight in (None, "") else number_from(weight, self._names["weight"], 0.0, math.inf)
            prompt = _prompt(cells[self._layout.PROMPT], self._names[self._layout.PROMPT])
            order = self._layout.IMAGES if probability >= 0.5 else self._layout.IMAGES[::-1]
        except ValueError as error:
            raise RowProblem(origin, None, str(error)) from error
        winner, loser = (self._image(cells[role], side, origin) for role, side in zip(order, ("winner", "loser"), strict=True))
        return PreferencePair(prompt, winner, loser, max(probability, 1.0 - probability), weight, origin)

    def _image(self, cell: Any, side: str, origin: str) -> ImageSource:
        try:
            return image_from(cell, self._rows.base)
        except ValueError as error:
            raise RowProblem(origin, side, str(error)) from error


def _prompt(value: Any, name: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {type(value).__name__}, not text")
    return value.strip()
