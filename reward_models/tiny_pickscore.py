"""PickScore in miniature: a CLIP of the tiny world, trained on the votes of its synthetic people with Pick-a-Pic's loss.

    score = exp(logit_scale) * cos(picture, caption),    P(a before b) = sigmoid(score_a - score_b)

It is to PickScore (Kirstain et al. 2023, arXiv 2305.01569) what the tiny checkpoint is to Stable Diffusion: a genuine one of the
kind, small enough to come with the package, for trying things out and for tests. A CLIP as OpenAI's RN50 is one (Radford et al.
2021, arXiv 2103.00020: a convolutional tower with attention pooling), 1.7 million parameters, for pictures of 64 pixels and the
words of the tiny world. ``pipelines/tiny/train_pickscore.py`` made its weights, which fall under this project's licence.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_models._preprocess import ShortestSide
from reward_models.base import RewardInfo

if TYPE_CHECKING:
    from reward_models._dual import DualEncoder

NAME = "tiny-pickscore"
FILE = "model.safetensors"
FOLDER = Path(__file__).parent / "weights" / "tiny_pickscore"
SIZE = 96
"""Pictures of 64 pixels are enlarged: the tower reduces by 32, and a grid of 2 x 2 would not tell where things are."""
TOKENS, VOCABULARY = 40, 644
WIDTH = 256
"""Of the common space: wide enough for the place of every kind of object, or left and right cannot be told."""


def build() -> Any:
    """open_clip's ``CLIP`` of that shape, with random weights."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=(1, 1, 1, 1), width=16, head_width=64, image_size=SIZE)
    text = CLIPTextCfg(context_length=TOKENS, vocab_size=VOCABULARY, width=96, heads=3, layers=2)
    return CLIP(WIDTH, vision, text)


def load(weights: str | Path | None = None, *, device: str | None = None, dtype: str = "float32") -> DualEncoder:
    """The judge.

    Args:
        weights: a folder that ``diffalign world train-judge`` wrote; the one that comes with the package if not given.
        device: the accelerator if there is one, else the CPU, if not given.
        dtype: what the towers compute in; embeddings are compared in float32 in any case.
    """
    import torch

    from reward_models import _clip
    from reward_models._dual import ClipEncoder, DualEncoder
    from reward_models._judge import DTYPES, check_choice, device_of
    from reward_models._weights import Source, fill, path_of, read_state

    check_choice("dtype", dtype, DTYPES)
    folder = Path(weights).expanduser() if weights is not None else FOLDER
    file = path_of(Source("", FILE, local=folder), NAME)
    model = build().eval()
    fill(model, read_state(file, NAME), NAME)
    words = _clip.transformers_tokens(file.parent, NAME, TOKENS)
    towers = _clip.OpenClipTowers(model, words, device_of(device), getattr(torch, dtype))
    info = RewardInfo(
        name=NAME,
        needs_prompt=True,
        range=(-towers.scale, towers.scale),
        differentiable=True,
        description="which picture the tiny world's people would choose: a CLIP of 1.7 million parameters trained on their votes",
    )
    made_of = {"weights": file, "tokenizer": words.identity, "dtype": dtype}
    return DualEncoder(info, ClipEncoder(towers, ShortestSide(size=SIZE), made_of), factor=towers.scale, sharpness=1.0)
