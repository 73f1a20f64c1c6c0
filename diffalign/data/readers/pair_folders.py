"""A folder with one sub-folder per pair: ``prompt.txt``, ``win.*`` and ``lose.*``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.data.pairs import RowProblem
from diffalign.data.readers._files import LOSER, WINNER, identity_of, in_order, only_one, pictures, read_text

if TYPE_CHECKING:
    import pyarrow as pa

FORM = "a folder with one sub-folder per pair, each with prompt.txt, win.* and lose.* (or winner/loser, chosen/rejected)"


def claims(where: str) -> bool:
    path = Path(where)
    return path.is_dir() and any(_is_pair(child) for child in path.iterdir())


def open_rows(where: str, split: str) -> PairFolderRows:
    return PairFolderRows(Path(where))


def _is_pair(folder: Path) -> bool:
    return folder.is_dir() and bool(pictures(folder, (*WINNER, *LOSER)))


class PairFolderRows:
    """One row per sub-folder, by name. A sub-folder that lacks something is a problem of that row."""

    columns = ("prompt", "chosen", "rejected")

    def __init__(self, root: Path) -> None:
        self._root = root
        self._names = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith((".", "_")))
        self.base: Path | None = None
        self.description = str(root)

    def __len__(self) -> int:
        return len(self._names)

    def row(self, index: int, columns: Sequence[str]) -> Mapping[str, Any]:
        folder = self._root / self._names[index]
        sides = {"chosen": pictures(folder, WINNER), "rejected": pictures(folder, LOSER)}
        for (side, found), stems in zip(sides.items(), (WINNER, LOSER), strict=True):
            if not found:
                raise RowProblem(self.origin(index), side, f"no picture called {' or '.join(f'{s}.*' for s in stems[:3])}")
            if problem := only_one(found):
                raise RowProblem(self.origin(index), side, problem)
        try:
            prompt = read_text(folder / "prompt.txt")
        except ValueError as error:
            raise RowProblem(self.origin(index), None, str(error)) from error
        return {"prompt": prompt, **{side: str(found[0].absolute()) for side, found in sides.items()}}

    def cells(self, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        return repeat((None,) * len(columns), len(self))

    def schema(self) -> pa.Schema | None:
        return None

    def origin(self, index: int) -> str:
        return f"{self._root.name}/{self._names[index]}"

    def identity(self, images: Sequence[str], others: Sequence[str]) -> Iterator[Any]:
        """Of what rows are read from: what else lies there (``Thumbs.db``) is no part of the data."""
        folders = [self._root / name for name in self._names]
        files = (file for folder in folders for file in (*pictures(folder, (*WINNER, *LOSER)), folder / "prompt.txt"))
        return identity_of(sorted((file for file in files if file.is_file()), key=in_order), self._root)
