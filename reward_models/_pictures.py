"""Whatever a person calls pictures, as N pictures in order, each opened when it is needed.

What cannot be read is None, remembered in ``broken`` and told once at the end: one bad file must not cost a night's work, and
must not pass unseen.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import ExifTags, Image, ImageOps

from reward_models.base import JudgeError

if TYPE_CHECKING:
    import numpy as np

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
"""Those that training reads (``diffalign.data.readers``)."""
SLACK = 1e-3
"""How far a float picture may leave [0, 1] by rounding."""
SHEETS = ("grid.png", "generation.json")
"""``diffalign generate`` lays a sheet of all pictures beside them, and this record; the sheet is none of the pictures."""
NAMED = 5
"""Unreadable files that a warning names; it counts all."""
_UNBOUNDED = ("I", "F")
"""Modes of 32 bits, of which nobody knows how bright white is."""
_TRANSPARENT = ("RGBA", "LA", "PA", "La", "RGBa")


class UnreadablePictureWarning(UserWarning):
    """Some files are no pictures; their scores are NaN."""


@dataclass(frozen=True)
class NoPicture:
    """A place where a picture should be, and why there is none: counted and named like a file that cannot be read."""

    name: str
    reason: str


class Pictures:
    """PIL images, paths, a folder (sorted by name, 2 before 10), arrays [H, W, 3] or [N, H, W, 3], tensors [3, H, W] or
    [N, 3, H, W], either also grey [H, W], uint8 or float in [0, 1], encoded bytes, a column of a data set or a frame, or a
    sequence of these. None stays None.

    Raises:
        JudgeError: something that is no picture, or a float picture outside [0, 1]. Files are not opened yet.
    """

    def __init__(self, images: Any) -> None:
        self.items = [_item(one) for one in _flat(images)]
        self.broken: dict[int, str] = {}

    @classmethod
    def of(cls, images: Any) -> Pictures:
        """``images`` itself if it has been through here already."""
        return images if isinstance(images, Pictures) else cls(images)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Image.Image | None:
        """The picture, decoded, in RGB as it is to be seen; None if it cannot be."""
        item = self.items[i]
        if item is None:
            return None
        if isinstance(item, NoPicture):
            self.broken[i] = f"{item.name} ({item.reason})"
            return None
        # Decoders raise a dozen exception types on damaged files (OSError, SyntaxError, struct.error, EOFError, ...).
        try:
            if isinstance(item, Image.Image):
                return as_seen(item)
            with Image.open(io.BytesIO(item) if isinstance(item, bytes) else item) as image:
                return as_seen(image)
        except Exception as error:
            self.broken[i] = f"{self.name(i)} ({error})"
            return None

    def __iter__(self) -> Iterator[Image.Image | None]:
        return (self[i] for i in range(len(self)))

    def name(self, i: int) -> str:
        """Its path, or its number."""
        return str(self.items[i]) if isinstance(self.items[i], Path) else f"picture {i}"

    def digest(self, i: int) -> str | None:
        """A hash of the content: of a file's bytes, which need no decoding, or of the pixels. None if there are none."""
        item = self.items[i]
        if item is None or isinstance(item, NoPicture):
            return None
        if isinstance(item, Image.Image):
            return _digest_of_pixels(item)
        try:
            content = item if isinstance(item, bytes) else item.read_bytes()
        except OSError:
            return None  # told when it is opened
        return hashlib.sha256(content).hexdigest() + _way_of(content)

    def warn(self) -> None:
        """One warning that counts the pictures that could not be read, and names some."""
        if self.broken:
            told = [self.broken[i] for i in sorted(self.broken)]
            shown = "; ".join(told[:NAMED]) + ("; ..." if len(told) > NAMED else "")
            text = f"{len(told)} of {len(self)} pictures cannot be read and score NaN: {shown}"
            warnings.warn(text, UnreadablePictureWarning, stacklevel=4)


def list_folder(folder: Path) -> list[Path]:
    """The pictures of a folder, sorted by name, 2 before 10; not those of its subfolders, and no hidden files.

    A link to a file that is gone is one of them, which cannot be read.
    """
    # macOS lays a hidden ._NAME.png beside NAME.png on disks that are not its own
    named = (p for p in folder.iterdir() if p.suffix.lower() in ENDINGS and not p.name.startswith("."))
    pictures = (p for p in named if p.is_file() or (p.is_symlink() and not p.exists()))
    found = sorted(pictures, key=_in_natural_order)
    if (folder / SHEETS[1]).is_file():
        found = [p for p in found if p.name != SHEETS[0]]
    if not found:
        raise JudgeError(f"there is no picture in {folder} (looked for {', '.join(ENDINGS)})")
    return found


def _in_natural_order(path: Path) -> tuple[list[str | int], str]:
    """Numbers in a name count as numbers; names that then are equal, as 7 and 007, are sorted letter by letter."""
    return [int(x) if i % 2 else x for i, x in enumerate(re.split(r"(\d+)", path.name))], path.name


def as_seen(image: Image.Image) -> Image.Image:
    """In RGB as a person sees it, and as training reads it (``diffalign.data.pairs``): turned upright as its EXIF data says,
    transparency laid over white, 16-bit grey reduced to 8 bits.

    Raises:
        ValueError: pixels of 32 bits. Of a file, also whatever the decoder raises.
    """
    image.load()
    if image.mode == "RGB" and _as_stored(image):
        return image
    if image.mode in _UNBOUNDED:
        raise ValueError(f"pixels of mode {image.mode} (32 bits) have no agreed range; save the picture as 8-bit RGB")
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        import numpy as np

        return Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8)).convert("RGB")
    if _is_transparent(upright):
        seen = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    return upright.convert("RGB")


