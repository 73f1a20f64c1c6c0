"""A ``datasets.Dataset`` as rows, as it is stored: pictures stay bytes or paths and are not decoded by the library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.data.readers._files import identity_of

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

    def column(self, name: str) -> Sequence[Any]:
        return self._dataset.select_columns([name])[:][name].to_pylist()

    def schema(self) -> pa.Schema | None:
        return self._dataset.features.arrow_schema

    def origin(self, index: int) -> str:
        return f"{self.description}:row {index}"

    def identity(self, images: Sequence[str]) -> list[Any]:
        files = [Path(part["filename"]) for part in self._dataset.cache_files]
        return [len(self), [[f.name, *rest] for f, (_, *rest) in zip(files, identity_of(files, Path("/")), strict=True)]]
