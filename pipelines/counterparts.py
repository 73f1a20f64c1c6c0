"""Assignment of ``prompt_id`` and ``sample`` in a table of scores, by which pictures of several systems are paired.

Pictures of one prompt are paired by their seeds; else by their names, where ``7`` equals ``007``; else, where no names are
equal, by their order. Pairing by order at once would shift all pictures after a missing one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
"""A picture: its ``system``, ``picture`` (a path, or the number of one that has no name), ``prompt`` and, if known, ``seed``."""


def numbered(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """``prompt_id`` and ``sample`` of each picture, equal in two systems where pictures belong together.

    Prompts are numbered as they come. A picture without one stands for a prompt of its own, with its counterparts.
    """
    of_prompt: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        of_prompt.setdefault(row["prompt"] or "", []).append(i)
    places: dict[int, int] = {}
    for of_one in of_prompt.values():
        places.update(zip(of_one, _places([rows[i] for i in of_one]), strict=True))
    ids: dict[str | int, int] = {}
    units = [row["prompt"] or places[i] for i, row in enumerate(rows)]
    return [(ids.setdefault(unit, len(ids)), places[i] if rows[i]["prompt"] else 0) for i, unit in enumerate(units)]


def name_of(picture: Any) -> str | int | None:
    """The name of a file without folder and ending, as a number if it is one; None for what is no file."""
    if not isinstance(picture, str):
        return None
    stem = Path(picture).stem
    return int(stem) if stem.isdecimal() else stem


def _seed(row: Row) -> Hashable:
    return row.get("seed")


def _name(row: Row) -> Hashable:
    return name_of(row["picture"])


def _whole_name(row: Row) -> Hashable:
    return Path(row["picture"]).name if isinstance(row["picture"], str) else None


_WAYS: tuple[Callable[[Row], Hashable], ...] = (_seed, _name, _whole_name)
"""The first that tells a system's pictures apart and finds counterparts counts; the last tells ``a.png`` from ``a.jpg``."""


def _places(rows: Sequence[Row]) -> list[int]:
    """Place of each picture of one prompt, system after system; counterparts have equal places."""
    systems: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        systems.setdefault(row["system"], []).append(i)
    before: list[tuple[list[Row], list[int]]] = []
    for numbers in systems.values():
        mine = [rows[i] for i in numbers]
        before.append((mine, _places_among(before, mine)))
    of_row = {i: place for numbers, (_, places) in zip(systems.values(), before) for i, place in zip(numbers, places)}
    return [of_row[i] for i in range(len(rows))]


def _places_among(before: Sequence[tuple[Sequence[Row], Sequence[int]]], rows: Sequence[Row]) -> list[int]:
    """The places of one system's pictures among those of the systems before it; new ones for what has no counterpart there."""
    new = itertools.count(max((place + 1 for _, places in before for place in places), default=0))
    for way in _WAYS:
        known = {key: place for others, places in reversed(before) for key, place in zip(_keys(others, way), places)}
        found = [known.get(key) for key in _keys(rows, way)]
        counterparts = [place for place in found if place is not None]
        if counterparts and len(counterparts) == len(set(counterparts)):
            return [next(new) if place is None else place for place in found]
    return list(range(len(rows)))


def _keys(rows: Sequence[Row], way: Callable[[Row], Hashable]) -> list[Hashable]:
    """Key of each picture of a system; an empty list where a picture has none, or two have the same."""
    keys = [way(row) for row in rows]
    return keys if None not in keys and len(keys) == len(set(keys)) else []
