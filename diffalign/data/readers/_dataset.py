"""A ``datasets.Dataset`` as rows, as it is stored: pictures stay bytes or paths and are not decoded by the library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.data.readers._files import identity_of_data, sha256_of, with_pictures
from diffalign.data.readers._values import CELLS_AT_ONCE, cells_of, contents_of, paths_in

if TYPE_CHECKING:
    import pyarrow as pa


class DatasetRows:
    def __init__(self, dataset: Any, name: str, base: Path | None) -> None:
        self._dataset = dataset.with_format("arrow")
        self._views: dict[tuple[str, ...], Any] = {}
        self.columns = tuple(dataset.column_names)
        self.base = base
        self.description = name

    def __len__(self) -> int:
        return len(self._dataset)

    def row(self, index: int, columns: Sequence[str]) -> Mapping[str, Any]:
        key = tuple(columns)
        if key not in self._views:
            self._views[key] = self._dataset.select_columns(list(key))
        return self._views[key][index].to_pylist()[0]

    def cells(self, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        selected = self._dataset.select_columns(list(columns))
        tables = (selected[start : start + CELLS_AT_ONCE] for start in range(0, len(self), CELLS_AT_ONCE))
        return cells_of((batch for table in tables for batch in table.to_batches()), columns)

    def schema(self) -> pa.Schema | None:
        return self._dataset.features.arrow_schema

    def origin(self, index: int) -> str:
        return f"{self.description}:row {index}"

    def identity(self, images: Sequence[str], others: Sequence[str]) -> list[Any]:
        """The files say nothing about which of their rows are meant (``train[:10]``), and data in memory have none: the split
        and the values of the columns say it, without files those of the pictures, too."""
        files = [Path(part["filename"]) for part in self._dataset.cache_files]
        read = others if files else [*others, *sorted(set(images))]
        values = sha256_of(contents_of(self._dataset.data.column(name) for name in read))
        pictures = (chunk for name in set(images) for chunk in self._dataset.data.column(name).chunks)
        data = with_pictures(identity_of_data(files, None, ()), paths_in(pictures), self.base or Path())
        return [len(self), str(self._dataset.split), values, data]
