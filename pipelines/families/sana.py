"""Sana (Xie et al. 2024, arXiv 2410.10629): a transformer with linear attention, an autoencoder that shrinks sides by 32, Gemma 2
as text encoder, straight paths.

The autoencoder (DC-AE) has no posterior: a picture has one latent, with deviation 0.

The text is Gemma's last hidden states with their mask. Before a prompt goes the pipeline's "complex human instruction", whose
states are dropped again but for the first (the paper, section 2.3); the empty prompt of guidance goes without, here for dropped
prompts too. Prompts are put into lower case and stripped, as the pipeline does.

Noise levels: logit-normal(0, 1), bent by the scheduler's shift (3) in training as in sampling; the released training code has the
same. The released scheduler is DPM-Solver++, which gives the network the whole part of a level; so does our training.
(With an Euler scheduler the network gets the level itself.)

Shapes: B = batch, latents [B, 32, h, w], pixels [B, 3, 32h, 32w] (the factor is the autoencoder's), L = text tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.types import Conditioning
from pipelines.families._denoiser import NetworkDenoiser
from pipelines.families._encoder import FrozenEncoder
from pipelines.families._encoding import (
    TruncatedPrompt,
    about_language_model,
    default_length,
    tokenized,
    truncated_prompts,
)
from pipelines.families._family import Family
from pipelines.families._origin import Origin
from pipelines.families._schedules import flow_schedule_of

PIPELINES = ("SanaPipeline",)
SINGLE_FILE = ("sana",)
NETWORK = "transformer"
NETWORK_CLASS = "SanaTransformer2DModel"
LEFT_OUT = {}
CALL = {"clean_caption": False, "use_resolution_binning": False}
LORA_TARGETS = ("to_q", "to_k", "to_v")
"""Of the linear self-attention and of the cross-attention, as Diffusers' script for Sana has it."""


@dataclass(frozen=True)
class SanaDenoiser(NetworkDenoiser):
    """The transformer, called with ``encoder_hidden_states`` [B, L, D] and ``encoder_attention_mask`` [B, L]."""

    whole_levels: bool  # whether it gets the whole part of a level
    time_scale: float

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self.network(
            x_t,
            encoder_hidden_states=conditioning["encoder_hidden_states"].to(x_t.dtype),
            encoder_attention_mask=conditioning["encoder_attention_mask"],
            timestep=(t.floor() if self.whole_levels else t) * self.time_scale,
        ).sample


class SanaEncoder(FrozenEncoder):
    """Autoencoder and Gemma."""

    def __init__(self, vae: nn.Module, text_encoder: nn.Module, tokenizer: Any, length: int, instruction: str) -> None:
        super().__init__({"vae": vae, "text_encoder": text_encoder})
        tokenizer.padding_side = "right"
        self._tokenizer, self._length, self._instruction = tokenizer, length, instruction
        self._longest = len(tokenizer.encode(instruction)) + length - 2  # the pipeline's count

    def posterior(self, vae: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
        latent = vae.encode(pixels).latent
        return latent, torch.zeros_like(latent)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """States [B, L, D] of the first token and the last L - 1, and which of them are of tokens [B, L] int64."""
        (text_encoder,) = self._at_work("text_encoder")
        said = [self._said(text_encoder, prompt) for prompt in prompts]
        return {name: torch.cat([one[name] for one in said]) for name in said[0]}

    def _said(self, text_encoder: nn.Module, prompt: str) -> dict[str, Tensor]:
        """One by one: the empty prompt is of another length, and the instruction makes each as long as a batch elsewhere."""
        text, longest = (self._instructed([prompt])[0], self._longest) if prompt else ("", self._length)
        tokens = tokenized(self._tokenizer, [text], longest).to(text_encoder.device)
        states = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        kept = [0, *range(-self._length + 1, 0)]
        return {"encoder_hidden_states": states[:, kept].float(), "encoder_attention_mask": tokens.attention_mask[:, kept]}

    def truncated(self, prompts: Sequence[str]) -> list[TruncatedPrompt]:
        return truncated_prompts(self._tokenizer, prompts, self._longest, self._instructed)

    def _instructed(self, prompts: Sequence[str]) -> list[str]:
        return [self._instruction + prompt.lower().strip() for prompt in prompts]

    def about_text(self) -> dict[str, Any]:
        (text_encoder,) = self._at_work("text_encoder")
        about = about_language_model(text_encoder, self._tokenizer)
        return {**about, "tokens": self._length, "instruction": self._instruction}


def build(pipeline: Any, *, prediction_type: str | None = None, origin: Origin | None = None) -> Family:
    """A loaded ``SanaPipeline`` as something to train.

    Args:
        prediction_type: what the caller believes the transformer predicts; it is ``velocity``.
        origin: where it was read from, to save whole pipelines after the encoders were released.

    Raises:
        UserError: another prediction type, or a scheduler that does not follow a flow.
    """
    transformer, settings = pipeline.transformer, pipeline.transformer.config
    side = settings.sample_size
    schedule = flow_schedule_of(
        pipeline.scheduler,
        line="scheduler",
        shape=(settings.in_channels, side, side),
        patch=settings.patch_size,
        expected=prediction_type,
        where=origin.scheduler_file if origin else "the scheduler's configuration",
    )
    instruction = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
    encoder = SanaEncoder(
        pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, default_length(pipeline), "\n".join(instruction)
    )
    whole = bool(pipeline.scheduler.config.get("use_flow_sigmas"))
    denoiser = SanaDenoiser(schedule, transformer.requires_grad_(False), whole, settings.timestep_scale)
    return Family(
        "sana", pipeline, denoiser, encoder, NETWORK, LORA_TARGETS, side * pipeline.vae_scale_factor, origin, whole=True
    )
