"""A journal of scores on disk, written after every batch, so that an interrupted run can go on.

A process writes ``OUT.part-R.jsonl``: a line that says what is being scored, then a line per batch. A batch is either there as a
whole or not at all: a line that was cut off does not count. Batches are scored again in the same company, so that a run that was
cut off gives the same numbers as one that was not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from diffalign.errors import UserError

Entry = tuple[list[list[float]], dict[int, str]]
"""Scores of each judge, and why pictures could not be read, by their numbers."""


class ScoreJournal:
    """The journal of the table ``out``."""

    def __init__(self, out: Path) -> None:
        self._out, self._purpose = out, ""
        self._file: IO[str] | None = None

    @property
    def parts(self) -> list[Path]:
        """Files that processes have written."""
        return sorted(self._out.parent.glob(f"{self._out.name}.part-*.jsonl"))

    def begin(self, purpose: str, rank: int) -> dict[int, Entry]:
        """The entries that exist already; from here on this process writes as number ``rank``.

        Raises:
            UserError: the journal belongs to another scoring, or cannot be written.
        """
        self._purpose = purpose
        known = self.read()
        mine = self._out.with_name(f"{self._out.name}.part-{rank}.jsonl")
        try:
            self._out.parent.mkdir(parents=True, exist_ok=True)
            fresh = not mine.exists() or not _cut_to_whole_lines(mine)
            self._file = mine.open("a", encoding="utf-8")
            if fresh:
                self._write({"purpose": purpose})
        except OSError as error:
            raise UserError(f"{mine} cannot be written: {error.strerror or error}.") from error
        return known

    def add(self, batch: int, scores: Sequence[Sequence[float]], broken: Mapping[int, str]) -> None:
        """Append a finished batch: scores by judge and picture, and the reasons why pictures are unreadable."""
        plain = [[None if math.isnan(x) else x for x in column] for column in scores]
        self._write({"batch": batch, "scores": plain, "unreadable": {str(i): why for i, why in broken.items()}})

    def read(self) -> dict[int, Entry]:
        """All batches that any process has written. Raises UserError: they belong to another scoring."""
        return {k: entry for part in self.parts for k, entry in self._entries(part)}

    def remove(self) -> None:
        """Delete the journal, when the table is written."""
        if self._file is not None:
            self._file.close()
            self._file = None
        for part in self.parts:
            part.unlink(missing_ok=True)

    def _write(self, line: Mapping[str, Any]) -> None:
        assert self._file is not None, "begin comes first"
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def _entries(self, part: Path) -> list[tuple[int, Entry]]:
        lines = [json.loads(line) for line in part.read_bytes().decode("utf-8").split("\n")[:-1]]  # the last is empty, or cut off
        if lines and lines[0] != {"purpose": self._purpose}:
            raise UserError(
                f"{part} is what is left of a scoring of other pictures, prompts or judges, or in batches of another size. "
                f"Start it as it was started to go on with it, or add --overwrite to drop it."
            )
        return [(line["batch"], _entry(line)) for line in lines[1:]]


def _entry(line: Mapping[str, Any]) -> Entry:
    scores = [[math.nan if x is None else x for x in column] for column in line["scores"]]
    return scores, {int(i): why for i, why in line["unreadable"].items()}


def _cut_to_whole_lines(path: Path) -> bool:
    """Drop what follows the last line's end; whether anything is left."""
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        path.write_bytes(whole)
    return bool(whole)
