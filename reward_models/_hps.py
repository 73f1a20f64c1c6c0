"""What HPSv2 and HPSv2.1 share: all but the weights. Their scores must not stand in one table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from reward_models._preprocess import LongestSide
from reward_models.base import RewardInfo

if TYPE_CHECKING:
    from reward_models._dual import DualEncoder

REPO = "xswu/HPSv2"


def load(
    name: str, file: str, weights: str | Path | None, revision: str | None, antialias: bool, device: str, dtype: str
) -> DualEncoder:
    """The judge ``name`` with the weights ``file`` of the hub, or those at ``weights``."""
    import torch

    from reward_models import _clip
    from reward_models._dual import DualEncoder
    from reward_models._weights import Source

    source = Source(REPO, file, revision, Path(weights) if weights else None)
    model = _clip.load_model(_clip.VIT_H_14, source, name)
    towers = _clip.Towers(model, _clip.open_clip_tokens(), device, getattr(torch, dtype))
    info = RewardInfo(
        name=name,
        needs_prompt=True,
        range=(-1.0, 1.0),
        licence="Apache-2.0",
        differentiable=True,
        description="which picture people would rank higher: cosine of CLIP-H fine-tuned on HPD; tables show it times 100",
    )
    return DualEncoder(info, towers, LongestSide(antialias=antialias), sharpness=towers.scale)
