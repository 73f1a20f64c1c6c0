"""PixArt-alpha (Chen et al. 2023, arXiv 2310.00426) and PixArt-Sigma (2024, arXiv 2403.04692): a diffusion transformer, T5, a KL
autoencoder.

The text is T5's last hidden states with their attention mask: the padding up to the fixed length (120 tokens of alpha, 300 of
Sigma) is there and masked out. Prompts are put into lower case and stripped, as the pipelines' ``encode_prompt`` does; their
further "cleaning", which is on only where two other packages happen to be installed, is off in training and in our sampling.

The transformer answers with 2 C channels where it also learned a variance; the second half is dropped, as the pipelines do, and
has no part in any loss. The schedule is DDPM's with linear betas.

Alpha's models of 1024 pixels take a picture's size and shape as inputs (``use_additional_conditions``): in their training these
were the size of the original and the ratio, height by width, of what was cut from it. Each side of a pair has its own; a picture
that is sampled is taken for one of just its size, as the pipeline does. All other models have no such inputs.

Diffusers has no LoRA loader for these pipelines: adapters are saved as PEFT keeps them too, see ``Family.save_adapter``.

Shapes: B = batch, latents [B, 4, h, w], pixels [B, 3, 8h, 8w] (the factor is the autoencoder's), L = text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.types import Conditioning
from pipelines.families._denoiser import NetworkDenoiser, framing_of
from pipelines.families._encoder import FrozenEncoder
from pipelines.families._encoding import TruncatedPrompt, about_t5, default_length, tokenized, truncated_prompts
from pipelines.families._family import Family
from pipelines.families._origin import Origin
from pipelines.families._schedules import schedule_of

PIPELINES = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
SINGLE_FILE = ()
NETWORK = "transformer"
LEFT_OUT = {}
CALL = {"clean_caption": False, "use_resolution_binning": False}
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class PixArtDenoiser(NetworkDenoiser):
    """The transformer, called with ``encoder_hidden_states`` [B, L, D] and ``encoder_attention_mask`` [B, L]."""

    factor: int  # pixels of a latent's side
    told_of_size: bool  # whether it takes the size of the original and the ratio of the crop

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        said = self.network(
            x_t,
            encoder_hidden_states=conditioning["encoder_hidden_states"].to(x_t.dtype),
            encoder_attention_mask=conditioning["encoder_attention_mask"],
            timestep=t,
            added_cond_kwargs=self._sizes(x_t, conditioning),
        ).sample
        return said[:, : x_t.shape[1]]

    def _sizes(self, x_t: Tensor, conditioning: Conditioning) -> dict[str, Tensor | None]:
        if not self.told_of_size:
            return {"resolution": None, "aspect_ratio": None}
        framing = framing_of(conditioning, x_t, self.factor)
        return {"resolution": framing[:, :2], "aspect_ratio": framing[:, 4:5] / framing[:, 5:6]}


class PixArtEncoder(FrozenEncoder):
    """Autoencoder and T5."""

    def __init__(self, vae: nn.Module, text_encoder: nn.Module, tokenizer: Any, length: int) -> None:
        super().__init__({"vae": vae, "text_encoder": text_encoder})
        self._tokenizer, self._length = tokenizer, length

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Last hidden states [B, L, D], and which of them are of tokens [B, L] int64."""
        (text_encoder,) = self._at_work("text_encoder")
        tokens = tokenized(self._tokenizer, _plain(prompts), self._length).to(text_encoder.device)
        states = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        return {"encoder_hidden_states": states.float(), "encoder_attention_mask": tokens.attention_mask}

    def truncated(self, prompts: Sequence[str]) -> list[TruncatedPrompt]:
        return truncated_prompts(self._tokenizer, prompts, self._length, _plain)

    def about_text(self) -> dict[str, Any]:
        (text_encoder,) = self._at_work("text_encoder")
        return {**about_t5(text_encoder, self._tokenizer), "tokens": self._length}


def _plain(prompts: Sequence[str]) -> list[str]:
    return [prompt.lower().strip() for prompt in prompts]


def build(pipeline: Any, *, prediction_type: str | None = None, origin: Origin | None = None) -> Family:
    """A loaded ``PixArtAlphaPipeline`` or ``PixArtSigmaPipeline`` as something to train.

    Args:
        prediction_type: what the caller believes the transformer predicts; checked against the scheduler's configuration.
        origin: where it was read from, to save whole pipelines after the encoders were released.

    Raises:
        UserError: a prediction type that is unknown or not the expected one.
    """
    transformer, factor = pipeline.transformer, pipeline.vae_scale_factor
    where = origin.scheduler_file if origin else "the scheduler's configuration"
    schedule = schedule_of(pipeline.scheduler.config, allowed=("epsilon",), expected=prediction_type, where=where)
    length = default_length(pipeline)
    encoder = PixArtEncoder(pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, length)
    told = bool(transformer.use_additional_conditions)
    denoiser = PixArtDenoiser(schedule, transformer.requires_grad_(False), factor, told)
    side, patch = transformer.config.sample_size, transformer.config.patch_size
    return Family("pixart", pipeline, denoiser, encoder, NETWORK, LORA_TARGETS, side * factor, origin, patch=patch)
