"""Judged data as files: a Parquet file with the pictures inside, or a list of paths; all columns of a table, or new ones only."""

from __future__ import annotations

import csv
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.data.pairs import ImageSource
from diffalign.data.table import PairTable
from diffalign.errors import UserError
from diffalign.written_aside import PARTIAL, disk_error
from pipelines.outputs import quoting

if TYPE_CHECKING:
    import pyarrow as pa

ENDINGS = (".parquet", ".jsonl", ".ndjson", ".csv", ".tsv")
_ROW_GROUP = 256 * 2**20  # bytes of pictures


def is_parquet(out: Path) -> bool:
    return out.suffix.lower() == ".parquet"


@dataclass(frozen=True)
class PictureCell:
    """A picture in a row: where it is stored, and its bytes; None if they cannot be read."""

    source: ImageSource
    content: bytes | None


class TableWriter:
    """Writes rows of ``table`` beside the output and renames at the end, so that there is never half of it.

    Not ``file_aside``: between its writes, pictures are read and judged, whose faults are not this file's.

    ``added``: the columns that are new or hold something else, and what: "score", "flag", "probability", "text" or "picture";
    without a table they are all there are. ``provenance`` is asked for where the file has a place for it.
    """

    def __init__(
        self, out: Path, table: PairTable | None, added: Mapping[str, str], provenance: Callable[[], Mapping[str, Any]]
    ) -> None:
        self._out, self._aside = out, out.with_name(f".{out.name}.{secrets.token_hex(4)}{PARTIAL}")
        self._form = _Parquet(table, added, provenance()) if is_parquet(out) else _Listing(out, table, added)

    def __enter__(self) -> TableWriter:
        with self._told():
            self._out.parent.mkdir(parents=True, exist_ok=True)
            self._form.open(self._aside)
        return self

    def write(self, rows: list[dict[str, Any]]) -> None:
        with self._told():
            self._form.write(rows)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with self._told():
                self._form.close()
                if kind is None:
                    os.replace(self._aside, self._out)
        finally:
            self._aside.unlink(missing_ok=True)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise disk_error(error, self._out) from error


class _Parquet:
    """Pictures as bytes; the other columns keep the types that they have."""

    def __init__(self, table: PairTable | None, added: Mapping[str, str], provenance: Mapping[str, Any]) -> None:
        import pyarrow as pa

        types = {"score": pa.float32(), "flag": pa.bool_(), "probability": pa.float64(), "text": pa.string()}
        types["picture"] = pa.binary()
        added = {**dict.fromkeys(table.image_columns if table else (), "picture"), **added}
        wanted = (_types(table) if table else {}) | {column: types[what] for column, what in added.items()}
        self._schema = pa.schema(list(wanted.items()), metadata={"diffalign": json.dumps(provenance)})
        self._pictures = {column for column, what in added.items() if what == "picture"}
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0

    def open(self, path: Path) -> None:
        import pyarrow.parquet as pq

        plain = [name for name in self._schema.names if name not in self._pictures]
        self._file = pq.ParquetWriter(path, self._schema, use_dictionary=plain, write_statistics=plain)

    def write(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            cells = {name: cell.content if isinstance(cell, PictureCell) else cell for name, cell in row.items()}
            self._rows.append(cells)
            self._bytes += sum(len(cells[name] or b"") for name in self._pictures)
        if self._bytes >= _ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        arrays = [
            _array(name, [row.get(name) for row in self._rows], self._schema.field(name).type) for name in self._schema.names
        ]
        self._file.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        self._rows, self._bytes = [], 0

    def close(self) -> None:
        if self._rows:
            self._flush()
        self._file.close()


def _array(name: str, values: list[Any], kind: pa.DataType) -> pa.Array:
    import pyarrow as pa

    try:
        return pa.array([_text(v) for v in values] if pa.types.is_string(kind) else values, kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise UserError(f"The column {name} holds values of several types: {error}.") from error


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _types(table: PairTable) -> dict[str, pa.DataType]:
    """Arrow's types of all columns: as the storage states them, else by what is in them; of mixed columns, text."""
    import pyarrow as pa

    known = {field.name: field.type for field in table.rows.schema() or ()}
    types = {}
    for name in table.rows.columns:
        kind = known.get(name)
        if kind is None and name not in table.image_columns:
            try:
                kind = pa.array([value for (value,) in table.rows.cells([name])]).type
            except (pa.ArrowInvalid, pa.ArrowTypeError):
                kind = pa.string()
        types[name] = pa.string() if kind is None or pa.types.is_null(kind) else kind
    return types


class _Listing:
    """A list with one row per line; pictures below its folder are relative paths, others absolute ones."""

    def __init__(self, out: Path, table: PairTable | None, added: Mapping[str, str]) -> None:
        self._ending, self._folder = out.suffix.lower(), out.absolute().parent
        self._columns = list(dict.fromkeys([*(table.rows.columns if table else ()), *added]))

    def open(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8", newline="")
        if self._ending in (".csv", ".tsv"):
            self._write_fields(self._columns)

    def write(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            cells = {name: self._cell(row.get(name)) for name in self._columns}
            if self._ending in (".csv", ".tsv"):
                self._write_fields([_field(cell) for cell in cells.values()])
            else:
                self._file.write(json.dumps(cells, ensure_ascii=False, default=str) + "\n")

    def _write_fields(self, fields: Sequence[Any]) -> None:
        """Raises ``UserError`` for a cell of a TSV that no reader would take for one: with a tab and a line break."""
        if self._ending == ".tsv" and (bad := next((f for f in fields if isinstance(f, str) and {"\t", "\n"} <= set(f)), None)):
            raise UserError(f"A cell holds a tab and a line break, which a .tsv cannot keep: {bad[:80]!r}; write .csv or .jsonl.")
        delimiter = {".csv": ",", ".tsv": "\t"}[self._ending]
        csv.writer(self._file, delimiter=delimiter, lineterminator="\n", quoting=quoting(fields)).writerow(fields)

    def _cell(self, cell: Any) -> Any:
        if not isinstance(cell, PictureCell):
            return None if isinstance(cell, float) and math.isnan(cell) else cell
        if cell.source.path is None:
            raise UserError("A picture is inside of the data, and a list holds paths only; write .parquet.")
        path = cell.source.path.absolute()
        return path.relative_to(self._folder).as_posix() if path.is_relative_to(self._folder) else str(path)

    def close(self) -> None:
        self._file.close()


def _field(cell: Any) -> Any:
    return {None: "", True: "true", False: "false"}[cell] if cell is None or isinstance(cell, bool) else cell
