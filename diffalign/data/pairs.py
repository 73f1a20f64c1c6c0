"""A pair of pictures, or a single one, and what somebody thought of it, still on disk or as bytes."""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from diffalign.errors import UserError

Progress = Callable[[str, int, int], None]
"""Told ``(stage, done, total)`` every now and then."""

WINNER, LOSER, PICTURE = "winner", "loser", "picture"
"""What the pictures of a row are called in messages."""

SIDEWAYS = {5, 6, 7, 8}  # EXIF orientations that exchange width and height


def printable(text: str) -> str:
    """The same text where it can be written; bytes of a file name that are not UTF-8, and halves of characters, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


class UnreadableImage(UserError):
    """A picture that cannot be read or decoded; the message is the reason alone, the caller knows the row."""

    def __init__(self, reason: str) -> None:
        super().__init__(printable(reason))


class RowProblem(UserError):
    """One row of a data set that cannot be used: where it is, which side (if one is at fault), and why."""

    def __init__(self, origin: str, side: str | None, reason: str) -> None:
        origin, reason = printable(origin), printable(reason)
        super().__init__(f"{origin}{f' ({side})' if side else ''}: {reason}")
        self.origin, self.side, self.reason = origin, side, reason


@dataclass(frozen=True)
class ImageSource:
    """An encoded picture (PNG, JPEG, WebP, ...), in a file or in memory; exactly one of the two."""

    path: Path | None = None
    data: bytes | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.data is None):
            raise ValueError("an ImageSource has either a path or data")

    def read_bytes(self) -> bytes:
        """The file's content. Raises ``UnreadableImage``."""
        if self.data is not None:
            return self.data
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise UnreadableImage(f"cannot read {_short(str(self.path))}: {error.strerror or error}") from error
        except ValueError as error:  # a name that no file can have
            raise UnreadableImage(f"cannot read {_short(str(self.path))!r}: {error}") from error

    def held(self) -> ImageSource:
        """The same picture with its bytes in memory, so that reading it several times costs one access."""
        return self if self.data is not None else ImageSource(data=self.read_bytes())

    def digest(self) -> str:
        """sha256 of the file's bytes, 64 hexadecimal digits."""
        return hashlib.sha256(self.read_bytes()).hexdigest()

    def open(self) -> Image.Image:
        """The picture as RGB, decoded to the last byte and turned upright as its EXIF data says.

        Transparency is laid over white; 16-bit grey is reduced to 8 bits. Raises ``UnreadableImage``, also for a
        truncated file.
        """
        data = self.read_bytes()
        if not data:
            raise UnreadableImage(f"{self._name()} is empty")
        # Decoders raise a dozen exception types on damaged files (OSError, SyntaxError, struct.error, EOFError, ...).
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                return _rgb(ImageOps.exif_transpose(image))
        except UnreadableImage:
            raise
        except Exception as error:
            raise UnreadableImage(f"{self._name()} cannot be decoded: {_plain(error)}") from error

    def size(self) -> tuple[int, int]:
        """(width, height) in pixels as shown, from the header alone. Raises ``UnreadableImage``."""
        try:
            with Image.open(io.BytesIO(self.read_bytes())) as image:
                width, height = _stored_size(image)
                return (height, width) if image.getexif().get(0x0112) in SIDEWAYS else (width, height)
        except UnreadableImage:
            raise
        except Exception as error:
            raise UnreadableImage(f"{self._name()} cannot be decoded: {_plain(error)}") from error

    def _name(self) -> str:
        return str(self.path) if self.path is not None else f"the picture of {len(self.data)} bytes"


