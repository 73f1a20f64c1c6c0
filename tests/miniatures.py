"""Miniature pipelines of every family: genuine Diffusers and Transformers classes, random weights, tokenizers made here.

A new family adds one builder. A builder makes the pipeline; ``said`` gives what the pipeline's own ``encode_prompt`` says of
prompts, and of the empty one for guidance, by the names of our conditioning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from pipelines.tiny import model as tiny

Said = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Conditioning of prompts, and of the empty one, each [B, ...]."""
PIXELS = 32
"""On a side of the pictures that the miniatures are for."""


@dataclass(frozen=True)
class Miniature:
    """A model to test a family with."""

    family: str
    build: Callable[[], Any]
    said: Callable[[Any, Sequence[str]], Said]
    call: dict[str, Any] = field(default_factory=dict)  # what its own pipeline must be told in a call

    def save(self, folder: Path) -> Path:
        """Build it, the same each time, and save it."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.build().save_pretrained(folder)
        return folder


MINIATURES: dict[str, Miniature] = {}


def miniature(name: str, said: Callable[[Any, Sequence[str]], Said], family: str | None = None, **call: Any) -> Callable:
    """Enter a builder into ``MINIATURES``. ``family`` is ``name`` if not given."""

    def enter(build: Callable[[], Any]) -> Callable[[], Any]:
        MINIATURES[name] = Miniature(family or name, build, said, call)
        return build

    return enter


# --------------------------------------------------------------------------------------------------------------- parts


@cache
def clip_tokenizer() -> CLIPTokenizer:
    return tiny.build_tokenizer()


def clip_text(width: int, projected: bool = False, layers: int = 2) -> Any:
    """A CLIP text encoder, with the projection that SDXL's second has or without."""
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        hidden_act="gelu" if projected else "quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5_tokenizer() -> T5Tokenizer:
    """A token for each printable character; deterministic, which a trained one is not."""
    letters = [(chr(code), -3.0) for code in range(33, 127)]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *letters], extra_ids=0)


def t5_text(width: int = 16) -> T5EncoderModel:
    size = len(t5_tokenizer())
    config = T5Config(
        vocab_size=size, d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval()


def kl_vae(latent_channels: int = 4, **settings: Any) -> AutoencoderKL:
    """32 x 32 pixels to 8 x 8 latents."""
    blocks = 3
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=PIXELS,
        **settings,
    ).eval()


def unet(text_width: int, **more: Any) -> UNet2DConditionModel:
    settings = {
        "sample_size": PIXELS // 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": text_width,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**settings, **more}).eval()


def sd_schedule(kind: type = DDIMScheduler, **more: Any) -> Any:
    """Stable Diffusion's betas."""
    shared = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    own = {"clip_sample": False, "set_alpha_to_one": False} if kind is DDIMScheduler else {"timestep_spacing": "leading"}
    return kind(**shared, **own, **more)


# ------------------------------------------------------------------------------------------------------------ families


def _sd_said(pipe: Any, prompts: Sequence[str]) -> Said:
    states, empty = pipe.encode_prompt(list(prompts), "cpu", 1, True)
    return {"encoder_hidden_states": states}, {"encoder_hidden_states": empty}


@miniature("stable_diffusion", _sd_said)
def stable_diffusion() -> StableDiffusionPipeline:
    return tiny.assemble(clip_tokenizer(), clip_text(16), kl_vae(), unet(16))


def _sdxl_said(pipe: Any, prompts: Sequence[str]) -> Said:
    states, empty, pooled, empty_pooled = pipe.encode_prompt(list(prompts), device="cpu")
    return (
        {"encoder_hidden_states": states, "text_embeds": pooled},
        {"encoder_hidden_states": empty, "text_embeds": empty_pooled},
    )


@miniature("sdxl", _sdxl_said)
def sdxl() -> StableDiffusionXLPipeline:
    return _sdxl(sd_schedule(EulerDiscreteScheduler), force_zeros=True)


@miniature("sdxl, v-prediction and encoded empty prompts", _sdxl_said, "sdxl")
def sdxl_v() -> StableDiffusionXLPipeline:
    return _sdxl(sd_schedule(prediction_type="v_prediction"), force_zeros=False)


def _sdxl(scheduler: Any, force_zeros: bool) -> StableDiffusionXLPipeline:
    widths, added = (16, 24), 4
    network = unet(
        sum(widths),
        addition_embed_type="text_time",
        addition_time_embed_dim=added,
        projection_class_embeddings_input_dim=widths[1] + 6 * added,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
    )
    return StableDiffusionXLPipeline(
        vae=kl_vae(scaling_factor=0.13025, force_upcast=True),
        text_encoder=clip_text(widths[0], layers=3),
        text_encoder_2=clip_text(widths[1], projected=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=network,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=force_zeros,
        add_watermarker=False,
    )


def _pixart_said(pipe: Any, prompts: Sequence[str]) -> Said:
    states, mask, empty, empty_mask = pipe.encode_prompt(list(prompts), device="cpu")
    return (
        {"encoder_hidden_states": states, "encoder_attention_mask": mask},
        {"encoder_hidden_states": empty, "encoder_attention_mask": empty_mask},
    )


PIXART_CALL = {"clean_caption": False, "use_resolution_binning": False, "height": PIXELS, "width": PIXELS}


@miniature("pixart", _pixart_said, **PIXART_CALL)
def pixart_sigma() -> PixArtSigmaPipeline:
    return _pixart(PixArtSigmaPipeline, sample_size=PIXELS // 4)


@miniature("pixart alpha of 1024 pixels", _pixart_said, "pixart", **PIXART_CALL)
def pixart_alpha() -> PixArtAlphaPipeline:
    """The sample size is what makes the pipeline tell the transformer of sizes; the weights do not depend on it."""
    return _pixart(PixArtAlphaPipeline, sample_size=128, use_additional_conditions=True)


def _pixart(kind: type, **more: Any) -> Any:
    network = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        caption_channels=16,
        **more,
    ).eval()
    return kind(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_text(16),
        vae=kl_vae(scaling_factor=0.13025),
        transformer=network,
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    )
