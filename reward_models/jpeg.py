"""How many kilobytes a picture needs as a JPEG: the rewards of DDPO (Black et al., arXiv 2305.13301, section 5).

    jpeg                     compressibility: minus the size as a JPEG of quality 95, in kilobytes of 1000 bytes
    jpeg-incompressibility   plus the same

They have nothing to do with beauty: plain, smooth pictures win by the first, noise by the second. That makes them a check on
other judges, since training that raises those by smoothing or by texture shows here. The size grows with the number of pixels,
so compare pictures of one size, or ask for ``per_megapixel``.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from reward_models._judge import PointwiseJudge
from reward_models.base import RewardInfo

if TYPE_CHECKING:
    from torch import Tensor

NAMES = ("jpeg", "jpeg-incompressibility")
QUALITY = 95
SUBSAMPLING = "4:2:0"  # Pillow's default, stated because 4:4:4 files are a tenth larger


def kilobytes(image: Image.Image) -> float:
    """Size of the picture as a JPEG, in units of 1000 bytes."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=QUALITY, subsampling=SUBSAMPLING)
    return buffer.tell() / 1000.0


class Jpeg(PointwiseJudge):
    """The kilobytes of each picture, or the kilobytes per million pixels, with the sign of the judge."""

    def __init__(self, name: str = NAMES[0], per_megapixel: bool = False) -> None:
        self._sign = -1.0 if name == NAMES[0] else 1.0
        self._per_megapixel = per_megapixel
        self.made_of = {"quality": QUALITY, "subsampling": SUBSAMPLING, "per_megapixel": per_megapixel}
        unit = "kB per megapixel" if per_megapixel else "kB"
        self.info = RewardInfo(
            name=name,
            needs_prompt=False,
            range=(-math.inf, 0.0) if name == NAMES[0] else (0.0, math.inf),
            description=f"compressibility: minus the {unit} of the picture as a JPEG of quality {QUALITY}"
            if name == NAMES[0]
            else f"incompressibility: the {unit} of the picture as a JPEG of quality {QUALITY}",
        )

    def score_prepared(self, prepared: Sequence[Any], prompts: Sequence[str]) -> Tensor:
        import torch

        return torch.tensor([self._sign * self._size(image) for image in prepared], dtype=torch.float32)

    def _size(self, image: Image.Image) -> float:
        size = kilobytes(image)
        return size / (image.width * image.height / 1e6) if self._per_megapixel else size


def load(name: str = NAMES[0], per_megapixel: bool = False) -> Jpeg:
    """The judge. ``per_megapixel`` divides by the number of pixels, which makes different sizes comparable."""
    return Jpeg(name, per_megapixel)
