"""Tab-separated rows, as they are found: with quotation marks as in CSV, or with marks that mean themselves."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import count, islice
from typing import TypeVar

Place = TypeVar("Place")

_FIELD = re.compile(r'(?:\A|\t)(?:"((?:[^"]|"")*)"(?=\t|\Z)|([^\t]*))')
"""A field in quotation marks from end to end, every mark inside of it doubled; or whatever stands up to the next tab."""
_OPENED = re.compile(r'(?:\A|\t)"(?:[^"\t]|"")*\Z')
"""The last field of a line begins with a mark that is not closed: it may go on in the next."""
_INSIDE = re.compile(r'(?:[^"\t]|"")*\Z')
_CLOSED = re.compile(r'(?:[^"\t]|"")*"(?=[\t\r\n]|\Z)')
"""What a next line is then: part of that field from end to end, or its end and the fields behind it."""


def tab_separated(lines: Iterable[tuple[Place, str]], width: int = 0) -> Iterator[tuple[Place, list[str]]]:
    """The fields of each row with the place of its first line; of a blank line none. ``width`` is how many columns there are, if
    that is known: by default as many as the first row has.

    pandas and spreadsheets write a field with a quotation mark as CSV does (``"a ""red"" circle"``); lists written by hand or by
    a plain script (PartiPrompts) leave it as it is (``"Hello" on a sign``). Either is read as it was meant. A row takes several
    lines only where they make one of the right width together, with no tab in the field that is broken: a stray mark swallows no
    row.
    """
    source, ahead = iter(lines), deque()
    while ahead or (ahead := deque(islice(source, 1))):
        place, line = ahead.popleft()
        fields = _fields(line)
        if width > 1 and _OPENED.search(line):
            more = _more_lines(ahead, source)
            joined = _fields("".join([line, *(text for _, text in islice(ahead, more))]))
            if more and len(joined) == width:
                fields = joined
                for _ in range(more):
                    ahead.popleft()
        width = width or len(fields)
        yield place, fields


def _more_lines(ahead: deque[tuple[Place, str]], source: Iterator[tuple[Place, str]]) -> int:
    """How many lines more the row takes whose last field was opened, 0 if nothing closes it; ``ahead`` keeps them all."""
    for number in count():
        if number == len(ahead):
            ahead.extend(islice(source, 1))
        if number == len(ahead):
            return 0
        line = ahead[number][1]
        closed = _CLOSED.match(line)
        if closed and not _OPENED.search(line, closed.end()):
            return number + 1
        if not (closed or _INSIDE.match(line)):
            return 0


def _fields(row: str) -> list[str]:
    row = row.rstrip("\r\n")
    if '"' in row:
        return [raw or quoted.replace('""', '"') for quoted, raw in _FIELD.findall(row)]
    return row.split("\t") if row else []
