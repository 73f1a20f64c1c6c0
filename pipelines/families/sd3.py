"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206): a transformer for text and picture together (MMDiT), two CLIP
text encoders and T5, a KL autoencoder of 16 channels, straight paths.

T5 is optional, as the paper trained for it (section 5.3.3): without ``text_encoder_3`` its states are zeros, as in the pipeline.
A checkpoint may lack it, or it may be left out on loading (``without=("t5",)``), which spares 19 GB while
prompts are encoded.

Noise levels: the paper's best, logit-normal(0, 1), bent by the scheduler's ``shift`` (3 at 1024 pixels) in training as in
sampling (sections 3.1 and 5.3.2). The paper's pre-training at 256 pixels had no shift: ``--level-shift 1`` for small pictures.

Sampling without the "skip layer guidance" that SD3.5-medium may be asked for in a call.

Shapes: B = batch, latents [B, 16, h, w], pixels [B, 3, 8h, 8w] (the factor is the autoencoder's), L = text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.errors import UserError
from diffalign.types import Conditioning
from pipelines.families._denoiser import NetworkDenoiser
from pipelines.families._encoder import FrozenEncoder
from pipelines.families._encoding import TruncatedPrompt, about_clip, about_t5, default_length, tokenized, truncated_prompts
from pipelines.families._family import Family
from pipelines.families._joint_attention import JointAttention, with_few_zeros
from pipelines.families._origin import Origin
from pipelines.families._schedules import flow_schedule_of

PIPELINES = ("StableDiffusion3Pipeline",)
SINGLE_FILE = ("sd3", "sd35_medium", "sd35_large")
NETWORK = "transformer"
NETWORK_CLASS = "SD3Transformer2DModel"
LEFT_OUT = {"image_encoder": None, "feature_extractor": None}
OPTIONAL = {"t5": ("text_encoder_3", "tokenizer_3")}
LORA_TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
"""The joint attention, picture's and text's side, as Diffusers' script for SD3 has it; SD3.5-medium's second attention is not."""

T5Shape = tuple[int, int]
"""Tokens that T5 reads, and the width of its states."""


@dataclass(frozen=True)
class SD3Denoiser(NetworkDenoiser):
    """The transformer, called with ``encoder_hidden_states`` [B, L, D] and ``pooled_projections`` [B, P]."""

    zeros: int = 0
    """The number of zeros at the end of the L tokens, in T5's place."""
    patch: int = 2

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        states, pooled = (conditioning[name].to(x_t.dtype) for name in ("encoder_hidden_states", "pooled_projections"))
        told = with_few_zeros(states, self.zeros, x_t.shape[-2] * x_t.shape[-1] // self.patch**2)
        return self.network(hidden_states=x_t, timestep=t, pooled_projections=pooled, **told).sample


class SD3Encoder(FrozenEncoder):
    """Autoencoder, two CLIP text encoders with projections, and T5 if it is there."""

    def __init__(self, vae: nn.Module, text_encoders: Mapping[str, nn.Module], tokenizers: Sequence[Any], t5: T5Shape) -> None:
        super().__init__({"vae": vae, **text_encoders})
        self._text = tuple(text_encoders)
        self._tokenizers, (self._t5_tokens, self._t5_width) = tokenizers, t5

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """States of CLIP (last but one of both encoders side by side, zeros up to T5's width) and then of T5 [B, L, D]; both
        projections [B, P]."""
        first, second, *t5 = self._at_work(*self._text)
        length = self._tokenizers[0].model_max_length  # the pipeline cuts both at the first one's
        said = [
            encoder(tokenized(tokenizer, prompts, length).input_ids.to(encoder.device), output_hidden_states=True)
            for encoder, tokenizer in zip((first, second), self._tokenizers, strict=False)
        ]
        clip = torch.cat([one.hidden_states[-2] for one in said], dim=-1).float()
        states = [F.pad(clip, (0, self._t5_width - clip.shape[-1])), self._t5_states(t5, prompts, clip)]
        return {
            "encoder_hidden_states": torch.cat(states, dim=1),
            "pooled_projections": torch.cat([one.text_embeds for one in said], dim=-1).float(),
        }

    def _t5_states(self, t5: Sequence[nn.Module], prompts: Sequence[str], like: Tensor) -> Tensor:
        if not t5:
            return like.new_zeros(len(prompts), self._t5_tokens, self._t5_width)
        ids = tokenized(self._tokenizers[2], prompts, self._t5_tokens).input_ids
        return t5[0](ids.to(t5[0].device))[0].float()  # without a mask, as the pipeline does

    def truncated(self, prompts: Sequence[str]) -> list[TruncatedPrompt]:
        """Prompts that CLIP truncates, or T5 if it is there; a prompt is named once for each that cuts it differently."""
        limits = (self._tokenizers[0].model_max_length,) * 2 + (self._t5_tokens,)
        readers = list(zip(self._tokenizers, limits, strict=True))[: len(self._text)]
        return list(dict.fromkeys(cut for reader, limit in readers for cut in truncated_prompts(reader, prompts, limit)))

    def about_text(self) -> dict[str, Any]:
        first, second, *t5 = self._at_work(*self._text)
        one, two, three = self._tokenizers
        about = {"text_1": about_clip(first, one), "text_2": about_clip(second, two)}
        t5_tokens = {"t5_tokens": self._t5_tokens}
        return {**about, **t5_tokens, "text_3": about_t5(t5[0], three) if t5 else None}


def build(pipeline: Any, *, prediction_type: str | None = None, origin: Origin | None = None) -> Family:
    """A loaded ``StableDiffusion3Pipeline`` as something to train.

    Args:
        prediction_type: what the caller believes the transformer predicts; it is ``velocity``.
        origin: where it was read from, to save whole pipelines after the encoders were released.

    Raises:
        UserError: another prediction type, no CLIP, or a scheduler that does not follow a flow.
    """
    transformer, name = pipeline.transformer, origin.place if origin else "the pipeline"
    settings = transformer.config
    encoders = {part: getattr(pipeline, part) for part in ("text_encoder", "text_encoder_2", "text_encoder_3")}
    if encoders["text_encoder"] is None or encoders["text_encoder_2"] is None:
        raise UserError(f"{name} lacks text_encoder or text_encoder_2; of SD3's text encoders only the third, T5, may lack.")
    factor, side = pipeline.vae_scale_factor, settings.sample_size
    schedule = flow_schedule_of(
        pipeline.scheduler,
        line="scheduler",
        shape=(settings.in_channels, side, side),
        patch=settings.patch_size,
        expected=prediction_type,
        where=origin.scheduler_file if origin else "the scheduler's configuration",
    )
    encoder = SD3Encoder(
        pipeline.vae,
        {part: network for part, network in encoders.items() if network is not None},
        (pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3),
        (default_length(pipeline), settings.joint_attention_dim),
    )
    zeros = 0
    if encoders["text_encoder_3"] is None:
        zeros = default_length(pipeline)
        transformer.set_attn_processor(JointAttention())
    denoiser = SD3Denoiser(schedule, transformer.requires_grad_(False), zeros, settings.patch_size)
    return Family("sd3", pipeline, denoiser, encoder, NETWORK, LORA_TARGETS, side * factor, origin, patch=settings.patch_size)
