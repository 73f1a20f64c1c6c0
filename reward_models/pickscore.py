"""PickScore (Kirstain et al. 2023, arXiv 2305.01569): CLIP ViT-H/14 fine-tuned on Pick-a-Pic's human choices.

    score = exp(logit_scale) * cos(picture, prompt),    P(a before b) = sigmoid(score_a - score_b)

Typical scores are 18 to 23. Weights: ``yuvalkirstain/PickScore_v1``, 3.9 GB; the code is under the MIT licence, the weights'
page names none.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from reward_models._preprocess import ShortestSide
from reward_models.base import RewardInfo

if TYPE_CHECKING:
    from reward_models._dual import DualEncoder

NAME = "pickscore"
REPO = "yuvalkirstain/PickScore_v1"


def load(
    weights: str | Path | None = None,
    *,
    revision: str | None = None,
    tokenizer: str | Path | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> DualEncoder:
    """The judge.

    Args:
        weights: a file, or a folder with ``model.safetensors``; fetched from the hub if not given.
        tokenizer: a folder or hub id of a CLIP tokenizer; that of the weights if not given.
        dtype: what the towers compute in; embeddings are compared in float32 in any case.
    """
    import torch

    from reward_models import _clip
    from reward_models._dual import DualEncoder
    from reward_models._weights import Source

    source = Source(REPO, "model.safetensors", revision, Path(weights) if weights else None)
    model = _clip.load_model(_clip.VIT_H_14, source, NAME)
    words = tokenizer or (weights if weights and Path(weights).is_dir() else REPO)
    towers = _clip.Towers(model, _clip.transformers_tokens(words), device, getattr(torch, dtype))
    info = RewardInfo(
        name=NAME,
        needs_prompt=True,
        range=(-towers.scale, towers.scale),
        licence="MIT (code); the weights' page names none",
        differentiable=True,
        description="which picture people on Pick-a-Pic would choose: exp(logit_scale) * cosine of CLIP-H, fine-tuned",
    )
    return DualEncoder(info, towers, ShortestSide(crop="floor", convert_first=True), factor=towers.scale, sharpness=1.0)
