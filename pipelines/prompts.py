"""Prompts from files, or from the lists that come with the package."""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.errors import UserError

SETS: dict[str, str] = {
    "parti": "parti_prompts.tsv",
    "geneval": "geneval_metadata.jsonl",
    "imagereward": "imagereward_benchmark.json",
}
"""Lists that come with the package: name -> file in ``pipelines/prompt_sets``."""
FORMATS = (".txt", ".jsonl", ".json", ".csv", ".tsv")
PROMPT_COLUMNS = ("prompt", "caption", "text")
CATEGORY_COLUMNS = ("category", "tag")


@dataclass(frozen=True)
class Prompt:
    """One prompt; ``origin`` says where it stands, as ``file:place``."""

    text: str
    category: str | None = None
    origin: str = ""


def read_prompts(where: str | Path, column: str | None = None) -> list[Prompt]:
    """Prompts in the order of the file; repeated prompts stay repeated.

    ``where`` is the name of a list in ``SETS`` or a file: ``.txt`` (one in a line, empty lines skipped), ``.jsonl``,
    ``.json`` (a list of strings or of objects), ``.csv`` or ``.tsv`` (with a header). In files with columns the prompt is
    taken from ``column``, or else from the first of ``PROMPT_COLUMNS`` there is, whatever its case.

    Raises:
        UserError: no such file, an unknown format, a row without a prompt, or nothing to read.
    """
    path = _find(where)
    text = _read_text(path)
    rows = _ROWS[path.suffix.lower()](path, text)
    prompts = [_prompt(path, place, row, column) for place, row in rows]
    if not prompts:
        raise UserError(f"{path} holds no prompts.")
    return prompts


def _find(where: str | Path) -> Path:
    if isinstance(where, str) and where in SETS:
        return Path(__file__).parent / "prompt_sets" / SETS[where]
    path = Path(where).expanduser()
    if not path.exists():
        near = difflib.get_close_matches(str(where).lower(), SETS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UserError(f"There is no prompt file {str(where)!r}.{hint} The built-in lists are: {', '.join(SETS)}.")
    if path.is_dir():
        raise UserError(f"{path} is a folder; prompts are read from a file that ends in one of {', '.join(FORMATS)}.")
    if path.suffix.lower() not in FORMATS:
        found = f"ends in {path.suffix!r}" if path.suffix else "has no ending"
        raise UserError(f"The prompt file {path} {found}; it should end in one of {', '.join(FORMATS)}.")
    return path


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"The prompt file {path} cannot be read: {error.strerror}.") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: byte {data[error.start]:#04x} is not UTF-8; save the file in UTF-8.") from error


# ------------------------------------------------------------------------------------------------------------- formats


Row = str | Mapping[str, Any]


def _text_rows(path: Path, text: str) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(io.StringIO(text), start=1):
        if line.strip():
            yield f"{number}", line


def _jsonl_rows(path: Path, text: str) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(io.StringIO(text), start=1):
        if line.strip():
            yield f"{number}", _as_row(path, f"line {number}", _parse(path, line, first_line=number))


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, Row]]:
    values = _parse(path, text, first_line=1)
    if not isinstance(values, list):
        raise UserError(f"{path} holds {_kind(values)}; it should hold a list of prompts, or of objects that have one each.")
    for number, value in enumerate(values, start=1):
        yield f"item {number}", _as_row(path, f"item {number}", value)


def _table_rows(path: Path, text: str) -> Iterator[tuple[str, Row]]:
    tabs = path.suffix.lower() == ".tsv"
    # in tab-separated files a quotation mark is a character like any other (PartiPrompts is written so)
    options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey="", **options)
    try:
        for row in reader:
            if "" in row and isinstance(row[""], list):
                found = len(reader.fieldnames or ()) + len(row[""])
                raise UserError(
                    f"{path}, line {reader.line_num}: {found} fields under a header of {len(reader.fieldnames or ())}; "
                    f"put prompts that contain a {'tab' if tabs else 'comma'} {'elsewhere' if tabs else 'in quotation marks'}."
                )
            yield f"{reader.line_num}", row
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: this is not valid CSV ({error}).") from error


_ROWS = {".txt": _text_rows, ".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _table_rows, ".tsv": _table_rows}


def _parse(path: Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {first_line + error.lineno - 1}, column {error.colno}: this is not valid JSON ({error.msg})."
        ) from error


def _as_row(path: Path, place: str, value: Any) -> Row:
    if not isinstance(value, (str, dict)):
        raise UserError(f"{path}, {place}: found {_kind(value)}; it should be a prompt, or an object that has one.")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


# -------------------------------------------------------------------------------------------------------------- columns


def _prompt(path: Path, place: str, row: Row, column: str | None) -> Prompt:
    origin = f"{path.name}:{place}"
    if isinstance(row, str):
        return Prompt(_stripped(path, place, "", row), None, origin)
    name = _column(path, row, column)
    category = next((row[c] for c in row if c and c.lower() in CATEGORY_COLUMNS), None)
    return Prompt(_stripped(path, place, name, row[name]), str(category) if category else None, origin)


def _column(path: Path, row: Mapping[str, Any], column: str | None) -> str:
    has = ", ".join(repr(c) for c in row) or "none"
    if column is not None:
        if column not in row:
            raise UserError(f"{path} has no column {column!r}; it has {has}.")
        return column
    lower = {str(c).lower(): c for c in row}
    found = next((lower[c] for c in PROMPT_COLUMNS if c in lower), None)
    if found is None:
        raise UserError(f"{path} has no column for prompts ({', '.join(PROMPT_COLUMNS)}); it has {has}. Name one of them.")
    return found


def _stripped(path: Path, place: str, column: str, value: Any) -> str:
    where = f"{path}, {place if place.startswith('item') else 'line ' + place}" + (f", column {column!r}" if column else "")
    if not isinstance(value, str):
        raise UserError(f"{where}: found {_kind(value)}; a prompt is a string.")
    if not value.strip():
        raise UserError(f"{where}: the prompt is empty.")
    return value.strip()
