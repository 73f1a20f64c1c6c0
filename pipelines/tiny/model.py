"""The miniature Stable Diffusion: genuine Diffusers and Transformers classes, small numbers.

Everything an SD1.x checkpoint has is here (a byte-pair tokenizer, a CLIP text encoder, a KL autoencoder that reduces by
four, a cross-attention UNet that predicts epsilon, a scaled-linear schedule), so whatever works on it works on the real
thing unchanged.
"""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel

from pipelines.families._quiet import quietly
from pipelines.tiny import scenes, shipped
from reward_models import oracle

with quietly():  # a notebook's first import, maybe
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

MAX_TOKENS = 40
WIDTH = 128
START, END = "<|startoftext|>", "<|endoftext|>"


def vocabulary() -> list[str]:
    """Every word of the grammar, and the words that people put around a caption."""
    grammar = [*oracle.COLOURS, *oracle.SHAPES, *oracle.SIZES, *oracle.BACKGROUNDS]
    relations = [word for phrase in oracle.RELATIONS for word in phrase.split()]
    style = [word for pair in scenes.STYLE_WORDS.values() for word in pair]
    return sorted({*grammar, *relations, *style, "a", "an", "the", "and", "on", "background", "picture", "very", ","})


def build_tokenizer(max_tokens: int = MAX_TOKENS) -> CLIPTokenizer:
    """A CLIP tokenizer in which each word of the world is one token; any other text falls apart into bytes."""
    symbols = sorted(ByteLevel.alphabet())
    merges = _merges(vocabulary())
    tokens = [*symbols, *(s + "</w>" for s in symbols), *("".join(m) for m in merges), START, END]
    ids = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(
        vocab=ids, merges=merges, model_max_length=max_tokens, bos_token=START, eos_token=END, unk_token=END, pad_token=END
    )


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges (Sennrich et al. 2016) learnt on the words until every word is one token."""
    pieces = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges = []
    while any(len(p) > 1 for p in pieces.values()):
        counts = Counter(pair for p in pieces.values() for pair in itertools.pairwise(p))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        pieces = {word: _merge(p, best) for word, p in pieces.items()}
    return merges


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    end = tokenizer.eos_token_id
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


def build_vae() -> AutoencoderKL:
    """64 x 64 pixels to 4 x 16 x 16 latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=scenes.SIZE,
    )


def build_unet() -> UNet2DConditionModel:
    """4.5 million parameters; full resolution without attention, then two levels with."""
    return UNet2DConditionModel(
        sample_size=scenes.SIZE // 4,
        block_out_channels=(48, 96, 112),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """SD1.5's schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def assemble(
    tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, vae: AutoencoderKL, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """The parts as a pipeline in evaluation mode, without a safety checker."""
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def checkpoint_path() -> Path:
    """The shipped checkpoint, a folder in the usual Diffusers layout."""
    return shipped.CHECKPOINT


def pairs_path() -> Path:
    """The shipped preference pairs, in the format of Pick-a-Pic v2."""
    return shipped.PAIRS
