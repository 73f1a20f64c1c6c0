"""JPEG compressibility: how few kilobytes a picture needs, the reward of DDPO (Black et al., arXiv 2305.13301, section 5).

The score is minus the size of the picture as a JPEG of quality 95, in kilobytes of 1000 bytes. It has nothing to do with
beauty: plain, smooth pictures win. That makes it a check on other judges, since training that raises them by smoothing or
by texture shows here. It grows with the number of pixels, so compare pictures of one size, or ask for ``per_megapixel``.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

from reward_models.base import RewardInfo, prompt_per_image

if TYPE_CHECKING:
    import torch

NAME = "jpeg"
QUALITY = 95
SUBSAMPLING = "4:2:0"  # Pillow's default, stated because 4:4:4 files are a tenth larger


def kilobytes(image: Image.Image) -> float:
    """Size of the picture as a JPEG, in units of 1000 bytes."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=QUALITY, subsampling=SUBSAMPLING)
    return buffer.tell() / 1000.0


class Jpeg:
    """Minus the kilobytes of each picture, or minus the kilobytes per million pixels."""

    def __init__(self, per_megapixel: bool = False) -> None:
        self._per_megapixel = per_megapixel
        unit = "kB per megapixel" if per_megapixel else "kB"
        self.info = RewardInfo(
            name=NAME,
            needs_prompt=False,
            range=(-math.inf, 0.0),
            description=f"compressibility: minus the {unit} of the picture as a JPEG of quality {QUALITY}",
        )

    def score(self, images: Sequence[Image.Image], prompts: str | Sequence[str] | None = None) -> torch.Tensor:
        """[N] float32, at most 0; prompts are counted but not read."""
        import torch

        prompt_per_image(self.info, len(images), prompts)
        return torch.tensor([-self._size(image) for image in images], dtype=torch.float32)

    def _size(self, image: Image.Image) -> float:
        size = kilobytes(image)
        return size / (image.width * image.height / 1e6) if self._per_megapixel else size


def load(per_megapixel: bool = False) -> Jpeg:
    """The judge. ``per_megapixel`` divides by the number of pixels, which makes different sizes comparable."""
    return Jpeg(per_megapixel)
