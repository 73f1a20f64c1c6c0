"""JSONL, CSV and TSV files that list prompts and paths of pictures; paths start from the file's folder."""

from __future__ import annotations

import csv
import io
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.data.pairs import RowProblem
from diffalign.data.readers._files import identity_of_paths, refuse_twice
from diffalign.data.tabs import tab_separated
from diffalign.digests import file_digest
from diffalign.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

FORM = "a .jsonl, .csv or .tsv file with columns prompt, chosen, rejected or prompt, image (paths relative to the file)"
DELIMITERS = {".csv": ",", ".tsv": "\t"}
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
JSON_LINES = (".jsonl", ".ndjson")


def claims(where: str) -> bool:
    path = Path(where)
    return path.is_file() and path.suffix.lower() in (*DELIMITERS, *JSON_LINES)


def open_rows(where: str, split: str) -> ListingRows:
    return ListingRows(Path(where))


class ListingRows:
    """Keeps the place of every row in the file, not the rows; a row that cannot be parsed is a problem of that row."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._delimiter = DELIMITERS.get(path.suffix.lower())
        self.base, self.description = path.parent, str(path)
        places, lines, columns = array("q"), array("q"), {}
        self._header: list[str] = []
        try:
            for place, line, record in self._records():
                if self._delimiter and not self._header:
                    self._header = self._checked([name.strip() for name in record])
                    columns = dict.fromkeys(self._header)
                    continue
                places.append(place)
                lines.append(line)
                if isinstance(record, dict):
                    columns.update(dict.fromkeys(record))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
        if not (places or self._header):
            raise UserError(f"{path} is empty; it should be {FORM}.")
        self.columns = tuple(columns)
        self._places, self._lines = places, lines

    def __len__(self) -> int:
        return len(self._places)

    def row(self, index: int, columns: Sequence[str]) -> Mapping[str, Any]:
        with self._path.open("rb") as stream:
            stream.seek(self._places[index])
            _, _, record = next(self._parsed(_Lines(stream)))
        if problem := self._problem(record):
            raise RowProblem(self.origin(index), None, problem)
        cells = dict(zip(self._header, record, strict=True)) if self._delimiter else record
        return {name: cells.get(name) for name in columns}

    def cells(self, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        wanted = [self._header.index(name) if self._delimiter else name for name in columns]
        for _, _, record in islice(self._records(), 1 if self._delimiter else 0, None):
            if self._problem(record):
                yield (None,) * len(wanted)
            else:
                yield tuple([record[k] for k in wanted] if self._delimiter else [record.get(name) for name in wanted])

    def schema(self) -> pa.Schema | None:
        return None

    def origin(self, index: int) -> str:
        return f"{self._path.name}:line {self._lines[index]}"

    def identity(self, images: Sequence[str], others: Sequence[str]) -> list[Any]:
        """The file by its content, which reading took longer than hashing; pictures as ``identities`` has them."""
        paths = {str(value) for cells in self.cells(tuple(dict.fromkeys(images))) for value in cells if value}
        listed = [self._path.name, self._path.stat().st_size, file_digest(self._path)]
        return [[listed], identity_of_paths(sorted(paths), self.base)]

    def _checked(self, header: list[str]) -> list[str]:
        """Raises ``UserError`` for two columns of one name, and for a header that is parted by something else, as spreadsheets do
        where the comma is a decimal point."""
        if len(header) == 1 and (
            other := next((mark for mark in _SEPARATORS if mark != self._delimiter and mark in header[0]), None)
        ):
            raise UserError(
                f"{self._path} seems to be parted by {_SEPARATORS[other]}, and a {self._path.suffix} file is read as parted by "
                f"{_SEPARATORS[self._delimiter]}: {header[0]!r} is one column so. Save it in that form."
            )
        refuse_twice(self._path, header)
        return header

    def _problem(self, record: Any) -> str | None:
        if self._delimiter:
            wanted, found = len(self._header), len(record)
            return None if wanted == found else f"the header has {wanted} columns, this row has {found}"
        if isinstance(record, str):
            return f"not valid JSON: {record}"
        return None if isinstance(record, dict) else f"expected a JSON object, found {type(record).__name__}"

    def _records(self) -> Iterator[tuple[int, int, Any]]:
        with self._path.open("rb") as stream:
            yield from self._parsed(_Lines(stream))

    def _parsed(self, lines: _Lines) -> Iterator[tuple[int, int, Any]]:
        """(byte offset, line number from 1, record) of every row that is not blank. Raises ``UserError`` that names the line."""
        if self._delimiter == "\t":
            rows = tab_separated(self._placed(lines, lines), len(self._header))
        else:
            rows = self._placed(lines, csv.reader(lines, strict=True) if self._delimiter else map(_json, lines))
        return ((place, line, record) for (place, line), record in rows if record not in ([], None))

    def _placed(self, lines: _Lines, rows: Iterator[Any]) -> Iterator[tuple[tuple[int, int], Any]]:
        """Each of ``rows``, which are made of ``lines``, with byte offset and number of its first line."""
        while True:
            place, line = lines.place, lines.number + 1
            try:
                row = next(rows, _END)
            except UnicodeDecodeError as error:
                found = f"byte {error.object[error.start]:#04x} is not UTF-8; save the file in UTF-8"
                raise UserError(f"{self._path}, line {lines.number}: {found}.") from error
            except csv.Error as error:
                raise UserError(f"{self._path}, line {line}: {_csv_fault(error)}.") from error
            if row is _END:
                return
            yield (place, line), row


def _csv_fault(error: csv.Error) -> str:
    """What is wrong with a row that begins where the caller says."""
    if "new-line character" in str(error):
        return "a line ends in CR alone, as on the first Macintoshes; save the file with line ends LF or CRLF"
    never_closed = "unexpected end of data" in str(error) or "field limit" in str(error)
    found = "a quotation mark is opened here and never closed" if never_closed else f"this is not valid CSV ({error})"
    return f"{found}; a field with a quotation mark, comma or line break stands in quotation marks, and a mark in it is doubled"


_END = object()
_DECODER = json.JSONDecoder()


class _Lines:
    """Text lines of a binary stream that knows how many bytes it has handed out. A byte-order mark is skipped."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        self.place, self.number = stream.tell(), 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        raw = self._stream.readline()
        if not raw:
            raise StopIteration
        first, self.place, self.number = self.place == 0, self.place + len(raw), self.number + 1
        return raw.decode("utf-8-sig" if first else "utf-8")


def _json(line: str) -> Any:
    """The value on a line, None for a blank one, or the parser's complaint as text (a bare string is no row either)."""
    try:
        value, end = _DECODER.raw_decode(line)  # half of what ``loads`` takes
        if line[end:] in ("", "\n", "\r\n"):
            return value
    except (ValueError, RecursionError):
        pass
    if not line.strip():
        return None
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return f"{error.msg} at character {error.pos}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets in thousands of brackets
        return str(error)
