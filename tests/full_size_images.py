"""The genuine configurations of image models with random weights, in the usual Diffusers layout. Not a test: they are large."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sd15
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from pipelines.tiny import model as tiny


@contextmanager
def _in_bfloat16() -> Iterator[None]:
    """Files as many download them; of those in float32 the pages would count as resident while they are read."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def save_sd15(folder: Path) -> None:
    """In bfloat16."""
    with _in_bfloat16():
        sd15.save_random(folder)


def save_sdxl(folder: Path) -> None:
    """2.57 B (UNet), 0.12 and 0.69 B (text encoders) and 84 M (autoencoder) parameters, saved in bfloat16; the tiny world's
    tokenizer, padded to 77."""
    torch.manual_seed(0)
    tokenizer = tiny.build_tokenizer()
    tokenizer.model_max_length = 77
    with _in_bfloat16():
        parts = {"unet": _unet(), "vae": _vae(), "text_encoder": _text(tokenizer), "text_encoder_2": _larger_text(tokenizer)}
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    StableDiffusionXLPipeline(
        **parts, tokenizer=tokenizer, tokenizer_2=tokenizer, scheduler=scheduler, force_zeros_for_empty_prompt=True
    ).save_pretrained(folder)


def _unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=1024,
        scaling_factor=0.13025,
    )


def _text(tokenizer) -> CLIPTextModel:
    return CLIPTextModel(_config(tokenizer, 768, 12, 12))


def _larger_text(tokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(_config(tokenizer, 1280, 32, 20))


def _config(tokenizer, width: int, layers: int, heads: int) -> CLIPTextConfig:
    end = tokenizer.eos_token_id
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
        eos_token_id=end,
        pad_token_id=end,
    )


SAVE = {"sd15": save_sd15, "sdxl": save_sdxl}
