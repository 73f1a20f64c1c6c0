"""Writing results so that nothing half-written ever stands in place of something whole."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from diffalign.file_modes import as_opened
from diffalign.written_aside import disk_error


@contextmanager
def installed_into(folder: Path, *, last: str = "") -> Iterator[Path]:
    """A temporary sibling of ``folder``; what is written there replaces the entries of the same names in ``folder``.

    Other entries of ``folder`` stay. The entry called ``last`` is moved last (an index that names the others, say). Entries
    already replaced are put back if a later one fails. Files have the mode that ``open`` would have given them.

    Raises:
        UserError: something could not be written (a full disk, say); ``folder`` is as it was.
    """
    aside: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.writing-", dir=folder.parent))
        fresh = aside / "new"
        fresh.mkdir()
        yield fresh
        as_opened(*fresh.rglob("*"))
        _install(fresh, folder, aside / "old", last)
    except (OSError, SafetensorError) as error:
        raise disk_error(error, folder) from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def _install(fresh: Path, folder: Path, old: Path, last: str) -> None:
    if not folder.exists():
        fresh.rename(folder)
        return
    old.mkdir()
    names = sorted((entry.name for entry in fresh.iterdir()), key=lambda name: (name == last, name))
    done: list[str] = []
    try:
        for name in names:
            done.append(name)
            if (folder / name).exists():
                (folder / name).rename(old / name)
            (fresh / name).rename(folder / name)
    except OSError:
        for name in done:
            _put_back(fresh / name, folder / name, old / name)
        raise


def _put_back(fresh: Path, place: Path, old: Path) -> None:
    if place.exists() and not fresh.exists():
        place.rename(fresh)
    if old.exists():
        old.rename(place)


def sort_header(path: Path) -> None:
    """Put the header's text fields in order, so that the same tensors and fields are the same file: safetensors shuffles them.

    The header is JSON behind its length, eight bytes, little endian (safetensors' format description).
    """
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        fields = dict(sorted(header.pop("__metadata__", {}).items()))
        text = json.dumps({"__metadata__": fields, **header}, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # the same words in another order; blanks may follow
            file.seek(8)
            file.write(text.ljust(length))
