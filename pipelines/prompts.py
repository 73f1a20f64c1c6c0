"""Prompts from files, from the lists that come with the package, or from lists that are downloaded by name.

Fetched lists are not shipped: that of HPSv2 (Wu et al. 2023, arXiv:2306.09341: 800 prompts in each of four styles) for its size,
and the test prompts of Pick-a-Pic (Kirstain et al. 2023, arXiv:2305.01569) for what people typed into them.
"""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from diffalign.data.pairs import is_broken
from diffalign.data.tabs import tab_separated
from diffalign.errors import UserError, did_you_mean

SETS: dict[str, str] = {
    "parti": "parti_prompts.tsv",
    "geneval": "geneval_metadata.jsonl",
    "imagereward": "imagereward_benchmark.json",
}
"""Lists that come with the package: name -> file in ``pipelines/prompt_sets``."""
FETCHED: dict[str, str] = {"hpsv2": "ymhao/HPDv2", "pick-a-pic": "yuvalkirstain/pickapic_v2_no_images"}
"""Lists that stay where they are: name -> data set on the Hugging Face hub. ``NAME:PATH`` reads a local copy."""
NAMES = (*SETS, *FETCHED)
STYLES = ("anime", "concept-art", "paintings", "photo")
"""The styles of HPSv2's benchmark; each is a file of its own, and the category of its prompts."""
FORMATS = (".txt", ".jsonl", ".json", ".csv", ".tsv")
PROMPT_COLUMNS = ("prompt", "caption", "text")
CATEGORY_COLUMNS = ("category", "tag")
BROKEN = "holds half of a surrogate pair, which is no character; remove it"


class LoggedPromptsWarning(UserWarning):
    """These prompts are a log of what people typed; sexual ones are among them."""


@dataclass(frozen=True)
class Prompt:
    """One prompt; ``origin`` says where it stands, as ``file:place``.

    ``metadata`` is what else its row holds, by column: GenEval's tag, include and exclude, say, by which a detector judges. It
    does not make a prompt another.
    """

    text: str
    category: str | None = None
    origin: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)


def as_prompts(given: str | Iterable[Prompt | str]) -> list[Prompt]:
    """What a caller in Python means by prompts: one string, or several strings and prompts.

    Raises:
        UserError: one of them is something else, such as the NaN of an empty cell in pandas, or holds half of a character.
    """
    if not isinstance(given, Iterable):
        raise UserError(f"Prompts are a string or a list of strings; got {given!r}.")
    several = [given] if isinstance(given, str) else list(given)
    for place, one in enumerate(several, 1):
        if not isinstance(one, (str, Prompt)):
            raise UserError(f"Prompt {place} of {len(several)} is no string: {one!r}.")
        if is_broken(one if isinstance(one, str) else one.text):
            raise UserError(f"Prompt {place} of {len(several)} {BROKEN}.")
    return [one if isinstance(one, Prompt) else Prompt(one) for one in several]


def read_prompts(where: str | Path, column: str | None = None, *, strict: bool = True) -> list[Prompt]:
    """Prompts in the order of the file; repeated prompts stay repeated.

    ``strict=False`` lets the empty ones of a file with columns stay, for whoever leaves out and names what cannot be used.

    ``where`` is one of ``NAMES``, ``hpsv2:PATH`` or ``pick-a-pic:PATH``, or a file: ``.txt`` (one in a line, empty lines
    skipped), ``.jsonl``, ``.json`` (a list of strings or of objects), ``.csv`` or ``.tsv`` (with a header). In files with
    columns the prompt is taken from ``column``, or else from the first of ``PROMPT_COLUMNS`` there is, whatever its case.

    Raises:
        UserError: no such file, an unknown format, a row without a prompt (unless it is empty, and not ``strict``), one with half
            of a character, or nothing to read.
    """
    name, colon, place = str(where).partition(":")
    if isinstance(where, str) and name in FETCHED and (place or not colon):
        return _FETCH[name](place or None, column)
    return _read_file(_find(where), column, strict)


def held_out_prompts(where: str, count: int) -> list[Prompt]:
    """``count`` prompts of a list; ``tiny`` means captions of the tiny world's test split, which no training saw."""
    if where == "tiny":
        from pipelines.tiny import scenes

        return [Prompt(text) for text in scenes.captions(count, seed=2026)]
    return read_prompts(where)[:count]


def _read_file(path: Path, column: str | None = None, strict: bool = True) -> list[Prompt]:
    rows = _ROWS[path.suffix.lower()](path, read_text(path))
    prompts = [_prompt(path, place, row, column, strict) for place, row in rows]
    if not prompts:
        raise UserError(f"{path} holds no prompts.")
    return prompts


def _find(where: str | Path) -> Path:
    if isinstance(where, str) and where in SETS:
        return Path(__file__).parent / "prompt_sets" / SETS[where]
    path = Path(where).expanduser()
    if not path.exists():
        hint = did_you_mean(str(where).lower(), NAMES)
        if " " in str(where).strip() and path.suffix.lower() not in FORMATS:
            hint = " If it is a prompt: --prompts names a list; a single prompt is given by --prompt, where a command has it."
        raise UserError(f"There is no prompt file {str(where)!r}.{hint} Lists that have a name are: {', '.join(NAMES)}.")
    if path.is_dir():
        raise UserError(f"{path} is a folder; prompts are read from a file that ends in one of {', '.join(FORMATS)}.")
    if path.suffix.lower() not in FORMATS:
        found = f"ends in {path.suffix!r}" if path.suffix else "has no ending"
        raise UserError(f"The prompt file {path} {found}; it should end in one of {', '.join(FORMATS)}.")
    return path


