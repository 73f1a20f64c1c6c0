"""What the readers share: identity of files, shards of a split, pictures by name."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.digests import file_digest
from diffalign.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

WINNER = ("win", "winner", "chosen", "w")
LOSER = ("lose", "loser", "rejected", "l")
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
HASHED_BYTES = 64 * 2**20
"""Files with no more than this in all are identified by their whole content; of more pictures, as many as come first."""
BLOCK = 64 * 2**10
BLOCKS, FEWEST_BLOCKS = 16, 3
"""How many blocks are read of a file that is too large for that; fewer of each where there are many files."""
ONE_IN = 256
"""Of pictures that are too many for that, how many are looked into."""
CAPTION = ".txt"

_UNTIDY = re.compile(r"(?:^|/)\.?(?:/|\Z)")
"""Finds a part of a path that is empty or a dot; an absolute path begins with an empty one."""
_WORDS = "train|training|validation|valid|val|test|testing|eval|evaluation"
_SPLIT = re.compile(rf"(?:{_WORDS}|dev)(?:_[a-z]+)*(?=$|[^a-z])")
_CACHED_SPLIT = re.compile(rf"-((?:{_WORDS}|dev)(?:_[a-z]+)*)(?:-\d+-of-\d+)?\.arrow$")
"""How ``datasets`` names the files of its cache: ``NAME-SPLIT-00000-of-00001.arrow``."""
_SPLIT_INSIDE = re.compile(rf"(?<![a-z])(?:{_WORDS})(?:_[a-z]+)*(?=$|[^a-z])")
"""A split somewhere in a name, as in ``pickapic_validation.parquet``. Not ``dev``: FLUX.1-dev is a model."""


def identity_of(files: Sequence[Path], root: Path) -> Iterator[list[object]]:
    """``identities`` of pictures and captions, of which there may be a million."""
    return identities((str(file), _name(file, root)) for file in files)


def identity_of_paths(paths: Iterable[str], root: Path) -> Iterator[list[object]]:
    """``identities`` of pictures that a list names, relative to ``root``."""
    start = str(root / "_")[:-1]
    return identities(_located(path, root, start) for path in paths)


def with_pictures(data: list[object], paths: Iterable[str], root: Path) -> list[object]:
    """The identity of a table's files, and with it that of the pictures whose paths the table holds, if it holds any."""
    listed = sorted(set(paths))
    return [data, identity_of_paths(listed, root)] if listed else data


def identities(places: Iterable[tuple[str, str]]) -> Iterator[list[object]]:
    """``[name, size, sha256]`` of a file while no more than ``HASHED_BYTES`` have come by in all, and of every caption.

    Of what comes after that, ``[name, size]``: opening a million pictures would take minutes. Of the first of these and of every
    ``ONE_IN``-th from there a sha256 of ``FEWEST_BLOCKS`` blocks follows, which are the whole of a picture of up to 192 KiB.
    What is no file, or cannot be read when it is to be, is ``[name]``. When a file was changed has no part in it: all are the
    same when they are copied or touched.

    A change goes unnoticed that is to pictures beyond the first ``HASHED_BYTES`` alone, and leaves the size of each as it was:
    a picture exchanged for another of the very same number of bytes that is not among the sampled, or differs from the sampled
    one only between the blocks.

    Args:
        places: path and name of every file, in an order that does not depend on where they are.
    """
    passed = beyond = 0
    for path, name in places:
        size = _size(path)
        caption = path.endswith(CAPTION)
        passed += size if size and not caption else 0
        whole = caption or passed <= HASHED_BYTES
        if size is None:
            yield [name]
        elif whole or beyond % ONE_IN == 0:
            yield _read(Path(path), name, size, whole)
        else:
            yield [name, size]
        beyond += size is not None and not whole


