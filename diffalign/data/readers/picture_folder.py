"""A folder of pictures with captions: as ``NAME.txt`` beside each, or in one ``metadata.jsonl`` or ``metadata.csv``.

Both are common for fine-tuning; the second is what ``datasets`` calls an imagefolder (columns ``file_name`` and ``text``). With
``train/`` and ``test/`` inside, each of them such a folder, these are the splits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.data.pairs import RowProblem
from diffalign.data.readers import arrow, pair_folders, parquet, saved, two_folders
from diffalign.data.readers._files import PICTURES, identity_of, in_order, is_split, read_text
from diffalign.data.readers.listing import ListingRows
from diffalign.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

FORM = "a folder of pictures with captions in NAME.txt beside them, or in metadata.jsonl or metadata.csv (file_name, text)"
METADATA = ("metadata.jsonl", "metadata.csv")


def claims(where: str) -> bool:
    """Only what no other form is: pairs may lie in folders, too."""
    path = Path(where)
    if not path.is_dir() or any(other.claims(where) for other in (parquet, arrow, saved, pair_folders, two_folders)):
        return False
    return _is_folder_of_pictures(path) or bool(_splits(path))


def open_rows(where: str, split: str) -> ListingRows | PictureFolderRows:
    """Raises ``UserError`` where there are splits, but not this one."""
    folder = Path(where)
    if not _is_folder_of_pictures(folder):
        splits = _splits(folder)
        if split not in splits:
            raise UserError(f"{where} has no split {split!r}; it has: {', '.join(sorted(splits))}.")
        folder = splits[split]
    listed = _metadata(folder)
    return ListingRows(listed) if listed else PictureFolderRows(folder)


def _splits(root: Path) -> dict[str, Path]:
    return {p.name: p for p in root.iterdir() if p.is_dir() and is_split(p.name) and _is_folder_of_pictures(p)}


def _is_folder_of_pictures(folder: Path) -> bool:
    return _metadata(folder) is not None or any(p.with_suffix(".txt").is_file() for p in _pictures(folder))


def _metadata(folder: Path) -> Path | None:
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def _pictures(folder: Path) -> list[Path]:
    return sorted((p for p in folder.iterdir() if p.suffix.lower() in PICTURES and not p.name.startswith(".")), key=in_order)


class PictureFolderRows:
    """One row per picture, by name. A picture without a caption is a problem of that row."""

    columns = ("prompt", "image")

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files = _pictures(root)
        self.base: Path | None = None
        self.description = str(root)

    def __len__(self) -> int:
        return len(self._files)

    def row(self, index: int, columns: Sequence[str]) -> Mapping[str, Any]:
        file = self._files[index]
        caption = file.with_suffix(".txt")
        try:
            if not caption.exists():
                raise ValueError(f"no caption {caption.name} beside {file.name}")
            prompt = read_text(caption)
        except ValueError as error:
            raise RowProblem(self.origin(index), None, str(error)) from error
        return {"prompt": prompt, "image": str(file.absolute())}

    def cells(self, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        return repeat((None,) * len(columns), len(self))

    def schema(self) -> pa.Schema | None:
        return None

    def origin(self, index: int) -> str:
        return f"{self._root.name}/{self._files[index].name}"

    def identity(self, images: Sequence[str], others: Sequence[str]) -> Iterator[Any]:
        captions = [f.with_suffix(".txt") for f in self._files]
        return identity_of(sorted({*self._files, *captions}), self._root)
