"""Z-Image and Z-Image-Turbo (Z-Image Team 2025, arXiv 2511.22699): one stream of text and picture tokens, Qwen3 as text encoder,
FLUX's autoencoder, straight paths.

The text is Qwen3's last hidden states but one, of the prompt as a turn of a chat; padding is cut off before the transformer sees
it. The transformer's time runs from 0 (noise) to 1, and it answers with the velocity towards the picture: minus ours.

Guidance. The pipeline's scale 0 is none, ours is 1: its g is ours minus one, so what people sample the base model with, 3 to 5,
is 4 to 6 in objectives that sample. Turbo was distilled and is sampled with 0: give ``--guidance-scale 0`` for evaluation (or put
a ``sampling.json`` beside its index) and ``guidance=1`` to objectives that sample. Training on noised pictures undoes Turbo's
distillation to few steps as it goes on; prefer short runs, or the base model.

Noise levels: logit-normal(0, 1) as in the report, bent as the sampler bends its line at 1024 pixels.

Shapes: B = batch, latents [B, 16, h, w], pixels [B, 3, 8h, 8w] (the factor is the autoencoder's), L = text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.types import LENGTHS, Conditioning
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

PIPELINES = ("ZImagePipeline",)
SINGLE_FILE = ("z-image-turbo",)
NETWORK = "transformer"
NETWORK_CLASS = "ZImageTransformer2DModel"
LEFT_OUT = {}
NO_GUIDANCE = 0.0
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""As Diffusers' script for Z-Image has it: the attention of every block, of those before the stream too."""
PATCH = 2
"""Latents on a side of a token."""
RESOLUTION = 1024
"""Pixels on a side if the pipeline is given no size."""


class ZImageDenoiser(NetworkDenoiser):
    """The transformer, called with the first ``LENGTHS`` [B] rows of ``encoder_hidden_states`` [B, L, D]; its time is 1 - t / T,
    its output is minus the velocity."""

    OPTIONAL = (LENGTHS,)

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        texts = list(conditioning["encoder_hidden_states"].to(x_t.dtype).unbind())
        if LENGTHS in conditioning:
            texts = [row[:length] for row, length in zip(texts, conditioning[LENGTHS].tolist(), strict=True)]
        pictures = list(x_t.unsqueeze(2).unbind())  # a picture is a film of one frame
        steps = len(self.schedule)
        said = self.network(pictures, (steps - t) / steps, texts).sample
        return -torch.stack(said).squeeze(2)


class ZImageEncoder(FrozenEncoder):
    """Autoencoder and Qwen3."""

    def __init__(self, vae: nn.Module, text_encoder: nn.Module, tokenizer: Any, length: int) -> None:
        super().__init__({"vae": vae, "text_encoder": text_encoder})
        self._tokenizer, self._length = tokenizer, length

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """States [B, L, D], zero behind the last token, and how many there are [B] int64."""
        (text_encoder,) = self._at_work("text_encoder")
        tokens = tokenized(self._tokenizer, self._as_chat(prompts), self._length).to(text_encoder.device)
        mask = tokens.attention_mask
        states = text_encoder(input_ids=tokens.input_ids, attention_mask=mask.bool(), output_hidden_states=True).hidden_states[-2]
        first = mask.argsort(dim=1, descending=True, stable=True)  # tokens come before padding, on whichever side that is
        states = states.float().masked_fill(mask[..., None] == 0, 0.0)
        return {
            "encoder_hidden_states": states.take_along_dim(first[..., None], dim=1),
            LENGTHS: mask.sum(dim=1).cpu(),
        }

    def _as_chat(self, prompts: Sequence[str]) -> list[str]:
        how = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
        return [self._tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **how) for prompt in prompts]

    def truncated(self, prompts: Sequence[str]) -> list[TruncatedPrompt]:
        mark = "\x00"
        tail = self._as_chat([mark])[0].partition(mark)[2]
        return truncated_prompts(self._tokenizer, prompts, self._length, self._as_chat, tail)

    def about_text(self) -> dict[str, Any]:
        (text_encoder,) = self._at_work("text_encoder")
        about = about_language_model(text_encoder, self._tokenizer)
        return {**about, "tokens": self._length, "chat": self._as_chat([""])[0], "told": LENGTHS}


def build(pipeline: Any, *, prediction_type: str | None = None, origin: Origin | None = None) -> Family:
    """A loaded ``ZImagePipeline`` as something to train.

    Args:
        prediction_type: what the caller believes the transformer predicts; it is ``velocity``.
        origin: where it was read from, to save whole pipelines after the encoders were released.

    Raises:
        UserError: another prediction type, or a scheduler that does not follow a flow.
    """
    transformer = pipeline.transformer
    side = RESOLUTION // pipeline.vae_scale_factor
    schedule = flow_schedule_of(
        pipeline.scheduler,
        line="pipeline",
        shape=(transformer.in_channels, side, side),
        patch=PATCH,
        expected=prediction_type,
        where=origin.scheduler_file if origin else "the scheduler's configuration",
    )
    encoder = ZImageEncoder(pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, default_length(pipeline))
    denoiser = ZImageDenoiser(schedule, transformer.requires_grad_(False))
    return Family("z_image", pipeline, denoiser, encoder, NETWORK, LORA_TARGETS, RESOLUTION, origin, patch=PATCH)
