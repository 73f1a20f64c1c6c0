"""Two folders of pictures, ``w/`` and ``l/``, with the same file names, and captions as ``NAME.txt``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.data.pairs import RowProblem
from diffalign.data.readers._files import LOSER, PICTURES, WINNER, identity_of, in_order, only_one, read_text

if TYPE_CHECKING:
    import pyarrow as pa

FORM = "a folder with w/NAME.png and l/NAME.png (or win/lose, winner/loser, chosen/rejected) and captions in NAME.txt"


def claims(where: str) -> bool:
    return _folders(Path(where)) is not None


def open_rows(where: str, split: str) -> TwoFolderRows:
    return TwoFolderRows(Path(where), *_folders(Path(where)))


def _folders(root: Path) -> tuple[Path, Path] | None:
    pairs = [(root / win, root / lose) for win, lose in zip(WINNER, LOSER, strict=True)]
    return next((pair for pair in pairs if pair[0].is_dir() and pair[1].is_dir() and _stems(pair[0])), None)


def _stems(folder: Path) -> dict[str, list[Path]]:
    """Pictures by name without suffix, which several may share; not hidden ones (``._NAME.png`` of macOS)."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir(), key=in_order):
        if file.suffix.lower() in PICTURES and not file.name.startswith("."):
            found.setdefault(file.stem, []).append(file)
    return found


class TwoFolderRows:
    """One row per name that either folder has. A name that lacks its other side or caption is a problem of that row."""

    columns = ("prompt", "chosen", "rejected")

    def __init__(self, root: Path, winners: Path, losers: Path) -> None:
        self._root = root
        self._folders = (winners, losers)
        self._pictures = (_stems(winners), _stems(losers))
        self._names = sorted(self._pictures[0].keys() | self._pictures[1].keys())
        self.base: Path | None = None
        self.description = str(root)

    def __len__(self) -> int:
        return len(self._names)

    def row(self, index: int, columns: Sequence[str]) -> Mapping[str, Any]:
        name = self._names[index]
        for folder, pictures, side in zip(self._folders, self._pictures, ("winner", "loser"), strict=True):
            if name not in pictures:
                raise RowProblem(self.origin(index), side, f"{folder} has no picture called {name}.*")
            if problem := only_one(pictures[name]):
                raise RowProblem(self.origin(index), side, problem)
        try:
            caption = next((c for c in self._captions(name) if c.exists()), None)
            if caption is None:
                raise ValueError(f"no caption {name}.txt in {self._folders[0]} or {self._root}")
            prompt = read_text(caption)
        except ValueError as error:
            raise RowProblem(self.origin(index), None, str(error)) from error
        winner, loser = (str(pictures[name][0].absolute()) for pictures in self._pictures)
        return {"prompt": prompt, "chosen": winner, "rejected": loser}

    def cells(self, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        return repeat((None,) * len(columns), len(self))

    def schema(self) -> pa.Schema | None:
        return None

    def origin(self, index: int) -> str:
        return f"{self._root.name}/{self._names[index]}"

    def identity(self, images: Sequence[str], others: Sequence[str]) -> Iterator[Any]:
        """Of what rows are read from: what else lies there (``Thumbs.db``) is no part of the data."""
        pictures = {file for side in self._pictures for found in side.values() for file in found}
        captions = {file for name in self._names for file in self._captions(name) if file.is_file()}
        return identity_of(sorted(pictures | captions), self._root)

    def _captions(self, name: str) -> list[Path]:
        """Where the caption of a row may be; the first that is there is read."""
        return [place / f"{name}.txt" for place in (self._folders[0], self._root, self._folders[1])]
