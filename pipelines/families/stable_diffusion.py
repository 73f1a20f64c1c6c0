"""Stable Diffusion 1.x and 2.x: one UNet with cross-attention, one CLIP text encoder, a KL autoencoder.

Shapes: B = batch, latents [B, 4, h, w], pixels [B, 3, 8h, 8w] (the factor is the autoencoder's), L = text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.types import Conditioning
from pipelines.families._denoiser import NetworkDenoiser
from pipelines.families._encoder import FrozenEncoder
from pipelines.families._encoding import TruncatedPrompt, about_clip, tokenized, truncated_prompts
from pipelines.families._family import Family
from pipelines.families._origin import Origin
from pipelines.families._schedules import schedule_of
from pipelines.families._unet import LORA_TARGETS, refuse_other_inputs

PIPELINES = ("StableDiffusionPipeline",)
SINGLE_FILE = ("v1", "v2")
NETWORK = "unet"
LEFT_OUT = {"safety_checker": None, "feature_extractor": None, "image_encoder": None, "requires_safety_checker": False}


class UNetDenoiser(NetworkDenoiser):
    """The UNet, called with ``encoder_hidden_states`` [B, L, D]."""

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self.network(x_t, t, encoder_hidden_states=conditioning["encoder_hidden_states"].to(x_t.dtype)).sample


class StableDiffusionEncoder(FrozenEncoder):
    """Autoencoder and one CLIP text encoder."""

    def __init__(self, vae: nn.Module, text_encoder: nn.Module, tokenizer: Any) -> None:
        super().__init__({"vae": vae, "text_encoder": text_encoder})
        self._tokenizer = tokenizer

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Last hidden states [B, L, D]."""
        (text_encoder,) = self._at_work("text_encoder")
        tokens = tokenized(self._tokenizer, prompts).to(text_encoder.device)
        mask = tokens.attention_mask if _uses_mask(text_encoder.config) else None
        return {"encoder_hidden_states": text_encoder(tokens.input_ids, attention_mask=mask)[0].float()}

    def truncated(self, prompts: Sequence[str]) -> list[TruncatedPrompt]:
        return truncated_prompts(self._tokenizer, prompts)

    def about_text(self) -> dict[str, Any]:
        (text_encoder,) = self._at_work("text_encoder")
        return {**about_clip(text_encoder, self._tokenizer), "text_mask": _uses_mask(text_encoder.config)}


def _uses_mask(config: Any) -> bool:
    return bool(config.to_dict().get("use_attention_mask"))


def build(pipeline: Any, *, prediction_type: str | None = None, origin: Origin | None = None) -> Family:
    """A loaded ``StableDiffusionPipeline`` as something to train.

    Args:
        prediction_type: what the caller believes the UNet predicts; checked against the scheduler's configuration.
        origin: where it was read from, to save whole pipelines after the encoders were released.

    Raises:
        UserError: an inpainting UNet, or a prediction type that is unknown or not the expected one.
    """
    unet = pipeline.unet
    refuse_other_inputs(pipeline, origin.place if origin else "the pipeline")
    where = origin.scheduler_file if origin else "the scheduler's configuration"
    schedule = schedule_of(pipeline.scheduler.config, allowed=("epsilon", "v_prediction"), expected=prediction_type, where=where)
    encoder = StableDiffusionEncoder(pipeline.vae, pipeline.text_encoder, pipeline.tokenizer)
    denoiser = UNetDenoiser(schedule, unet.requires_grad_(False))
    resolution = unet.config.sample_size * pipeline.vae_scale_factor
    return Family("stable_diffusion", pipeline, denoiser, encoder, NETWORK, LORA_TARGETS, resolution, origin)
