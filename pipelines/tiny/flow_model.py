"""The miniature flow-matching transformer: a genuine Stable Diffusion 3 in everything but its size.

An MMDiT (Esser et al. 2024, arXiv 2403.03206) that predicts velocities, two CLIP text encoders, no T5 (which SD3 may leave out:
256 zeros stand in its place), the autoencoder of the miniature Stable Diffusion, its tokenizer and its world. As with every SD3
without T5, Diffusers itself wants to be told: ``from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)``.
"""

from __future__ import annotations

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from pipelines.tiny import model, scenes

WIDTHS = (96, 32)
"""Of the two text encoders."""
LAYERS = (3, 2)
"""Theirs; SD3 reads the last but one."""
HEADS, HEAD_WIDTH, BLOCKS, PATCH = 4, 32, 6, 2


def build_text_encoders(tokenizer: CLIPTokenizer) -> list[CLIPTextModelWithProjection]:
    """The large one and the small one."""
    return [_text_encoder(tokenizer, width, layers) for width, layers in zip(WIDTHS, LAYERS, strict=True)]


def _text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=model.MAX_TOKENS,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )


def build_transformer() -> SD3Transformer2DModel:
    """3.7 million parameters on 8 x 8 patches of 2 x 2 latents."""
    return SD3Transformer2DModel(
        sample_size=scenes.SIZE // 4,
        patch_size=PATCH,
        in_channels=4,
        out_channels=4,
        num_layers=BLOCKS,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=sum(WIDTHS),
        caption_projection_dim=HEADS * HEAD_WIDTH,
        pooled_projection_dim=sum(WIDTHS),
        pos_embed_max_size=scenes.SIZE // 4 // PATCH,
        qk_norm="rms_norm",
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Without a shift: the pictures are small, and so is the signal that survives noise."""
    return FlowMatchEulerDiscreteScheduler(shift=1.0)


def assemble(
    tokenizer: CLIPTokenizer,
    text_encoders: list[CLIPTextModelWithProjection],
    vae: AutoencoderKL,
    transformer: SD3Transformer2DModel,
) -> StableDiffusion3Pipeline:
    """The parts as a pipeline in evaluation mode."""
    vae.register_to_config(shift_factor=0.0)
    pipe = StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=build_scheduler(),
        vae=vae.eval(),
        text_encoder=text_encoders[0].eval(),
        tokenizer=tokenizer,
        text_encoder_2=text_encoders[1].eval(),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