@dataclass(frozen=True)
class PreferencePair:
    """A prompt, two pictures made for it, and which of them was preferred; or one picture, and whether it is wanted.

    A single picture stands on both sides, so that whatever works on pairs works on it: what is the same is encoded once.
    """

    prompt: str
    winner: ImageSource
    loser: ImageSource
    label: float  # probability that the winner is preferred, in [1/2, 1]; of a single picture that it is wanted, in [0, 1]
    weight: float  # factor on the pair's loss, >= 0
    origin: str  # file and row, for messages
    scores: tuple[float, float] | None = None  # a judge's, of winner and loser; None where there are none
    single: bool = False  # one picture, on both sides

    @property
    def tie(self) -> bool:
        return self.label == 0.5 and not self.single

    @property
    def sides(self) -> tuple[str, ...]:
        """The pictures that there are, by the names that ``side`` knows."""
        return (PICTURE,) if self.single else (WINNER, LOSER)

    def side(self, name: str) -> ImageSource:
        """``name`` is one of ``sides``."""
        return {PICTURE: self.winner, WINNER: self.winner, LOSER: self.loser}[name]


def image_from(value: Any, base: Path | None) -> ImageSource:
    """A cell of a table as a picture: bytes, a path, or the ``{"bytes", "path"}`` of an Image feature.

    Relative paths start from ``base``. Raises ``ValueError`` with the reason.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return ImageSource(data=bytes(value))
    if isinstance(value, str) and value.strip():
        if value.startswith("data:"):
            raise ValueError("the picture itself stands here as text (base64); write it to a file and give its path")
        if "://" in value:
            raise ValueError(f"{_short(value)} is an address; download the picture and give its path")
        path = Path(os.path.expanduser(value))  # what begins with ~ and names nobody's home may be a file
        return ImageSource(path=path if base is None else base / path)
    raise ValueError("there is no picture" if value in (None, "") else f"expected a path or bytes, found {type(value).__name__}")


def text_from(value: Any, name: str) -> str:
    """A cell as text, without white space at its ends. Raises ``ValueError`` that names the column for what is none."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {type(value).__name__}, not text")
    if is_broken(value):
        raise ValueError(f"{name} holds half of a surrogate pair, which is no character")
    return value.strip()


def is_broken(text: str) -> bool:
    """Whether there is half of a character in it, as JSON may hold, which no tokenizer and no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


_TRUTHS = {"true": 1.0, "false": 0.0}
"""Truth values as text, which is how CSV has them; those of JSON and parquet are numbers to Python."""


def flag_from(value: Any, name: str) -> bool | None:
    """A cell as a truth value, whether it is one, a number or text; None for an empty cell. Raises ``ValueError`` for others."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return number_from(value, name, 0.0, 1.0) != 0.0


def number_from(value: Any, name: str, low: float, high: float) -> float:
    """A cell as a finite number in [low, high]. Raises ``ValueError`` that names the column and the value."""
    try:
        number = float(_TRUTHS.get(value.strip().lower(), value) if isinstance(value, str) else value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} is {value!r}, not a number") from None
    if not (math.isfinite(number) and low <= number <= high):
        least = f" and at least {low:g}" if math.isfinite(low) else ""
        wanted = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"finite{least}"
        raise ValueError(f"{name} is {number:g}; it must be {wanted}")
    return number


def score_from(value: Any, name: str) -> float | None:
    """A cell as a judge's score; None for an empty cell or NaN. Raises ``ValueError`` that names the column and the value."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        if math.isnan(float(value)):
            return None
    except (TypeError, ValueError, OverflowError):
        pass  # the words for what is no number are those of every other cell
    return number_from(value, name, -math.inf, math.inf)


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) before a picture is turned upright; Pillow's ``size`` of a TIFF may be that of the turned one already."""
    return (image.tag_v2[256], image.tag_v2[257]) if image.format == "TIFF" else image.size


def _short(path: str) -> str:
    """A path as messages show it: what is longer than most paths are is no path, but a picture as text (base64)."""
    return path if len(path) <= 300 else f"{path[:80]}... ({len(path)} characters)"


def _plain(error: Exception) -> str:
    """What a decoder said, without the memory address of the buffer."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture in a format that Pillow knows"
    return str(error) or type(error).__name__


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise UnreadableImage(f"pixels of mode {image.mode} (32 bits) have no agreed range; save the picture as 8-bit RGB")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        seen = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    return image.convert("RGB")
