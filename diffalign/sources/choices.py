"""What people said about pictures, from a JSONL with a line for each choice, or for each picture:

    {"chosen": "00012-1", "rejected": "00012-0"}                  "label": 0.5 beside them is a tie, 1 (the default) is sure
    {"picture": "00012-1", "score": 4}                            every two pictures of a prompt with unequal scores are a pair

Scores are how D3PO's released code learns from people: seven pictures for a prompt, all 21 pairs, equal labels skipped. Other
fields of a line (who, when) are ignored, except for ``judges``, which says that machines chose.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from diffalign.errors import UserError
from diffalign.sources.store import TrajectoryOrigin

CHOICES = "choices.jsonl"
FORMS = '{"chosen": "00012-1", "rejected": "00012-0"} or {"picture": "00012-1", "score": 4}'


@dataclass(frozen=True)
class Choices:
    """Pairs of trajectories, by number, with the probability that the first is preferred."""

    pairs: tuple[tuple[int, int], ...]
    labels: tuple[float, ...]
    skipped: int  # pairs of pictures with equal scores
    judged: int  # lines that say that judges, not people, chose
    sha256: str

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def ties(self) -> int:
        """Pairs that are kept although neither side is preferred; the paper's loss learns nothing from them, others may."""
        return sum(label == 0.5 for label in self.labels)


def read_choices(path: str | Path, made: TrajectoryOrigin) -> Choices:
    """The choices in a file, about the pictures of ``made``.

    Raises:
        UserError: with file and line, for whatever is not as it should be; or there is no pair at all.
    """
    path = Path(path)
    content, reading = _content(path), _Reading(path, made)
    lines = content.decode("utf-8-sig").split("\n")  # splitlines() would cut at line ends that texts may hold
    for number, line in enumerate(lines, start=1):
        if line.strip():
            reading.take(line, number)
    ranked, skipped = reading.from_scores()
    found = reading.chosen + ranked
    if not found:
        equal = f": all {skipped} pairs of pictures have equal scores" if skipped else ""
        raise UserError(f"{path} holds no choice{equal}. A line reads {FORMS}.")
    pairs, labels = tuple((a, b) for a, b, _ in found), tuple(label for *_, label in found)
    return Choices(pairs, labels, skipped, reading.judged, hashlib.sha256(content).hexdigest())


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise UserError(f"There is no {path}: it should hold people's choices, a line for each, as in {FORMS}.")
    try:
        content = path.read_bytes()
        content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text in UTF-8: {error}.") from error
    return content


class _Reading:
    """The lines of one file, in turn."""

    def __init__(self, path: Path, made: TrajectoryOrigin) -> None:
        self._path, self._made = path, made
        self._number = {made.picture(number): number for number in range(len(made))}
        self._scores: dict[int, tuple[float, int]] = {}  # of a picture, and the line
        self.chosen: list[tuple[int, int, float]] = []
        self.judged = 0

    def take(self, line: str, number: int) -> None:
        where = f"{self._path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: this is not JSON ({error}). A line reads {FORMS}.") from error
        keys = set(row) if isinstance(row, Mapping) else set()
        as_pair, as_score = {"chosen", "rejected"} <= keys, {"picture", "score"} <= keys
        if as_pair == as_score:
            found = f"the fields {', '.join(sorted(map(repr, keys)))}" if keys else f"{line.strip()[:60]!r}"
            raise UserError(f"{where}: found {found}. A line reads {FORMS}.")
        self.judged += "judges" in keys
        if as_pair:
            self._take_pair(row, where)
        else:
            self._take_score(row, where, number)

    def _take_pair(self, row: Mapping[str, Any], where: str) -> None:
        first, second = (self._picture(row[name], where) for name in ("chosen", "rejected"))
        label = self._finite(row.get("label", 1.0), "label", where)
        if not 0.0 <= label <= 1.0:
            raise UserError(f"{where}: label is {label:g}; it is the probability that the chosen is preferred, from 0 to 1.")
        one, two = (self._made.prompts[self._made.group(n)] for n in (first, second))
        if first == second:
            raise UserError(f"{where}: {row['chosen']!r} is both chosen and rejected.")
        if one != two:
            raise UserError(
                f"{where}: {row['chosen']!r} and {row['rejected']!r} are pictures of different prompts, {one!r} and {two!r}; "
                "only pictures of one prompt can be compared."
            )
        self.chosen.append((first, second, label))

    def _take_score(self, row: Mapping[str, Any], where: str, line: int) -> None:
        picture, score = self._picture(row["picture"], where), self._finite(row["score"], "score", where)
        if picture in self._scores:
            before = self._scores[picture][1]
            raise UserError(f"{where}: {row['picture']!r} has a score already, in line {before}; give one score to each picture.")
        self._scores[picture] = score, line

    def _picture(self, name: Any, where: str) -> int:
        bare = name.removeprefix("pictures/").removesuffix(".png") if isinstance(name, str) else None
        if bare not in self._number:
            last = self._made.picture(len(self._made) - 1)
            raise UserError(f"{where}: there is no picture {name!r}; they are called {self._made.picture(0)} to {last}.")
        return self._number[bare]

    def _finite(self, value: Any, name: str, where: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(f"{where}: {name} is {value!r}; it should be a number.")
        return float(value)

    def from_scores(self) -> tuple[list[tuple[int, int, float]], int]:
        """Every two pictures of a group with unequal scores, the better one first; how many have equal ones."""
        groups: dict[int, list[int]] = {}
        for number in sorted(self._scores):
            groups.setdefault(self._made.group(number), []).append(number)
        found, equal = [], 0
        for first, second in (pair for members in groups.values() for pair in combinations(members, 2)):
            (one, _), (two, _) = self._scores[first], self._scores[second]
            equal += one == two
            if one != two:
                found.append((first, second, 1.0) if one > two else (second, first, 1.0))
        return found, equal