def _is_transparent(image: Image.Image) -> bool:
    return image.mode in _TRANSPARENT or "transparency" in image.info


def _as_stored(image: Image.Image) -> bool:
    """Whether the stored pixels, converted to RGB, are what there is to see. Of a file this reads the head only."""
    deep = image.mode in _UNBOUNDED or image.mode.startswith("I;16")
    return not (_orientation(image) != 1 or deep or _is_transparent(image))


def _orientation(image: Image.Image) -> int:
    """How EXIF data turn the picture, 1 to 8; 1 is as it is stored."""
    # not image.getexif(), by which a PNG would be decoded as a whole to look for EXIF data behind the pixels
    return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)


def _digest_of_pixels(image: Image.Image) -> str | None:
    """A hash of the pixels as they are stored and of how they are shown; None of an opened file that cannot be decoded."""
    try:
        pixels = image.tobytes()  # first: decoding a file changes what the image says of itself
    except Exception:  # as in ``Pictures``, where it is told
        return None
    orientation = _orientation(image)
    shown = "" if orientation == 1 else str(orientation)
    shape = f"{image.mode} {image.size} {image.getpalette()} {image.info.get('transparency')} {shown}"
    return hashlib.sha256(shape.encode() + pixels).hexdigest() + _way_of(image)


def _way_of(picture: Image.Image | bytes) -> str:
    """What is added to the hash of a picture that is more than converted to RGB: before, it was no more than that, and scores
    that a cache holds from then would be mistaken for those of what is seen now."""
    try:
        with Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else contextlib.nullcontext(picture) as image:
            return "" if _as_stored(image) else " as seen"
    except Exception:
        return ""  # has no score to be mistaken


def _flat(images: Any) -> Iterable[Any]:
    if isinstance(images, str | Path):
        return list_folder(Path(images)) if Path(images).is_dir() else [_there(images)]
    if isinstance(images, Image.Image | bytes | Mapping):
        return [images]
    if hasattr(images, "shape") and len(images.shape) != 1:  # one-dimensional: a column of a frame
        return list(images) if len(images.shape) == 4 else [images]
    if not isinstance(images, Sequence) and not hasattr(images, "__len__"):
        raise JudgeError(f"pictures are PIL images, paths, arrays or tensors, or a list of them; got {type(images).__name__}")
    return images


def _there(path: str | Path) -> str | Path:
    """A picture that is named by itself. Of many, one that is missing is NaN; of one, nothing would be left."""
    _refuse_address(path)
    if not Path(path).is_file():
        raise JudgeError(f"there is no picture or folder {path} (seen from {Path.cwd()})")
    return path


def _refuse_address(path: str | Path) -> None:
    if str(path).startswith(("http:/", "https:/")):
        raise JudgeError(f"{path} is an address; pictures are read from files: fetch it first, or give it as a PIL image")


def _item(one: Any) -> Image.Image | Path | bytes | NoPicture | None:
    """One picture as it is kept: files stay closed, numbers become a picture at once, so that wrong ranges are told early."""
    if isinstance(one, Mapping):  # how ``datasets`` keeps a picture that it has not decoded
        one = one.get("bytes") or one.get("path")
    if isinstance(one, str | Path):
        _refuse_address(one)
        return Path(one)
    if one is None or isinstance(one, Image.Image | bytes | NoPicture):
        return one
    if not hasattr(one, "shape"):
        raise JudgeError(f"a picture is a PIL image, a path, an array or a tensor; got {type(one).__name__}")
    return _from_array(one)


def _from_array(picture: Any) -> Image.Image:
    import numpy as np

    is_tensor = hasattr(picture, "detach")
    array = np.asarray(picture.detach().cpu().float() if is_tensor and picture.is_floating_point() else picture)
    if array.ndim == 2:  # grey, as PIL's mode L
        array = np.stack([array] * 3, axis=0 if is_tensor else 2)
    if array.ndim != 3 or array.shape[0 if is_tensor else 2] != 3:
        layout = "[3, H, W]" if is_tensor else "[H, W, 3]"
        raise JudgeError(
            f"a picture as {'a tensor' if is_tensor else 'an array'} is {layout}, or grey [H, W]; got {tuple(array.shape)}"
        )
    return Image.fromarray(_bytes(array.transpose(1, 2, 0) if is_tensor else array))


def _bytes(array: np.ndarray) -> np.ndarray:
    """uint8 from float in [0, 1], rounded: cutting off would move half of the values by a level."""
    import numpy as np

    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise JudgeError(f"a picture as numbers is uint8, or float in [0, 1]; got {array.dtype}")
    low, high = float(array.min()), float(array.max())
    if not (low >= -SLACK and high <= 1 + SLACK):
        hint = " These look like [-1, 1]: pass (x + 1) / 2." if -1.1 < low < 0 and high < 1.1 else ""
        hint = " These look like [0, 255]: pass uint8, or x / 255." if high > 1.5 and low >= 0 else hint
        raise JudgeError(f"float pictures hold values in [0, 1]; these reach from {low:.3g} to {high:.3g}.{hint}")
    return np.round(array.clip(0.0, 1.0) * 255.0).astype(np.uint8)
