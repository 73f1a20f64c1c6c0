"""What the readers share: identity of files, shards of a split, pictures by name."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from diffalign.errors import UserError

WINNER = ("win", "winner", "chosen", "w")
LOSER = ("lose", "loser", "rejected", "l")
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
HASHED_BYTES = 64 * 2**20
"""Files are identified by their content up to this many bytes in all, and by size and time of change above."""

_SPLIT = re.compile(r"(train|training|validation|valid|val|dev|test|testing)(_[a-z]+)*(?=$|[^a-z])")


def identity_of(files: Iterable[Path], root: Path, content: bool = True) -> list[list[object]]:
    """``[name, size, sha256 or time of change]`` of every file; a file that does not exist is ``[name]``."""
    stats = [(f, f.stat() if f.exists() else None) for f in files]
    small = content and sum(s.st_size for _, s in stats if s) <= HASHED_BYTES
    found: list[list[object]] = []
    for file, stat in stats:
        name = file.relative_to(root).as_posix() if file.is_relative_to(root) else file.as_posix()
        if stat is None:
            found.append([name])
        else:
            found.append([name, stat.st_size, hashlib.sha256(file.read_bytes()).hexdigest() if small else stat.st_mtime_ns])
    return found


def shards(where: str, suffix: str, split: str) -> list[Path]:
    """The files of one split: a single file as it is; in a folder those whose name or parent folder begins with the split.

    Files that name no split belong to ``train``. Raises ``UserError`` where the split has no file.
    """
    root = Path(where)
    if root.is_file():
        return [root]
    by_split: dict[str, list[Path]] = {}
    for file in sorted(root.rglob(f"*{suffix}")):
        by_split.setdefault(_split_of(file, root), []).append(file)
    if split not in by_split:
        raise UserError(f"{where} has no split {split!r}; its {suffix} files are of: {', '.join(sorted(by_split))}.")
    return by_split[split]


def is_split(name: str) -> bool:
    """Whether a folder of this name holds a split."""
    return _SPLIT.fullmatch(name) is not None


def _split_of(file: Path, root: Path) -> str:
    for name in (file.name, *(p.name for p in file.relative_to(root).parents)):
        if name and (match := _SPLIT.match(name)):
            return match.group(0)
    return "train"


def same_columns(files: Sequence[Path], columns: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The columns of the first shard. Raises ``UserError`` for a shard that lacks one of them."""
    for file, names in zip(files, columns, strict=True):
        if missing := [name for name in columns[0] if name not in names]:
            raise UserError(f"{file} lacks the columns {', '.join(missing)}, which {files[0].name} has; shards must agree.")
    return tuple(columns[0])


def picture(folder: Path, stems: Sequence[str]) -> Path | None:
    """The first picture in ``folder`` whose name without suffix is one of ``stems``."""
    found = {p.stem.lower(): p for p in sorted(folder.iterdir(), reverse=True) if p.suffix.lower() in PICTURES}
    return next((found[stem] for stem in stems if stem in found), None)


def read_text(path: Path) -> str:
    """A small text file. Raises ``ValueError`` with the reason."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