def read_text(path: Path) -> str:
    """A file of text in UTF-8, with or without a byte-order mark.

    Raises:
        UserError: it cannot be read, or is in another encoding; names the line.
    """
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
    lines = io.StringIO(text, newline="")
    tabs = path.suffix.lower() == ".tsv"
    rows = tab_separated(enumerate(lines, start=1)) if tabs else _csv_rows(path, lines)
    _, header = next(rows, (0, []))
    for line, fields in rows:
        if len(fields) > len(header):
            raise UserError(
                f"{path}, line {line}: {len(fields)} fields under a header of {len(header)}; "
                f"put prompts that contain a {'tab' if tabs else 'comma'} in quotation marks."
            )
        if fields:
            yield f"{line}", dict(zip_longest(header, fields))


def _csv_rows(path: Path, lines: io.StringIO) -> Iterator[tuple[int, list[str]]]:
    """Every row with the line that it ends in."""
    reader = csv.reader(lines, strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
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


# -------------------------------------------------------------------------------------------------------------- fetched


def _hpsv2(where: str | None, column: str | None) -> list[Prompt]:
    """The prompts of the four styles, one style after the other."""
    names = [f"benchmark/{style}.json" for style in STYLES]
    root = _from_hub("hpsv2", names) if where is None else Path(where).expanduser()
    folder = root / "benchmark" if (root / "benchmark").is_dir() else root
    missing = [f"{style}.json" for style in STYLES if not (folder / f"{style}.json").is_file()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)} of the prompts 'hpsv2'. {_how_to_fetch('hpsv2', names)}")
    return [replace(prompt, category=style) for style in STYLES for prompt in _read_file(folder / f"{style}.json", column)]


def _pick_a_pic(where: str | None, column: str | None) -> list[Prompt]:
    """The captions of the split ``test_unique``, each once, in the order of the file."""
    names = ["data/test_unique-*.parquet"]
    path = _from_hub("pick-a-pic", names) / "data" if where is None else Path(where).expanduser()
    if not path.exists():
        raise UserError(f"There is no {path} to read the prompts 'pick-a-pic' from. {_how_to_fetch('pick-a-pic', names)}")
    warnings.warn(
        "The prompts of Pick-a-Pic are a log of what people typed, unfiltered: sexual content is among them, and some of it must "
        "not be drawn. Filter them before you generate, and keep the safety checker on.",
        LoggedPromptsWarning,
        stacklevel=3,
    )
    unique: dict[str, Prompt] = {}
    for prompt in _captions_of_rows(path, column or "caption") or _read_file(_find(path), column):
        unique.setdefault(prompt.text, Prompt(prompt.text, None, prompt.origin))
    return list(unique.values())


def _captions_of_rows(path: Path, column: str) -> list[Prompt]:
    """Captions from what ``datasets`` writes; none where the path is no such thing."""
    from diffalign.data.readers import arrow, parquet, saved

    reader = next((r for r in (saved, parquet, arrow) if r.claims(str(path))), None)
    if reader is None:
        return []
    rows = reader.open_rows(str(path), "test_unique")
    if column not in rows.columns:
        raise UserError(f"{path} has no column {column!r}; it has {', '.join(map(repr, rows.columns))}.")
    texts = [text.strip() if isinstance(text, str) else "" for (text,) in rows.cells([column])]
    if not any(texts):
        raise UserError(f"{path} holds no prompts.")
    return [Prompt(text, None, rows.origin(i)) for i, text in enumerate(texts) if text]


def _from_hub(name: str, files: Sequence[str]) -> Path:
    """The folder with these files of the list's data set, fetched now or before."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        root = Path(snapshot_download(FETCHED[name], repo_type="dataset", allow_patterns=list(files)))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(_absent(name, files)) from error
    # without a connection the hub's library answers with whatever part of the data set it has
    if missing := [file for file in files if not any(root.glob(file))]:
        raise UserError(_absent(name, missing))
    return root


def _absent(name: str, files: Sequence[str]) -> str:
    return (
        f"The prompts {name!r} need {', '.join(files)} of the data set {FETCHED[name]}, not on this machine, which could not be "
        f"fetched. {_how_to_fetch(name, files)}"
    )


def _how_to_fetch(name: str, files: Sequence[str]) -> str:
    named = " ".join(f'--include "{file}"' if "*" in file else file for file in files)
    return (
        f"Where there is a connection, `hf download {FETCHED[name]} {named} --repo-type dataset` fetches what is needed; "
        f"a copy that you have is read by {name}:PATH."
    )


_FETCH = {"hpsv2": _hpsv2, "pick-a-pic": _pick_a_pic}


# -------------------------------------------------------------------------------------------------------------- columns


def _prompt(path: Path, place: str, row: Row, column: str | None, strict: bool) -> Prompt:
    origin = f"{path.name}:{place}"
    if isinstance(row, str):
        return Prompt(_stripped(path, place, "", row, strict), None, origin)
    name = _column(path, row, column)
    category = next((row[c] for c in row if c and c.lower() in CATEGORY_COLUMNS), None)
    rest = {c: value for c, value in row.items() if c != name}
    return Prompt(_stripped(path, place, name, row[name], strict), str(category) if category else None, origin, rest)


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


def _stripped(path: Path, place: str, column: str, value: Any, strict: bool) -> str:
    where = f"{path}, {place if place.startswith('item') else 'line ' + place}" + (f", column {column!r}" if column else "")
    if value is None and not strict:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: found {_kind(value)}; a prompt is a string.")
    if strict and not value.strip():
        raise UserError(f"{where}: the prompt is empty.")
    if is_broken(value):
        raise UserError(f"{where}: the prompt {BROKEN}.")
    return value.strip()
