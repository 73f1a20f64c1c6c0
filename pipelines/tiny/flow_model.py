"""The miniature flow-matching transformer: a genuine Stable Diffusion 3 in everything but its size.

An MMDiT (Esser et al. 2024, arXiv 2403.03206) that predicts velocities, two CLIP text encoders, no T5 (which SD3 may leave out:
256 zeros stand in its place), the autoencoder of the miniature Stable Diffusion, its tokenizer and its world. The first text
encoder is the miniature Stable Diffusion's as well: SD3, too, takes one that had learnt its language before. As with every SD3
without T5, Diffusers itself wants to be told: ``from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)``.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from pipelines.families._quiet import quietly
from pipelines.tiny import model, scenes, shipped

WIDTHS = (model.WIDTH, 32)
"""Of the two text encoders."""
LAYERS = (3, 2)
"""Theirs; SD3 reads the last but one. The first one's last layer lets through what it is given."""
CALMER = 0.25
"""What the first one's states are multiplied with. Stable Diffusion reads them behind a norm, SD3 does not."""
HEADS, HEAD_WIDTH, BLOCKS, PATCH = 4, 32, 6, 2
MAX_TOKENS = 28
"""Of a caption; the world's longest have 23. Each costs as much as a patch of the picture."""


def build_tokenizer() -> CLIPTokenizer:
    """The miniature Stable Diffusion's, for shorter captions."""
    return model.build_tokenizer(MAX_TOKENS)


def build_text_encoders(tokenizer: CLIPTokenizer) -> list[CLIPTextModelWithProjection]:
    """The one that knows the language, and a small one that knows nothing yet."""
    knowing = _text_encoder(tokenizer, WIDTHS[0], LAYERS[0], layer_norm_eps=1e-5 * CALMER**2)
    small = _text_encoder(tokenizer, WIDTHS[1], LAYERS[1])
    return [_as_in_stable_diffusion(knowing).requires_grad_(False), small]


@torch.no_grad()
def _as_in_stable_diffusion(encoder: CLIPTextModelWithProjection) -> CLIPTextModelWithProjection:
    """Its weights are the trained ones; the states of its last layer but one are the trained one's last, times ``CALMER``."""
    with quietly():
        trained = CLIPTextModel.from_pretrained(shipped.CHECKPOINT, subfolder="text_encoder").state_dict()
    own = encoder.text_model
    own.load_state_dict(trained, strict=False)
    layers = own.encoder.layers
    own.embeddings.token_embedding.weight.mul_(CALMER)
    own.embeddings.position_embedding.weight.mul_(CALMER)
    for layer in layers[:-1]:  # norms stand before attention and MLP, so what these add is as much smaller as what they add it to
        for out in (layer.self_attn.out_proj, layer.mlp.fc2):
            out.weight.mul_(CALMER), out.bias.mul_(CALMER)
    for out in (layers[-1].self_attn.out_proj, layers[-1].mlp.fc2):
        out.weight.zero_(), out.bias.zero_()
    encoder.text_projection.weight.copy_(torch.eye(len(encoder.text_projection.weight)))
    return encoder


def _text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int, **more: float) -> CLIPTextModelWithProjection:
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
            **more,
        )
    )


def build_transformer() -> SD3Transformer2DModel:
    """3.5 million parameters on 8 x 8 patches of 2 x 2 latents, begun as transformers for diffusion are.

    Diffusers leaves linear layers as PyTorch makes them. Peebles and Xie (2022, arXiv 2212.09748, section 3.2, "adaLN-Zero")
    begin with blocks that do nothing: what makes their scales, shifts and gates is zero, as is the last projection.
    """
    transformer = SD3Transformer2DModel(
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
    for name, layer in transformer.named_modules():
        if isinstance(layer, nn.Linear):
            zero = name == "proj_out" or name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear"))
            nn.init.zeros_(layer.weight) if zero else nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return transformer


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
