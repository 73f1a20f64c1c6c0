"""Output files and folders: nothing is replaced without the user's consent, and no file is left half-written."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffalign.errors import UserError
from diffalign.written_aside import write_file

if TYPE_CHECKING:
    from PIL import Image


def check_folder(folder: str | Path, overwrite: bool) -> Path:
    """The folder, if it may be written to: it is absent, empty, or ``overwrite`` is set. Creates nothing.

    Raises:
        UserError: it holds something, or it is not a folder.
    """
    path = Path(folder).expanduser()
    if path.exists() and not path.is_dir():
        raise UserError(f"The output {path} is a file; it should be a folder that is empty or does not exist yet.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UserError(
            f"The output folder {path} is not empty. Name another, or add --overwrite to replace what an earlier run left."
        )
    return path


def check_file(path: str | Path, overwrite: bool) -> Path:
    """The file, if it may be written: nothing is there, or ``overwrite`` is set. Creates nothing.

    Raises:
        UserError: something is there, or it is a folder.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        raise UserError(f"{place} is a folder; name a file.")
    if place.exists() and not overwrite:
        raise UserError(f"{place} is there already. Name another, or add --overwrite to replace it.")
    return place


def clear(folder: Path, owned: Sequence[str]) -> None:
    """Make the folder, or remove from it what an earlier run left: the files that the patterns ``owned`` match, no others, and
    folders inside it that hold nothing without them."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = [file for pattern in owned for file in folder.glob(pattern)]
        for file in files:
            file.unlink()
        for emptied in {file.parent for file in files} - {folder}:
            if not any(emptied.iterdir()):
                emptied.rmdir()
    except OSError as error:
        raise UserError(f"The output folder {folder} cannot be written to: {error.strerror or error}.") from error


def write_png(path: Path, image: Image.Image) -> None:
    """The picture, losslessly."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_file(path, buffer.getvalue())


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Readable JSON; numbers that are not finite become null, since JSON has no word for them."""
    write_file(path, json.dumps(json_plain(values), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Comma-separated values; NaN and None are empty fields."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n", quoting=quoting(cell for row in rows for cell in row))
    writer.writerow(header)
    writer.writerows([["" if _missing(v) else v for v in row] for row in rows])
    write_file(path, buffer.getvalue())


def quoting(cells: Iterable[Any]) -> int:
    """The quoting of CSV cells: minimal, but every text where one has a carriage return, which ends a row for readers and which
    Python before 3.13 quotes with no other setting."""
    return csv.QUOTE_NONNUMERIC if any(isinstance(cell, str) and "\r" in cell for cell in cells) else csv.QUOTE_MINIMAL


def versions() -> dict[str, str | None]:
    """Versions of what decides the numbers; None for what is not installed as a package."""
    import platform

    def of(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    packages = ("diffalign", "torch", "diffusers", "transformers", "numpy", "scipy", "pillow")
    return {"python": platform.python_version(), **{package: of(package) for package in packages}}


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def json_plain(value: Any, other: Callable[[Any], Any] = lambda value: value) -> Any:
    """The value in types that JSON knows: lists for tuples, Python's numbers for NumPy's, None for those that are not finite.

    ``other`` converts what is left over; by default it stays as it is, and ``json.dumps`` refuses it.
    """
    if isinstance(value, Mapping):
        return {str(k): json_plain(v, other) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_plain(v, other) for v in value]
    if isinstance(value, np.generic):
        return json_plain(value.item(), other)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else other(value)
