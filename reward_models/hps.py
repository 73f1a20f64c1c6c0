"""HPSv2 and HPSv2.1 (Wu et al. 2023, arXiv 2306.09341): CLIP ViT-H/14 fine-tuned on the Human Preference Dataset v2.

    score = cos(picture, prompt),    P(a before b) = sigmoid(exp(logit_scale) * (score_a - score_b))

The raw cosine, about 0.20 to 0.33; benchmark tables show it times 100. HPSv2.1 was trained on more and cleaner preferences; the
two are not comparable, and each is a judge of its own. Pictures are resized whole and padded with black, not cropped.
Weights: ``xswu/HPSv2``, 2 GB in float16 each, Apache-2.0; computed in float32 here unless told otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from reward_models._preprocess import LongestSide
from reward_models.base import RewardInfo

if TYPE_CHECKING:
    from reward_models._dual import DualEncoder

NAMES = ("hps-v2", "hps-v2.1")
REPO = "xswu/HPSv2"
FILES = {"hps-v2": "HPS_v2_compressed.pt", "hps-v2.1": "HPS_v2.1_compressed.pt"}


NOT_TOGETHER = True
"""Both are "HPSv2" to readers of a table, and differ in scale: a table holds one of them."""


def load(
    name: str = "hps-v2.1",
    weights: str | Path | None = None,
    *,
    revision: str | None = None,
    antialias: bool = True,
    device: str | None = None,
    dtype: str = "float32",
) -> DualEncoder:
    """The judge.

    Args:
        name: which of the two.
        weights: a file, a folder that holds it by the name it has on the hub, or another repository; fetched if not given.
        antialias: how pictures are made smaller, see ``LongestSide``.
        device: the accelerator if there is one, else the CPU, if not given.
        dtype: what the towers compute in; embeddings are compared in float32 in any case.
    """
    from reward_models import _clip
    from reward_models._dual import DualEncoder
    from reward_models._weights import Source, path_of

    file = path_of(Source.of(REPO, FILES[name], revision, weights), name)
    encoder = _clip.load_encoder(_clip.VIT_H_14, file, name, LongestSide(antialias=antialias), device=device, dtype=dtype)
    info = RewardInfo(
        name=name,
        needs_prompt=True,
        range=(-1.0, 1.0),
        differentiable=True,
        description="which picture people would rank higher: cosine of CLIP-H fine-tuned on HPD v2; tables show it times 100",
    )
    return DualEncoder(info, encoder, sharpness=encoder.towers.scale)
