"""From a picture to what the encoder sees. One crop position and one mirror decision hold for both sides of a pair."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import UserError

Position = tuple[float, float]
"""Where the crop lies, (vertical, horizontal), each in [0, 1]: 0 is the upper or left end, 1 the other."""

CENTER: Position = (0.5, 0.5)

Framing = tuple[int, int, int, int, int, int]
"""What was done to a picture: height and width of the original; top and left of the crop, in pixels after resizing; height and
width of what is left. SDXL is trained with these numbers (Podell et al. 2023, arXiv 2307.01952, section 2.2)."""


@dataclass(frozen=True)
class Transform:
    """Resize the shorter side to ``resolution`` pixels, cut a square, mirror or not.

    Bilinear resizing with antialiasing, as in the released Diffusion-DPO script. ``crop="random"`` draws one relative
    position per pair from (seed, pair index), so that it is known before anything is encoded and never changes.
    ``flip`` means that both orientations are encoded and whoever draws a batch chooses one for the whole pair.
    """

    resolution: int
    crop: str = "center"
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resolution < 8:
            raise UserError(f"resolution is {self.resolution}; it must be at least 8 pixels.")
        if self.crop not in ("center", "random"):
            raise UserError(f"crop is {self.crop!r}; it must be 'center' or 'random'.")

    def position(self, index: int) -> Position:
        """The crop position of pair ``index``, the same for both of its pictures."""
        if self.crop == "center":
            return CENTER
        top, left = np.random.default_rng((self.seed, index)).random(2)
        return float(top), float(left)

    def views(self, image: Image.Image, position: Position) -> list[Tensor]:
        """The orientations to encode: as it is, and mirrored where ``flip`` is set. float32 [3, H, W] in [-1, 1]."""
        upright = self.apply(image, position, flipped=False)
        return [upright, upright.flip(-1)] if self.flip else [upright]

    def framings(self, size: tuple[int, int], position: Position) -> list[Framing]:
        """What ``views`` does to a picture of ``size`` (width, height), for each of them.

        A mirrored view is a crop of the mirrored picture: what was left of the crop is now right of it.
        """
        (width, _), (top, left) = self._resized(size), self._corner(size, position)
        original, target = (size[1], size[0]), (self.resolution, self.resolution)
        lefts = [left, width - self.resolution - left] if self.flip else [left]
        return [(*original, top, x, *target) for x in lefts]

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) with the shorter side at ``resolution``."""
        scale = self.resolution / min(size)
        width, height = (max(self.resolution, round(length * scale)) for length in size)
        return width, height

    def _corner(self, size: tuple[int, int], position: Position) -> tuple[int, int]:
        """Top and left of the crop after resizing."""
        width, height = self._resized(size)
        return round(position[0] * (height - self.resolution)), round(position[1] * (width - self.resolution))

    def apply(self, image: Image.Image, position: Position, flipped: bool) -> Tensor:
        """An RGB picture -> float32 [3, resolution, resolution] in [-1, 1]."""
        side, resized = self.resolution, self._resized(image.size)
        top, left = self._corner(image.size, position)
        if resized != image.size:
            image = image.resize(resized, Image.Resampling.BILINEAR)
        pixels = np.asarray(image.crop((left, top, left + side, top + side)), dtype=np.float32)
        tensor = torch.from_numpy(pixels / 127.5 - 1.0).permute(2, 0, 1)
        return (tensor.flip(-1) if flipped else tensor).contiguous()

    def describe(self) -> dict[str, Any]:
        """Everything the encoded pixels depend on, as plain values. The seed counts only where something is drawn."""
        found = asdict(self) | {"resize": "bilinear, antialiased"}
        if self.crop == "center":
            del found["seed"]
        return found
