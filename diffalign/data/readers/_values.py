"""Columns of arrow tables as Python's values, a part at a time, and as bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

CELLS_AT_ONCE = 2**14


def cells_of(batches: Iterable[pa.RecordBatch], columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """The named cells of every row."""
    for batch in batches:
        yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)


def buffers_of(columns: Iterable[pa.ChunkedArray]) -> Iterator[pa.Buffer]:
    """The memory of the columns as it is in the file."""
    return (buffer for column in columns for chunk in column.chunks for buffer in chunk.buffers() if buffer is not None)


def contents_of(columns: Iterable[pa.ChunkedArray]) -> Iterator[pa.Buffer]:
    """The cells of the columns as bytes, and of a slice no others, whatever memory it shares."""
    import pyarrow as pa

    for chunk in (chunk for column in columns for chunk in column.chunks):
        plain = chunk.dictionary_decode() if pa.types.is_dictionary(chunk.type) else chunk
        yield pa.record_batch([plain], names=["cells"]).serialize()


def paths_in(columns: Iterable[pa.Array]) -> Iterator[str]:
    """The paths in columns of pictures: text, or the ``path`` of an Image feature whose bytes are not in the table."""
    for column in columns:
        yield from filter(None, _paths(column).to_pylist())


def _paths(column: pa.Array) -> pa.Array:
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_dictionary(kind):
        return _paths(column.dictionary)
    if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
        if kind.get_field_index("bytes") >= 0:
            column = column.filter(pc.struct_field(column, "bytes").is_null())
        return _paths(pc.struct_field(column, "path"))
    return column if pa.types.is_string(kind) or pa.types.is_large_string(kind) else pa.array([], pa.string())
