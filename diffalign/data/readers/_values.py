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
