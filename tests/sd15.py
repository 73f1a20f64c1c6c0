"""Stable Diffusion 1.5's genuine configuration with random weights, in the usual Diffusers layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from pipelines.tiny import model as tiny
from pipelines.tiny import scenes


def save_random(folder: Path) -> None:
    """860 M (UNet), 84 M (autoencoder) and 123 M (text encoder) parameters; the tiny world's tokenizer, padded to 77."""
    torch.manual_seed(0)
    tokenizer = tiny.build_tokenizer()
    tokenizer.model_max_length = 77
    end = tokenizer.eos_token_id
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        projection_dim=768,
        eos_token_id=end,
        pad_token_id=end,
    )
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=512,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler.from_config(tiny.build_scheduler().config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def save_pairs(folder: Path, n: int = 3) -> None:
    """A JSONL of pairs of the tiny world's pictures, enlarged."""
    folder.mkdir(parents=True)
    rng, rows = np.random.default_rng(0), []
    for i in range(n):
        scene, caption = scenes.draw_captioned(rng)
        for side in ("w", "l"):
            scenes.render(scene).resize((300, 256)).save(folder / f"{side}{i}.png")
            scene, _ = scenes.draw_captioned(rng)
        rows.append({"prompt": caption, "chosen": f"w{i}.png", "rejected": f"l{i}.png"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