def identity_of_data(files: Sequence[Path], root: Path | None, used: Iterable[bytes | pa.Buffer]) -> list[object]:
    """``[name, size, sha256]`` of every file, of its content or of blocks of it, and then ``[sha256]`` of ``used``.

    ``used`` is what must be read whole, whatever the size: prompts, labels, weights and scores, and what the file says about
    its own parts. Files of up to ``HASHED_BYTES`` in all are read whole and need none of it. Larger ones are the same when they
    are copied or touched; and a change goes unnoticed that is to pictures alone, leaves every size (of parquet also the size
    and the bounds of every part of every column) as it was, and lies between the blocks: at the worst a few pictures exchanged
    for others of the very same number of bytes. Without a ``root`` a file is known by its name alone.
    """
    whole = _few_bytes(files)
    count = min(max(HASHED_BYTES // BLOCK // max(len(files), 1), FEWEST_BLOCKS), BLOCKS)
    found: list[object] = []
    for file in files:
        digest = file_digest(file) if whole else sha256_of(_blocks(file, count))
        found.append([file.name if root is None else _name(file, root), file.stat().st_size, digest])
    return found if whole else [*found, [sha256_of(used)]]


def sha256_of(pieces: Iterable[bytes | pa.Buffer]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _blocks(file: Path, count: int) -> Iterator[bytes]:
    """The first and the last block, and others at equal distances between them."""
    last = max(file.stat().st_size - BLOCK, 0)
    with file.open("rb") as stream:
        for number in range(count):
            stream.seek(last * number // (count - 1))
            yield stream.read(BLOCK)


def _few_bytes(files: Iterable[Path]) -> bool:
    """Whether all have no more than ``HASHED_BYTES``; looks at no more files than it must."""
    return not any(total > HASHED_BYTES for total in accumulate(_size(file) or 0 for file in files))


def _size(path: str | Path) -> int | None:
    """Bytes of a file; None of what is none, or not there."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # of a name that no file can have
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None  # a pipe would be read for ever


def _read(path: Path, name: str, size: int, whole: bool) -> list[object]:
    try:
        return [name, size, file_digest(path) if whole else sha256_of(_blocks(path, FEWEST_BLOCKS))]
    except OSError:
        return [name]


def _located(path: str, root: Path, start: str) -> tuple[str, str]:
    """Where a path of a list leads, and its name from ``root``; ``start`` is what comes before the names below ``root``.

    As ``pathlib`` has it, but that takes longer than to look at the file; most paths need none of its care. A path below ``~``
    keeps that in its name, so that another home makes it no other.
    """
    if path.startswith("~") and (expanded := os.path.expanduser(path)) != path:
        return expanded, path
    absolute = path.startswith("/")
    inside = path.removeprefix(start) if absolute else path
    if os.name == "posix" and not _UNTIDY.search(inside):
        return start + inside, inside
    if os.name == "posix" and absolute and start and not _UNTIDY.search(path[1:]):
        return path, path
    file = root / path
    return str(file), _name(file, root)


def _name(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else file.as_posix()


def shards(where: str, suffix: str, split: str) -> tuple[list[Path], str]:
    """The files of one split, and what to call them in reports: a single file as it is; in a folder those that name the split.

    Files that name no split belong to ``train``. Raises ``UserError`` where the split has no file.
    """
    root = Path(where)
    if root.is_file():
        return [root], str(root)
    by_split: dict[str, list[Path]] = {}
    for file in sorted(shard_files(root, suffix), key=in_order):
        by_split.setdefault(_split_of(file, root), []).append(file)
    if split not in by_split:
        there = ", ".join(sorted(by_split))
        raise UserError(
            f"{where} has no split {split!r}; its {suffix} files are of: {there}. Ask for one of these (split), or name a file."
        )
    others = ", ".join(sorted(by_split.keys() - {split}))
    return by_split[split], f"{where} (split {split}, without {others})" if others else str(root)


def in_order(path: Path) -> list[str]:
    """What paths are sorted by, everywhere alike: Windows' own order does not know capitals."""
    return list(path.parts)


def is_split(name: str) -> bool:
    """Whether a folder of this name holds a split."""
    return _SPLIT.fullmatch(name) is not None


def _split_of(file: Path, root: Path) -> str:
    """The split that the file's name says, or else that of the nearest folder that says one."""
    names = (file.name, *(p.name for p in file.relative_to(root).parents))
    return next(filter(None, map(_split_in, names)), "train")


def _split_in(name: str) -> str | None:
    """The split that a name says, in letters of either case: test rows that are taken for training are worse than a refusal."""
    name = name.lower()
    if match := _CACHED_SPLIT.search(name):
        return match.group(1)
    if match := _SPLIT.match(name):
        return match.group(0)
    inside = _SPLIT_INSIDE.findall(name)
    if not inside:
        return None
    return "train" if inside[-1].startswith("train") else inside[-1]  # ``my_train_pairs`` is no split of that name


def same_columns(files: Sequence[Path], columns: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The columns of all shards, in the order of the first. Raises ``UserError`` for a shard that lacks one that another has,
    whose labels or weights would be left out silently, and for two columns of one name."""
    for file, names in zip(files, columns, strict=True):
        refuse_twice(file, names)
        _refuse_missing(file, names, files[0], columns[0])
        _refuse_missing(files[0], columns[0], file, names)
    return tuple(columns[0])


def refuse_twice(file: Path, columns: Sequence[str]) -> None:
    """Raises ``UserError`` for two columns of one name, of which either could be meant."""
    if twice := [name for k, name in enumerate(columns) if name and name in columns[:k]]:
        raise UserError(f"{file} has two columns called {twice[0]!r}; rename or remove one of them.")


def _refuse_missing(file: Path, columns: Sequence[str], other: Path, wanted: Sequence[str]) -> None:
    if missing := [name for name in wanted if name not in columns]:
        raise UserError(f"{file} lacks the columns {', '.join(missing)}, which {other.name} has; shards must agree.")


def shard_files(root: Path, suffix: str) -> Iterator[Path]:
    """All files of a form below a folder but the hidden ones, such as the ``._NAME`` that macOS puts beside copies."""
    return (file for file in root.rglob(f"*{suffix}") if not file.name.startswith("."))


def pictures(folder: Path, stems: Sequence[str]) -> list[Path]:
    """The pictures in ``folder`` whose name without suffix is one of ``stems``, in letters of either case."""
    return sorted((p for p in folder.iterdir() if p.suffix.lower() in PICTURES and p.stem.lower() in stems), key=in_order)


def only_one(found: Sequence[Path]) -> str | None:
    """Why nobody knows which of several pictures is meant; None for a single one."""
    names = ", ".join(file.name for file in found)
    return f"{len(found)} pictures could be meant: {names}; keep one of them" if len(found) > 1 else None


def read_text(path: Path) -> str:
    """A small text file. Raises ``ValueError`` with the reason."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
