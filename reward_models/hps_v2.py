"""HPSv2.0 (Wu et al. 2023, arXiv 2306.09341): CLIP ViT-H/14 fine-tuned on the Human Preference Dataset v2.

    score = cos(picture, prompt),    P(a before b) = sigmoid(exp(logit_scale) * (score_a - score_b))

The raw cosine, about 0.20 to 0.33; benchmark tables show it times 100. Not comparable with HPSv2.1. Pictures are resized
whole and padded with black, not cropped. Weights: ``xswu/HPSv2``, 2 GB in float16, Apache-2.0; computed in float32 here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from reward_models import _hps

if TYPE_CHECKING:
    from reward_models._dual import DualEncoder

NAME = "hps-v2"
FILE = "HPS_v2_compressed.pt"


def load(
    weights: str | Path | None = None,
    *,
    revision: str | None = None,
    antialias: bool = True,
    device: str = "cpu",
    dtype: str = "float32",
) -> DualEncoder:
    """The judge; ``weights`` is a file, or a folder with ``HPS_v2_compressed.pt``. For ``antialias`` see ``LongestSide``."""
    return _hps.load(NAME, FILE, weights, revision, antialias, device, dtype)
