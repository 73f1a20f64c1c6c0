"""CLIP score: the cosine between a picture and its prompt (Radford et al. 2021, arXiv 2103.00020; Hessel et al. 2021).

The raw cosine is what is returned, about 0.2 to 0.35. Others report 100 * max(cos, 0), 2.5 * max(cos, 0) or
exp(logit_scale) * cos: all follow from it. OpenAI's ViT-L/14 by default (MIT licence), LAION's ViT-H/14 or any other by its
name in open_clip.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_models._preprocess import ShortestSide
from reward_models.base import JudgeError, RewardInfo

if TYPE_CHECKING:
    from reward_models._dual import DualEncoder

NAME = "clip"
MODELS = {
    "vit-l-14": ("VIT_L_14", "openai/clip-vit-large-patch14"),
    "vit-h-14": ("VIT_H_14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
}
"""Name -> architecture in ``_clip``, repository with ``model.safetensors``."""


def load(
    model: str = "vit-l-14",
    weights: str | Path | None = None,
    *,
    revision: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> DualEncoder:
    """The judge.

    Args:
        model: ``vit-l-14``, ``vit-h-14``, or ``open_clip:NAME`` with a name of ``open_clip.list_models()``.
        weights: a file or folder, in Transformers' or open_clip's layout; for ``open_clip:NAME`` a file or one of the tags of
            ``open_clip.list_pretrained()``. Fetched from the hub if not given.
        dtype: what the towers compute in; embeddings are compared in float32 in any case.
    """
    import torch

    from reward_models._dual import DualEncoder

    if model.startswith("open_clip:"):
        towers, preprocess = _open_clip(model.removeprefix("open_clip:"), weights, device, getattr(torch, dtype))
    else:
        towers, preprocess = _transformers(model, weights, revision, device, getattr(torch, dtype)), ShortestSide()
    info = RewardInfo(
        name=NAME,
        needs_prompt=True,
        range=(-1.0, 1.0),
        licence="MIT",
        differentiable=True,
        description=f"cosine of picture and prompt in CLIP's space ({model})",
    )
    return DualEncoder(info, towers, preprocess)


def _transformers(model: str, weights: str | Path | None, revision: str | None, device: str, dtype: Any) -> Any:
    from reward_models import _clip
    from reward_models._weights import Source

    if model not in MODELS:
        raise JudgeError(f"there is no CLIP called {model!r}: {', '.join(MODELS)}, or open_clip:NAME")
    architecture, repo = MODELS[model]
    source = Source(repo, "model.safetensors", revision, Path(weights) if weights else None)
    network = _clip.load_model(getattr(_clip, architecture), source, NAME)
    return _clip.Towers(network, _clip.open_clip_tokens(), device, dtype)


def _open_clip(name: str, weights: str | Path | None, device: str, dtype: Any) -> Any:
    import open_clip

    from reward_models import _clip

    if name not in open_clip.list_models():
        raise JudgeError(f"open_clip knows no model called {name!r}; open_clip.list_models() lists them")
    tag = str(weights) if weights else next((t for n, t in open_clip.list_pretrained() if n == name), None)
    network = open_clip.create_model(name, pretrained=tag, require_pretrained=True)
    size = network.visual.image_size
    towers = _clip.OpenClipTowers(network, open_clip.get_tokenizer(name), device, dtype)
    return towers, ShortestSide(size if isinstance(size, int) else size[0])
