"""Whatever a person calls pictures, as a list of PIL images in order; what cannot be read is told, not hidden."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, UnidentifiedImageError

from reward_models.base import JudgeError

if TYPE_CHECKING:
    import numpy as np

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
SLACK = 1e-3
"""How far a float picture may leave [0, 1] by rounding."""


class UnreadablePictureWarning(UserWarning):
    """Some files are no pictures; their scores are NaN."""


def read_pictures(images: Any) -> list[Image.Image | None]:
    """Pictures in order: PIL images, paths, a folder (sorted by name), arrays [H, W, 3] or [N, H, W, 3], tensors [3, H, W] or
    [N, 3, H, W], uint8 or float in [0, 1], or a sequence of these. A file that cannot be read is None, with one warning
    that counts and names such files; None stays None.

    Raises:
        JudgeError: something that is no picture, or a float picture outside [0, 1].
    """
    read: list[Image.Image | None] = []
    broken: list[str] = []
    for one in _flat(images):
        if isinstance(one, str | Path):
            read.append(_open(Path(one), broken))
        else:
            read.append(one if one is None or isinstance(one, Image.Image) else _from_array(one))
    if broken:
        shown = "; ".join(broken[:5]) + ("; ..." if len(broken) > 5 else "")
        warnings.warn(f"{len(broken)} of {len(read)} pictures cannot be read and score NaN: {shown}", UnreadablePictureWarning, 3)
    return read


def list_folder(folder: Path) -> list[Path]:
    """The pictures of a folder, sorted by name; not those of its subfolders."""
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in ENDINGS)
    if not found:
        raise JudgeError(f"there is no picture in {folder} (looked for {', '.join(ENDINGS)})")
    return found


def _flat(images: Any) -> Iterable[Any]:
    if isinstance(images, str | Path):
        return list_folder(Path(images)) if Path(images).is_dir() else [images]
    if isinstance(images, Image.Image):
        return [images]
    if hasattr(images, "shape"):
        return list(images) if len(images.shape) == 4 else [images]
    if not isinstance(images, Sequence):
        raise JudgeError(f"pictures are PIL images, paths, arrays or tensors, or a list of them; got {type(images).__name__}")
    return images


def _open(path: Path, broken: list[str]) -> Image.Image | None:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        broken.append(f"{path} ({error})")
        return None


def _from_array(picture: Any) -> Image.Image:
    import numpy as np

    is_tensor = hasattr(picture, "detach")
    array = np.asarray(picture.detach().cpu().float() if is_tensor and picture.is_floating_point() else picture)
    if array.ndim != 3 or array.shape[0 if is_tensor else 2] != 3:
        layout = "[3, H, W]" if is_tensor else "[H, W, 3]"
        raise JudgeError(f"a picture as {'a tensor' if is_tensor else 'an array'} is {layout}; got {tuple(array.shape)}")
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
