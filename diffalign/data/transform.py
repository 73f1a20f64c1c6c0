"""From a picture to what the encoder sees. One crop position and one mirror decision hold for both sides of a pair."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.data import buckets
from diffalign.data.buckets import Shape
from diffalign.errors import UserError

Position = tuple[float, float]
"""Where the crop lies, (vertical, horizontal), each in [0, 1]: 0 is the upper or left end, 1 the other."""

CENTER: Position = (0.5, 0.5)

FIT = 1.1
"""The most by which ``crop="fit"`` changes the ratio of a picture's sides."""

LONG = 16
"""How many times the crop a resized picture may be before only the crop is made."""

Framing = tuple[int, int, int, int, int, int]
"""What was done to a picture: height and width of the original; top and left of the crop, in pixels after resizing; height and
width of what is left. SDXL is trained with these numbers (Podell et al. 2023, arXiv 2307.01952, section 2.2)."""


@dataclass(frozen=True)
class Transform:
    """Resize the shorter side to ``resolution`` pixels, cut a square, mirror or not; with ``buckets``, resize to just cover the
    shape nearest to the winner's (see ``buckets``) and cut to that.

    Bilinear resizing with antialiasing, as in the released Diffusion-DPO script; only that the longer side is rounded to the
    nearest pixel, and down by torchvision's Resize, which that script uses. ``crop="random"`` draws one relative position per
    pair from (seed, pair index), so that it is known before anything is encoded and never changes. ``crop="fit"``
    cuts nothing of a picture whose proportions are within ``FIT`` of the shape's: it is resized to it, either side by itself.
    With buckets of one sixteenth of the resolution that holds for every winner, up to the widest bucket; others are cut at the
    centre.
    ``flip`` means that both orientations are encoded and whoever draws a batch chooses one for the whole pair.
    """

    resolution: int
    crop: str = "center"
    flip: bool = False
    seed: int = 0
    buckets: bool = False
    bucket_step: int = 64  # pixels, of which both sides of a bucket are multiples

    def __post_init__(self) -> None:
        if self.resolution < 8:
            raise UserError(f"resolution is {self.resolution}; it must be at least 8 pixels.")
        if self.crop not in ("center", "random", "fit"):
            raise UserError(f"crop is {self.crop!r}; it must be 'center', 'random' or 'fit'.")
        if self.buckets and not 1 <= self.bucket_step <= self.resolution:
            raise UserError(f"bucket_step is {self.bucket_step}; it must be from 1 to the resolution, {self.resolution}.")

    def position(self, index: int) -> Position:
        """The crop position of pair ``index``, the same for both of its pictures."""
        if self.crop != "random":
            return CENTER
        top, left = np.random.default_rng((self.seed, index)).random(2)
        return float(top), float(left)

    @property
    def square(self) -> Shape:
        return self.resolution, self.resolution

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """(height, width) of all that ``target`` may say."""
        return buckets.shapes(self.resolution, self.bucket_step) if self.buckets else (self.square,)

    def target(self, size: tuple[int, int]) -> Shape:
        """(height, width) to which a pair is cut whose winner's ``size`` is (width, height)."""
        return buckets.nearest(size, self.resolution, self.bucket_step) if self.buckets else self.square

    def views(self, image: Image.Image, position: Position, target: Shape | None = None) -> list[Tensor]:
        """The orientations to encode: as it is, and mirrored where ``flip`` is set. float32 [3, H, W] in [-1, 1].

        ``target`` is (H, W), the square if not given.
        """
        upright = self.apply(image, position, False, target)
        return [upright, upright.flip(-1)] if self.flip else [upright]

    def framings(self, size: tuple[int, int], position: Position, target: Shape | None = None) -> list[Framing]:
        """What ``views`` does to a picture of ``size`` (width, height), for each of them.

        A mirrored view is a crop of the mirrored picture: what was left of the crop is now right of it.
        """
        target = target or self.square
        resized = self._resized(size, target)
        top, left = _corner(resized, target, position)
        lefts = [left, resized[0] - target[1] - left] if self.flip else [left]
        return [(size[1], size[0], top, x, *target) for x in lefts]

    def apply(self, image: Image.Image, position: Position, flipped: bool, target: Shape | None = None) -> Tensor:
        """An RGB picture -> float32 [3, H, W] in [-1, 1], the square if no ``target`` (H, W) is given."""
        high, wide = target = target or self.square
        resized = self._resized(image.size, target)
        top, left = _corner(resized, target, position)
        pixels = np.asarray(_cut(image, resized, (left, top, left + wide, top + high)), dtype=np.float32)
        tensor = torch.from_numpy(pixels / 127.5 - 1.0).permute(2, 0, 1)
        return (tensor.flip(-1) if flipped else tensor).contiguous()

    def describe(self) -> dict[str, Any]:
        """Everything the encoded pixels depend on, as plain values. The seed counts only where something is drawn."""
        found = asdict(self) | {"resize": "bilinear, antialiased"}
        if self.crop != "random":
            del found["seed"]
        if not self.buckets:
            del found["buckets"], found["bucket_step"]
        return found

    def _resized(self, size: tuple[int, int], target: Shape) -> tuple[int, int]:
        """(width, height) of a picture of ``size`` (width, height) that just covers ``target`` (height, width), or fits it."""
        (width, height), (high, wide) = size, target
        scales = high / height, wide / width
        if self.crop == "fit" and max(scales) <= FIT * min(scales):
            return wide, high
        return max(wide, round(width * max(scales))), max(high, round(height * max(scales)))


def _cut(image: Image.Image, resized: tuple[int, int], crop: tuple[int, int, int, int]) -> Image.Image:
    """What lies in ``crop`` (left, top, right, bottom) of the resized picture.

    Of a picture that would become very long only that part is made: 20000 x 10 pixels would take gigabytes. Its box is in single
    precision in Pillow, and rounding may change a pixel by one; so all others are resized whole.
    """
    left, top, right, bottom = crop
    if resized[0] * resized[1] > LONG * (right - left) * (bottom - top):
        wide, high = (old / new for old, new in zip(image.size, resized, strict=True))
        box = left * wide, top * high, min(right * wide, image.width), min(bottom * high, image.height)
        return image.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box=box)
    if resized != image.size:
        image = image.resize(resized, Image.Resampling.BILINEAR)
    return image.crop(crop)


def _corner(resized: tuple[int, int], target: Shape, position: Position) -> tuple[int, int]:
    """Top and left of the crop of a picture of (width, height) pixels."""
    width, height = resized
    return round(position[0] * (height - target[0])), round(position[1] * (width - target[1]))
