"""Arrow files as the ``datasets`` library writes them, memory-mapped: one file, or a folder of shards."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.data.readers import parquet, saved
from diffalign.data.readers._files import identity_of_data, same_columns, shard_files, shards, with_pictures
from diffalign.data.readers._values import CELLS_AT_ONCE, buffers_of, cells_of, paths_in
from diffalign.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

FORM = "an arrow file or a folder of arrow shards"


def claims(where: str) -> bool:
    path = Path(where)
    if path.is_file():
        return path.suffix == ".arrow"
    return path.is_dir() and not saved.claims(where) and not parquet.claims(where) and any(shard_files(path, ".arrow"))


def open_rows(where: str, split: str) -> ArrowRows:
    return ArrowRows(Path(where), *shards(where, ".arrow", split))


class ArrowRows:
    """Rows of memory-mapped tables; a row is read when it is used."""

    def __init__(self, root: Path, files: Sequence[Path], description: str) -> None:
        self._files = list(files)
        self._root = root if root.is_dir() else root.parent
        self._tables = [_open(file) for file in self._files]
        self.columns = same_columns(self._files, [t.column_names for t in self._tables])
        self._starts = [0, *accumulate(t.num_rows for t in self._tables)]
        self.base = self._root
        self.description = description

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, index: int, columns: Sequence[str]) -> Mapping[str, Any]:
        k, j = self._locate(index)
        return self._tables[k].select(list(columns)).slice(j, 1).to_pylist()[0]

    def cells(self, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        selected = (table.select(list(columns)) for table in self._tables)
        return cells_of((batch for table in selected for batch in table.to_batches(CELLS_AT_ONCE)), columns)

    def schema(self) -> pa.Schema | None:
        import pyarrow as pa

        return pa.unify_schemas([table.schema for table in self._tables], promote_options="permissive")

    def origin(self, index: int) -> str:
        k, j = self._locate(index)
        return f"{self._files[k].relative_to(self._root).as_posix()}:row {j}"

    def identity(self, images: Sequence[str], others: Sequence[str]) -> list[Any]:
        data = identity_of_data(self._files, self._root, buffers_of(table[name] for table in self._tables for name in others))
        pictures = (chunk for table in self._tables for name in set(images) for chunk in table[name].chunks)
        return with_pictures(data, paths_in(pictures), self.base)

    def _locate(self, index: int) -> tuple[int, int]:
        k = bisect_right(self._starts, index) - 1
        return k, index - self._starts[k]


def _open(file: Path) -> Any:
    """A table on a memory map: the stream format, which ``datasets`` writes, or the file format."""
    import pyarrow as pa

    try:
        mapped = pa.memory_map(str(file))
        try:
            return pa.ipc.open_stream(mapped).read_all()
        except pa.ArrowInvalid:
            return pa.ipc.open_file(mapped).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file} is not a readable arrow file: {error}") from error
