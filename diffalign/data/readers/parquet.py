"""Parquet, one file or a folder of shards, read a few rows at a time whatever the size of its row groups."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.data.readers._files import identity_of_data, same_columns, shard_files, shards, with_pictures
from diffalign.data.readers._values import CELLS_AT_ONCE, cells_of, paths_in
from diffalign.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

FORM = "a parquet file or a folder of parquet shards (Pick-a-Pic, or columns prompt, chosen, rejected)"
ROWS_AT_ONCE = 16
FOOTER_END = 8  # its length and four letters


def claims(where: str) -> bool:
    path = Path(where)
    return path.suffix == ".parquet" if path.is_file() else path.is_dir() and any(shard_files(path, ".parquet"))


def open_rows(where: str, split: str) -> ParquetRows:
    return ParquetRows(Path(where), *shards(where, ".parquet", split))


class ParquetRows:
    """Random access by row; going forwards costs no more than reading the file once."""

    def __init__(self, root: Path, files: Sequence[Path], description: str) -> None:
        self._files = list(files)
        self._root = root if root.is_dir() else root.parent
        opened = [_open(file) for file in self._files]
        self.columns = same_columns(self._files, [f.schema_arrow.names for f in opened])
        self._starts = [0, *accumulate(f.metadata.num_rows for f in opened)]
        self.base = self._root
        self.description = description
        self._cursor: _Cursor | None = None

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, index: int, columns: Sequence[str]) -> Mapping[str, Any]:
        k, j = self._locate(index)
        if self._cursor is None or not self._cursor.reaches(self._files[k], j, tuple(columns)):
            self._cursor = _Cursor(self._files[k], j, tuple(columns))
        return self._cursor.row(j)

    def cells(self, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        batches = (_open(file).iter_batches(CELLS_AT_ONCE, columns=list(columns)) for file in self._files)
        return cells_of(chain.from_iterable(batches), columns)

    def schema(self) -> pa.Schema | None:
        import pyarrow as pa

        return pa.unify_schemas([_open(file).schema_arrow for file in self._files], promote_options="permissive")

    def origin(self, index: int) -> str:
        k, j = self._locate(index)
        return f"{self._files[k].relative_to(self._root).as_posix()}:row {j}"

    def identity(self, images: Sequence[str], others: Sequence[str]) -> list[Any]:
        stored = chain.from_iterable(_stored(file, others) for file in self._files)
        paths = paths_in(chain.from_iterable(_with_paths(file, name) for file, name in product(self._files, set(images))))
        return with_pictures(identity_of_data(self._files, self._root, stored), paths, self.base)

    def _locate(self, index: int) -> tuple[int, int]:
        k = bisect_right(self._starts, index) - 1
        return k, index - self._starts[k]


class _Cursor:
    """A reader that moves forwards through one row group, so that a group of many gigabytes is never held whole."""

    def __init__(self, file: Path, row: int, columns: tuple[str, ...]) -> None:
        opened = _open(file)
        sizes = [opened.metadata.row_group(g).num_rows for g in range(opened.num_row_groups)]
        ends = list(accumulate(sizes))
        group = bisect_right(ends, row)
        self._key, self._end = (file, columns), ends[group]
        self._start, self._batch = ends[group] - sizes[group], None
        wanted = {"row_groups": [group], "columns": list(columns)}
        self._batches: Iterator[Any] = opened.iter_batches(ROWS_AT_ONCE, use_threads=False, **wanted)

    def reaches(self, file: Path, row: int, columns: tuple[str, ...]) -> bool:
        return self._key == (file, columns) and self._start <= row < self._end

    def row(self, row: int) -> Mapping[str, Any]:
        while self._batch is None or row >= self._start + self._batch.num_rows:
            self._start += 0 if self._batch is None else self._batch.num_rows
            self._batch = next(self._batches)
        return self._batch.slice(row - self._start, 1).to_pylist()[0]


def _stored(file: Path, columns: Sequence[str]) -> Iterator[bytes]:
    """The footer, which has the sizes and bounds of every part of every column, and the named columns as they are stored."""
    metadata = _open(file).metadata
    paths = [metadata.schema.column(leaf).path for leaf in range(metadata.num_columns)]
    leaves = [leaf for leaf, path in enumerate(paths) if any(path == name or path.startswith(f"{name}.") for name in columns)]
    with file.open("rb") as stream:
        stream.seek(-metadata.serialized_size - FOOTER_END, os.SEEK_END)
        yield stream.read()
        for group, leaf in product(range(metadata.num_row_groups), leaves):
            part = metadata.row_group(group).column(leaf)
            stream.seek(part.dictionary_page_offset or part.data_page_offset)
            yield stream.read(part.total_compressed_size)


def _with_paths(file: Path, column: str) -> Iterator[pa.Array]:
    """A column of pictures, a part at a time, but for the row groups that hold all of them as bytes: those are not read."""
    opened = _open(file)
    groups = [group for group in range(opened.num_row_groups) if not _holds_bytes(opened, group, column)]
    for batch in opened.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=[column], use_threads=False) if groups else ():
        yield batch.column(column)


def _holds_bytes(opened: Any, group: int, column: str) -> bool:
    """Whether each picture of a row group is there as bytes; what the file does not say is taken for no."""
    import pyarrow as pa

    kind, rows = opened.schema_arrow.field(column).type, opened.metadata.row_group(group)
    if not pa.types.is_struct(kind):
        return not any(is_kind(kind) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_dictionary))
    parts = (rows.column(leaf) for leaf in range(rows.num_columns))
    said = next((part.statistics for part in parts if part.path_in_schema == f"{column}.bytes"), None)
    return said is not None and said.has_null_count and said.null_count == 0


def _open(file: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file, memory_map=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file} is not a readable parquet file: {error}") from error
