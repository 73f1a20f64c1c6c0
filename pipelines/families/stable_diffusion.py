"""Stable Diffusion 1.x and 2.x: one UNet with cross-attention, one CLIP text encoder, a KL autoencoder.

Shapes: B = batch, latents [B, 4, h, w], pixels [B, 3, 8h, 8w] (the factor is the autoencoder's), L = text tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.schedule import NoiseSchedule
from diffalign.types import Conditioning
from pipelines.families import _lora
from pipelines.families._encoding import TruncatedPrompt, digest, tokenizer_digest, truncated_prompts
from pipelines.families._family import Family
from pipelines.families._schedules import schedule_of
from pipelines.families._sources import Origin

PIPELINES = ("StableDiffusionPipeline",)
SINGLE_FILE = ("v1", "v2")
NETWORK = "unet"
LEFT_OUT = {"safety_checker": None, "feature_extractor": None, "image_encoder": None, "requires_safety_checker": False}
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class UNetDenoiser:
    """The UNet as a ``diffalign.protocols.Denoiser``; ``network`` may be wrapped (DDP, autocast, compiled)."""

    schedule: NoiseSchedule
    network: nn.Module

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """``x_t`` [B, C, H, W], ``t`` [B] -> prediction [B, C, H, W]; inputs are cast to the base weights' dtype, and the
        answer is given in the wider of that and ``x_t``'s."""
        dtype = next(self.network.parameters()).dtype  # conv_in's, of the base even under LoRA
        prediction = self.network(x_t.to(dtype), t, encoder_hidden_states=conditioning["encoder_hidden_states"].to(dtype)).sample
        return prediction.to(torch.promote_types(prediction.dtype, x_t.dtype))

    def with_network(self, network: nn.Module) -> UNetDenoiser:
        """The same, around a wrapped version of the network."""
        return replace(self, network=network)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Everything after ``train_fully``, the adapter after ``attach_lora``; in a stable order."""
        return (parameter for parameter in self.network.parameters() if parameter.requires_grad)

    def adapter_off(self) -> AbstractContextManager[None]:
        """Within: the network before alignment, to the bit.

        Raises:
            ValueError: there is no adapter.
        """
        return _lora.switched_off(self.network)


class StableDiffusionEncoder:
    """Autoencoder and text encoder as a ``diffalign.protocols.Encoder``. float32, whatever the UNet is."""

    COMPONENTS = ("vae", "text_encoder")

    def __init__(self, vae: nn.Module, text_encoder: nn.Module, tokenizer: Any) -> None:
        self._vae: nn.Module | None = vae.requires_grad_(False).eval()
        self._text_encoder: nn.Module | None = text_encoder.requires_grad_(False).eval()
        self._tokenizer = tokenizer
        self._fingerprint: dict[str, Any] | None = None

    def fingerprint(self) -> Mapping[str, Any]:
        """Hashes of the weights that encode (the decoder is not among them), and the few settings that change the result."""
        if self._fingerprint is None:
            vae, text_encoder = self._loaded()
            scaling, settings = vae.config.scaling_factor, text_encoder.config
            self._fingerprint = {
                "vae_encoder": digest(vae.encoder, vae.quant_conv),
                "scaling_factor": scaling,
                "text_encoder": digest(text_encoder),
                "text_activation": settings.hidden_act,
                "text_shape": [settings.num_hidden_layers, settings.num_attention_heads],
                "text_mask": _uses_mask(settings),
                "tokenizer": tokenizer_digest(self._tokenizer),
                "tokens": self._tokenizer.model_max_length,
            }
        return self._fingerprint

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> dict[str, Tensor]:
        """``pixels`` [B, 3, H, W] in [-1, 1] -> the posterior's ``mean`` and ``std`` [B, 4, h, w], both times scaling_factor."""
        vae, _ = self._loaded()
        posterior = vae.encode(pixels.to(device=vae.device, dtype=vae.dtype)).latent_dist
        scale = vae.config.scaling_factor
        return {"mean": (posterior.mean * scale).float(), "std": (posterior.std * scale).float()}

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Last hidden states [B, L, D], as the pipeline's ``encode_prompt`` computes them; longer prompts are cut."""
        _, text_encoder = self._loaded()
        tokens = self._tokenizer(
            list(prompts), padding="max_length", max_length=self._tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).to(text_encoder.device)
        mask = tokens.attention_mask if _uses_mask(text_encoder.config) else None
        return {"encoder_hidden_states": text_encoder(tokens.input_ids, attention_mask=mask)[0].float()}

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, 4, h, w] -> pictures [B, 3, H, W] in [0, 1], float32 on the CPU, as the pipeline makes them."""
        if self._vae is None:
            raise ValueError("the autoencoder has been released; keep the decoder to look at what is sampled")
        vae = self._vae
        pixels = vae.decode(latents.to(device=vae.device, dtype=vae.dtype) / vae.config.scaling_factor).sample
        return (pixels.float() / 2 + 0.5).clamp(0, 1).cpu()

    def truncated(self, prompts: Sequence[str]) -> list[TruncatedPrompt]:
        """The prompts that do not fit, with what is lost of each."""
        return truncated_prompts(self._tokenizer, prompts)

    def to(self, device: torch.device | str) -> None:
        """Move both networks."""
        for network in self._loaded():
            network.to(device)

    def release(self, keep_decoder: bool = False) -> None:
        """Let go of both networks, or of all but the autoencoder; the fingerprint stays if it has been taken."""
        self._text_encoder = None
        self._vae = self._vae if keep_decoder else None

    def _loaded(self) -> tuple[nn.Module, nn.Module]:
        if self._vae is None or self._text_encoder is None:
            raise ValueError("the encoders have been released; load the family again to encode more")
        return self._vae, self._text_encoder


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
    unet, name = pipeline.unet, origin.place if origin else "the pipeline"
    channels, latents = unet.config.in_channels, pipeline.vae.config.latent_channels
    if channels != latents:
        kind = "an inpainting UNet" if channels == 2 * latents + 1 else "not a plain text-to-image UNet"
        raise UserError(
            f"{name}: the UNet takes {channels} channels where the autoencoder gives {latents}: this is {kind}, "
            "which cannot be aligned here."
        )
    where = origin.scheduler_file if origin else "the scheduler's configuration"
    schedule = schedule_of(pipeline.scheduler.config, allowed=("epsilon", "v_prediction"), expected=prediction_type, where=where)
    encoder = StableDiffusionEncoder(pipeline.vae, pipeline.text_encoder, pipeline.tokenizer)
    denoiser = UNetDenoiser(schedule, unet.requires_grad_(False))
    resolution = unet.config.sample_size * pipeline.vae_scale_factor
    return Family("stable_diffusion", pipeline, denoiser, encoder, NETWORK, LORA_TARGETS, resolution, origin)
