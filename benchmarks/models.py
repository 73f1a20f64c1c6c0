"""Models and pairs that benchmarks work on: genuine classes and shapes, random weights, the tiny world's pictures enlarged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"channels": (48, 96, 112), "text": 128, "layers": 1, "pixels": 64, "vae": (24, 48, 64), "groups": 16, "heads": 4},
    "quarter": {
        "channels": (80, 160, 320, 320), "text": 192, "layers": 2, "pixels": 256, "vae": (32, 64, 128, 128), "groups": 16,
        "heads": 8,
    },
    "sd15": {
        "channels": (320, 640, 1280, 1280), "text": 768, "layers": 2, "pixels": 512, "vae": (128, 256, 512, 512), "groups": 32,
        "heads": 8,
    },
}  # fmt: skip
"""``sd15`` is Stable Diffusion 1.5's configuration; ``quarter`` is its shape at a quarter of its width."""


def build_pipeline(shape: str) -> Any:
    """A Stable Diffusion pipeline of the given shape."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from pipelines.tiny import model

    s = SHAPES[shape]
    levels, vae_levels = len(s["channels"]), len(s["vae"])
    tokenizer = model.build_tokenizer()
    vae = quickly(
        lambda: AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * vae_levels,
            up_block_types=("UpDecoderBlock2D",) * vae_levels,
            block_out_channels=s["vae"],
            layers_per_block=1 if shape == "tiny" else 2,
            latent_channels=4,
            norm_num_groups=8 if s["groups"] == 16 else 32,
            sample_size=s["pixels"],
        )
    )
    unet = quickly(
        lambda: UNet2DConditionModel(
            sample_size=s["pixels"] // 2 ** (vae_levels - 1),
            block_out_channels=s["channels"],
            layers_per_block=s["layers"],
            down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
            cross_attention_dim=s["text"],
            attention_head_dim=s["heads"],
            norm_num_groups=s["groups"],
        )
    )
    return model.assemble(tokenizer, _text_encoder(tokenizer, shape), vae, unet)


def _text_encoder(tokenizer: Any, shape: str) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    end, width, whole = tokenizer.eos_token_id, SHAPES[shape]["text"], shape == "sd15"
    config = CLIPTextConfig(
        vocab_size=49408 if whole else len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=12 if whole else 4,
        num_attention_heads=12 if whole else 4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end,
        pad_token_id=end,
    )
    torch.manual_seed(0)
    return CLIPTextModel(config)


def quickly(make: Callable[[], nn.Module]) -> nn.Module:
    """A network without its own slow initialisation: weights of variance 1 / inputs, so that nothing vanishes or explodes."""
    with torch.device("meta"):
        network = make()
    network = network.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.fill_(float(name.endswith("weight")))
    return network


def write_pairs(folder: Path, pixels: int, count: int) -> Path:
    """A JSONL of pairs drawn from the tiny world, enlarged to the model's size."""
    import numpy as np

    from pipelines.tiny import scenes

    rng, rows = np.random.default_rng(0), []
    for i in range(count):
        scene, caption = scenes.draw_captioned(rng)
        other, _ = scenes.draw_captioned(rng)
        for side, picture in (("w", scene), ("l", other)):
            scenes.render(picture).resize((pixels, pixels)).save(folder / f"{i}{side}.png")
        rows.append({"prompt": caption, "chosen": f"{i}w.png", "rejected": f"{i}l.png"})
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path
