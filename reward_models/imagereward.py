"""ImageReward (Xu et al. 2023, arXiv 2304.05977): BLIP reads the prompt while it looks at the picture; a head gives the score.

    score = (head(state of the first token) - 0.16717...) / 1.03333...,    P(a before b) = sigmoid(1.03333 * (score_a - score_b))

About normal with deviation 1 on its training pictures, -2.3 to 2. On today's ``BlipVisionModel`` and ``BlipTextModel``; the
original package does not import any more. Two of Transformers' defaults are not this model's and score differently without a
word: 8 heads in the text encoder (12 here), and 1e-5 in the picture encoder's normalisation (1e-6). The prompt is cut at 35
tokens. Weights: ``THUDM/ImageReward``, 1.8 GB, Apache-2.0; tokenizer ``bert-base-uncased``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_models import _heads
from reward_models._judge import DTYPES, PointwiseJudge, Preparation, check_choice, check_pixels, device_of, texts_for
from reward_models._preprocess import ShortestSide
from reward_models._weights import Source, fill, path_of, read_state, read_tokenizer, tokenizer_digest
from reward_models.base import RewardInfo

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "imagereward"
REPO, FILE = "THUDM/ImageReward", "ImageReward.pt"
TOKENIZER = "bert-base-uncased"
TOKENS = 35
MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072


@dataclass(frozen=True)
class Shape:
    """(width, MLP width, layers, heads) of picture and text encoder, and of the head."""

    vision: tuple[int, int, int, int] = (1024, 4096, 24, 16)
    text: tuple[int, int, int, int] = (768, 3072, 12, 12)
    head: tuple[int, ...] = (768, 1024, 128, 64, 16, 1)
    vocabulary: int = 30524  # BERT's, and the marks [DEC] and [ENC], which a score does not use


SHAPE = Shape()
_NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def build(shape: Shape) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Picture encoder, text encoder and head."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    vision = BlipVisionConfig(
        **dict(zip(_NAMES, shape.vision, strict=True)), image_size=224, patch_size=16, layer_norm_eps=1e-6, hidden_act="gelu"
    )
    text = BlipTextConfig(
        **dict(zip(_NAMES, shape.text, strict=True)),
        vocab_size=shape.vocabulary,
        encoder_hidden_size=shape.vision[0],
        max_position_embeddings=512,
        layer_norm_eps=1e-12,
        hidden_act="gelu",
        is_decoder=True,  # which gives it layers that look at the picture; it is called as an encoder
        bos_token_id=shape.vocabulary - 2,
        eos_token_id=2,
        pad_token_id=0,
        sep_token_id=min(102, shape.vocabulary - 1),
    )
    text._attn_implementation = "eager"  # there is no other for this model
    nets = (BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False), _heads.build(shape.head))
    return tuple(net.eval().requires_grad_(False) for net in nets)


# ------------------------------------------------------------------------------------------------------------------ layout

_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
_BLOCK = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.qkv": "self_attn.qkv", "attn.proj": "self_attn.projection"}
_UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
"""Parts of BLIP's pre-training, and a buffer that is no weight."""


def split(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The released file's weights under the names of the three networks of ``build``."""
    parts: dict[str, dict[str, Tensor]] = {"blip.visual_encoder.": {}, "blip.text_encoder.": {}, "mlp.layers.": {}}
    for name, value in state.items():
        if not name.startswith(_UNUSED):
            prefix = next((p for p in parts if name.startswith(p)), "blip.text_encoder.")
            parts[prefix][name.removeprefix(prefix)] = value
    vision, text, head = parts.values()
    return {_vision_name(k): v for k, v in vision.items()}, text, _heads.renumbered(head, "")


def _vision_name(name: str) -> str:
    if name in _VISION:
        return _VISION[name]
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("blocks."):
        return f"{_VISION.get(stem, stem)}.{kind}"
    _, number, part = stem.split(".", 2)
    return f"encoder.layers.{number}.{_BLOCK.get(part, part)}.{kind}"


# ------------------------------------------------------------------------------------------------------------------- judge


class ImageReward(PointwiseJudge):
    """One look at a picture for each prompt: neither embedding can be kept for the other."""

    sharpness = DEVIATION

    def __init__(
        self,
        nets: Sequence[nn.Module],
        tokenizer: Any,
        device: Any = "cpu",
        dtype: Any = None,
        made_of: Mapping[str, Any] | None = None,
        fast: bool = False,
    ) -> None:
        vision, text, head = nets
        self._vision, self._text = vision.to(device=device, dtype=dtype), text.to(device=device, dtype=dtype)
        self._head, self._tokenizer, self._device = head.to(device), tokenizer, device
        self.preparation, self.made_of = Preparation(ShortestSide(), fast), dict(made_of or {})
        self.info = RewardInfo(
            name=NAME,
            needs_prompt=True,
            differentiable=True,
            description="which picture experts would rank higher, by BLIP; about normal with deviation 1",
        )

    def score_prepared(self, prepared: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        import torch

        return self._judge(torch.stack(list(prepared)), prompts).cpu()

    def n_cut(self, prompts: Sequence[str]) -> int:
        if not prompts:
            return 0
        found = self._tokenizer(list(prompts), verbose=False).input_ids  # it would warn of errors, but what is long is cut
        return sum(len(ids) > TOKENS for ids in found)

    def differentiable_score(self, pixels: Tensor, prompts: str | Sequence[str] | None = None) -> Tensor:
        return self._judge(self.preparation.how.grad(check_pixels(pixels)), texts_for(self, len(pixels), prompts))

    def _judge(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        how = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
        words = self._tokenizer(list(prompts), **how).to(self._device)
        weight = self._vision.post_layernorm.weight
        seen = self._vision(pixel_values=pixels.to(weight)).last_hidden_state
        read = self._text(
            input_ids=words.input_ids,
            attention_mask=words.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=seen.new_ones(seen.shape[:2], dtype=words.attention_mask.dtype),
        )
        return (self._head(read.last_hidden_state[:, 0].float())[:, 0] - MEAN) / DEVIATION


def load(
    weights: str | Path | None = None,
    *,
    revision: str | None = None,
    tokenizer: str | Path | None = None,
    device: str | None = None,
    dtype: str = "float32",
    preprocess: str = "exact",
) -> ImageReward:
    """The judge.

    Args:
        weights: a file, a folder with ``ImageReward.pt``, or another repository of the hub; fetched if not given.
        tokenizer: a folder or hub id of BERT's tokenizer; ``bert-base-uncased`` if not given.
        device: the accelerator if there is one, else the CPU, if not given.
        dtype: what the encoders compute in; the head computes in float32 in any case.
        preprocess: ``exact``, or ``fast`` through uint8 tensors, up to one grey level off.
    """
    import torch
    from transformers import BertTokenizer

    check_choice("dtype", dtype, DTYPES)
    check_choice("preprocess", preprocess, ("exact", "fast"))
    file = path_of(Source.of(REPO, FILE, revision, weights), NAME)
    nets = build(SHAPE)
    for net, part in zip(nets, split(read_state(file, NAME)), strict=True):
        fill(net, part, NAME)
    words = read_tokenizer(BertTokenizer, tokenizer or TOKENIZER, NAME)
    made_of = {"weights": file, "tokenizer": tokenizer_digest(words), "dtype": dtype}
    return ImageReward(nets, words, device_of(device), getattr(torch, dtype), made_of, preprocess == "fast")
