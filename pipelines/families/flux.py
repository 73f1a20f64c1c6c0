"""FLUX.1 [dev] and [schnell] (Black Forest Labs 2024): a transformer on text and picture, T5 and a pooled CLIP embedding,
straight paths.

Latents stay [B, 16, h, w] here; the transformer reads squares of 2 x 2 of them as tokens, with their places (``packed``).

Guidance. [dev] was distilled from guided predictions and takes the scale as an input, so one call does what two did. In training
the scale is 1, where it predicts as its unguided teacher did: the noisy picture's own velocity, whose error stands for a
likelihood. At 3.5, what people sample with, the network aims at something that no picture of the data is on the way to, and the
error says less about the picture. (Released trainers differ: kohya's has 1, Diffusers' script 3.5.) Where an objective samples
with guidance, the network gets that scale, in sampling and in learning (``diffalign.solvers.Guided``). [schnell] has no such
input, and is sampled without guidance; give objectives that sample ``guidance=1``, as any other number means two calls.

Noise levels: how FLUX was trained is not published. Taken is SD3's way, by the same authors: logit-normal(0, 1), bent as the
sampler bends its line for pictures of 1024 pixels, exp(1.15) = 3.2 for [dev] and not at all for [schnell]. Sampling bends by the
picture's own size; for training at 512 pixels the same rule gives ``--level-shift 1.9``.

Shapes: B = batch, latents [B, 16, h, w], pixels [B, 3, 8h, 8w] (the factor is the autoencoder's), L = text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.errors import UserError
from diffalign.types import GUIDANCE, Conditioning
from pipelines.families._denoiser import NetworkDenoiser
from pipelines.families._encoder import FrozenEncoder
from pipelines.families._encoding import TruncatedPrompt, about_clip, about_t5, default_length, tokenized, truncated_prompts
from pipelines.families._family import Family
from pipelines.families._origin import Origin
from pipelines.families._schedules import flow_schedule_of

PIPELINES = ("FluxPipeline",)
SINGLE_FILE = ("flux-dev", "flux-schnell")
NETWORK = "transformer"
NETWORK_CLASS = "FluxTransformer2DModel"
EMBEDS_GUIDANCE = True
LEFT_OUT = {"image_encoder": None, "feature_extractor": None}
LORA_TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
)
"""As Diffusers' script for FLUX has it: attention of picture and text, and the layers after it in the blocks with two streams."""
PATCH = 2
"""Latents on a side of a token."""
TRAINED_WITH = 1.0
"""The guidance scale that is the input of [dev] in training."""


class FluxDenoiser(NetworkDenoiser):
    """The transformer, called with ``encoder_hidden_states`` [B, L, D], ``pooled_projections`` [B, P] and, of [dev], ``guidance``
    [B]; its time is t / T."""

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        states, pooled = (conditioning[name].to(x_t.dtype) for name in ("encoder_hidden_states", "pooled_projections"))
        said = self.network(
            hidden_states=packed(x_t),
            timestep=t / len(self.schedule),
            guidance=conditioning[GUIDANCE].float() if GUIDANCE in conditioning else None,
            pooled_projections=pooled,
            encoder_hidden_states=states,
            txt_ids=torch.zeros(states.shape[1], 3, device=x_t.device),
            img_ids=places(x_t),
        ).sample
        return unpacked(said, x_t.shape[-2:])


def packed(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> tokens [B, h/2 w/2, 4 C], row by row; a token is channel by channel its square of 2 x 2, row by row."""
    return F.pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)


def unpacked(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """The way back, to latents of ``size`` (h, w)."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (size[0] // PATCH, -1)), PATCH)


def places(latents: Tensor) -> Tensor:
    """[h/2 w/2, 3] float32: zero, row and column of each token."""
    rows, columns = (torch.arange(side // PATCH, device=latents.device, dtype=torch.float32) for side in latents.shape[-2:])
    return torch.cartesian_prod(torch.zeros(1, device=latents.device), rows, columns)


class FluxEncoder(FrozenEncoder):
    """Autoencoder, CLIP and T5."""

    def __init__(
        self,
        vae: nn.Module,
        text_encoders: Sequence[nn.Module],
        tokenizers: Sequence[Any],
        t5_tokens: int,
        embeds_guidance: bool,
    ) -> None:
        clip, t5 = text_encoders
        super().__init__({"vae": vae, "text_encoder": clip, "text_encoder_2": t5})
        self._tokenizers, self._t5_tokens, self._is_told_guidance = tokenizers, t5_tokens, embeds_guidance

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """T5's last hidden states [B, L, D], without a mask, CLIP's pooled embedding [B, P], and of [dev] the guidance [B]."""
        clip, t5 = self._at_work("text_encoder", "text_encoder_2")
        for_clip, for_t5 = self._tokenizers
        pooled = clip(tokenized(for_clip, prompts).input_ids.to(clip.device)).pooler_output
        states = t5(tokenized(for_t5, prompts, self._t5_tokens).input_ids.to(t5.device))[0]
        said = {"encoder_hidden_states": states.float(), "pooled_projections": pooled.float()}
        return {**said, GUIDANCE: torch.full((len(prompts),), TRAINED_WITH)} if self._is_told_guidance else said

    def truncated(self, prompts: Sequence[str]) -> list[TruncatedPrompt]:
        """Prompts that T5 truncates. CLIP reads less, but gives only a summary."""
        return truncated_prompts(self._tokenizers[1], prompts, self._t5_tokens)

    def about_text(self) -> dict[str, Any]:
        clip, t5 = self._at_work("text_encoder", "text_encoder_2")
        for_clip, for_t5 = self._tokenizers
        told = {GUIDANCE: TRAINED_WITH if self._is_told_guidance else None}
        return {"text_1": about_clip(clip, for_clip), "text_2": about_t5(t5, for_t5), "t5_tokens": self._t5_tokens, **told}


def build(pipeline: Any, *, prediction_type: str | None = None, origin: Origin | None = None) -> Family:
    """A loaded ``FluxPipeline`` as something to train.

    Args:
        prediction_type: what the caller believes the transformer predicts; it is ``velocity``.
        origin: where it was read from, to save whole pipelines after the encoders were released.

    Raises:
        UserError: another prediction type, a transformer that takes more than noisy latents, or a scheduler that does not follow
            a flow.
    """
    transformer, name = pipeline.transformer, origin.place if origin else "the pipeline"
    settings, channels = transformer.config, pipeline.vae.config.latent_channels
    if settings.in_channels != channels * PATCH**2:
        raise UserError(
            f"{name}: the transformer takes {settings.in_channels} channels where the autoencoder gives {channels * PATCH**2} "
            "a token: it is for inpainting or editing, and cannot be aligned here."
        )
    side = pipeline.default_sample_size
    schedule = flow_schedule_of(
        pipeline.scheduler,
        line="pipeline",
        shape=(channels, side, side),
        patch=PATCH,
        expected=prediction_type,
        where=origin.scheduler_file if origin else "the scheduler's configuration",
    )
    encoder = FluxEncoder(
        pipeline.vae,
        (pipeline.text_encoder, pipeline.text_encoder_2),
        (pipeline.tokenizer, pipeline.tokenizer_2),
        default_length(pipeline),
        settings.guidance_embeds,
    )
    denoiser = FluxDenoiser(schedule, transformer.requires_grad_(False))
    return Family(
        "flux", pipeline, denoiser, encoder, NETWORK, LORA_TARGETS, side * pipeline.vae_scale_factor, origin, patch=PATCH
    )
