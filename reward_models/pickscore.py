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
    device: str | None = None,
    dtype: str = "float32",
    preprocess: str = "exact",
) -> DualEncoder:
    """The judge.

    Args:
        weights: a file, a folder with ``model.safetensors``, or another repository of the hub; fetched if not given.
        tokenizer: a folder or hub id of a CLIP tokenizer; that of the weights if not given.
        device: the accelerator if there is one, else the CPU, if not given.
        dtype: what the towers compute in; embeddings are compared in float32 in any case.
        preprocess: ``exact``, or ``fast`` through uint8 tensors, up to one grey level off.
    """
    from reward_models import _clip
    from reward_models._dual import DualEncoder
    from reward_models._weights import Source, path_of

    source = Source.of(REPO, "model.safetensors", revision, weights)
    words = tokenizer or (source.local if source.local and source.local.is_dir() else source.repo)
    how = ShortestSide(crop="floor", convert_first=True)
    options = {"tokenizer": words, "device": device, "dtype": dtype, "preprocess": preprocess}
    encoder = _clip.load_encoder(_clip.VIT_H_14, path_of(source, NAME), NAME, how, **options)
    scale = encoder.towers.scale
    info = RewardInfo(
        name=NAME,
        needs_prompt=True,
        range=(-scale, scale),
        licence="MIT (code); the weights' page names none",
        differentiable=True,
        description="which picture people on Pick-a-Pic would choose: exp(logit_scale) * cosine of CLIP-H, fine-tuned",
    )
    return DualEncoder(info, encoder, factor=scale, sharpness=1.0)
