"""What the families with a UNet share."""

from __future__ import annotations

from typing import Any

from diffalign.errors import UserError

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def refuse_other_inputs(pipeline: Any, name: str) -> None:
    """Raise UserError for a UNet that takes more than noisy latents (inpainting, editing)."""
    channels, latents = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
    if channels != latents:
        kind = "an inpainting UNet" if channels == 2 * latents + 1 else "not a plain text-to-image UNet"
        raise UserError(
            f"{name}: the UNet takes {channels} channels where the autoencoder gives {latents}: this is {kind}, "
            "which cannot be aligned here."
        )
