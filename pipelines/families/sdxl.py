"""Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952): a UNet with two CLIP text encoders and micro-conditioning.

Beside the prompt, the UNet's inputs say how the picture was cut from its original: the paper's section 2.2, where these numbers
make small and badly cropped training pictures usable instead of teaching their faults. So each side of a pair has its own
numbers, as the data's transform made them; a picture that is sampled is taken for one of just its size, as the pipeline does.

Empty prompts: where the pipeline says ``force_zeros_for_empty_prompt`` (SDXL's base does), the empty prompt is all zeros and not
what the text encoders make of it. That holds for guidance, and here for dropped and empty prompts of the data as well.

The autoencoder works in float32, whatever the network's precision: the one that was released with SDXL overflows in float16
(``force_upcast``). A checkpoint with the repaired autoencoder says ``force_upcast: false``, which changes nothing here. The
refiner is another pipeline and has no part in this.

Shapes: B = batch, latents [B, 4, h, w], pixels [B, 3, 8h, 8w] (the factor is the autoencoder's), L = text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.types import Conditioning
from pipelines.families._denoiser import NetworkDenoiser, framing_of
from pipelines.families._encoder import FrozenEncoder
from pipelines.families._encoding import TruncatedPrompt, about_clip, tokenized, truncated_prompts
from pipelines.families._family import Family
from pipelines.families._origin import Origin
from pipelines.families._schedules import schedule_of
from pipelines.families._unet import LORA_TARGETS, refuse_other_inputs

PIPELINES = ("StableDiffusionXLPipeline",)
SINGLE_FILE = ("xl_base",)
NETWORK = "unet"
LEFT_OUT = {"feature_extractor": None, "image_encoder": None, "add_watermarker": False}


@dataclass(frozen=True)
class SDXLDenoiser(NetworkDenoiser):
    """The UNet, called with ``encoder_hidden_states`` [B, L, D], ``text_embeds`` [B, P] and, where it is known, the framing."""

    factor: int  # pixels of a latent's side

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        states, pooled = (conditioning[name].to(x_t.dtype) for name in ("encoder_hidden_states", "text_embeds"))
        time_ids = framing_of(conditioning, x_t, self.factor)  # float32: sizes above 256 are not exact in bfloat16
        added = {"text_embeds": pooled, "time_ids": time_ids}
        return self.network(x_t, t, encoder_hidden_states=states, added_cond_kwargs=added).sample


class SDXLEncoder(FrozenEncoder):
    """Autoencoder and two CLIP text encoders, of which the second also gives a pooled embedding."""

    def __init__(
        self, vae: nn.Module, text_encoders: Sequence[nn.Module], tokenizers: Sequence[Any], zeros_if_empty: bool
    ) -> None:
        first, second = text_encoders
        super().__init__({"vae": vae, "text_encoder": first, "text_encoder_2": second})
        self._tokenizers, self._zeros_if_empty = tokenizers, zeros_if_empty

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Last hidden states but one of both encoders side by side [B, L, D], and the second's pooled embedding [B, P]."""
        said = [
            encoder(tokenized(tokenizer, prompts).input_ids.to(encoder.device), output_hidden_states=True)
            for encoder, tokenizer in zip(self._at_work("text_encoder", "text_encoder_2"), self._tokenizers, strict=True)
        ]
        states, pooled = torch.cat([one.hidden_states[-2] for one in said], dim=-1), said[-1].text_embeds
        if self._zeros_if_empty:
            spoken = torch.tensor([prompt != "" for prompt in prompts], device=states.device)
            states, pooled = states * spoken[:, None, None], pooled * spoken[:, None]
        return {"encoder_hidden_states": states.float(), "text_embeds": pooled.float()}

    def truncated(self, prompts: Sequence[str]) -> list[TruncatedPrompt]:
        """Prompts that either tokenizer truncates; a prompt is named twice if they cut it differently."""
        return list(dict.fromkeys(cut for tokenizer in self._tokenizers for cut in truncated_prompts(tokenizer, prompts)))

    def about_text(self) -> dict[str, Any]:
        both = zip(self._at_work("text_encoder", "text_encoder_2"), self._tokenizers, strict=True)
        about = {f"text_{number}": about_clip(*one) for number, one in enumerate(both, 1)}
        return {**about, "zeros_for_empty_prompt": self._zeros_if_empty}


def build(pipeline: Any, *, prediction_type: str | None = None, origin: Origin | None = None) -> Family:
    """A loaded ``StableDiffusionXLPipeline`` as something to train.

    Args:
        prediction_type: what the caller believes the UNet predicts; checked against the scheduler's configuration.
        origin: where it was read from, to save whole pipelines after the encoders were released.

    Raises:
        UserError: an inpainting UNet, a refiner, or a prediction type that is unknown or not the expected one.
    """
    unet, name = pipeline.unet, origin.place if origin else "the pipeline"
    refuse_other_inputs(pipeline, name)
    if pipeline.text_encoder is None or pipeline.text_encoder_2 is None:
        raise UserError(f"{name} has only one text encoder: it is SDXL's refiner, or incomplete. Align the base model.")
    where = origin.scheduler_file if origin else "the scheduler's configuration"
    schedule = schedule_of(pipeline.scheduler.config, allowed=("epsilon", "v_prediction"), expected=prediction_type, where=where)
    encoder = SDXLEncoder(
        pipeline.vae,
        (pipeline.text_encoder, pipeline.text_encoder_2),
        (pipeline.tokenizer, pipeline.tokenizer_2),
        bool(pipeline.config.force_zeros_for_empty_prompt),
    )
    factor = pipeline.vae_scale_factor
    denoiser = SDXLDenoiser(schedule, unet.requires_grad_(False), factor)
    return Family("sdxl", pipeline, denoiser, encoder, NETWORK, LORA_TARGETS, unet.config.sample_size * factor, origin)
