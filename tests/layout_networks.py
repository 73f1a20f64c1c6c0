"""Networks of every layout: in miniature with random weights, and of the real configurations without any."""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel, ZImageTransformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from pipelines.low_rank import LowRank

SD_DOWN = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
SD_UP = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time",
    "use_linear_projection": True,
}


def text_config(width: int, layers: int, **changes) -> CLIPTextConfig:
    return CLIPTextConfig(
        **{
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "projection_dim": width,
            **changes,
        }
    )


def sd1(**changes) -> UNet2DConditionModel:
    """SD 1.x's blocks, four levels with two resnets each."""
    small = {"block_out_channels": (8, 16, 16, 16), "norm_num_groups": 4, "attention_head_dim": 4, "sample_size": 16}
    return UNet2DConditionModel(
        **{"down_block_types": SD_DOWN, "up_block_types": SD_UP, "cross_attention_dim": 32, **small, **changes}
    )


def sdxl() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **XL,
        block_out_channels=(8, 16, 32),
        norm_num_groups=4,
        attention_head_dim=(1, 2, 4),
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=64,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        sample_size=16,
    )


def sd3(**changes) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        **{
            "num_layers": 3,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "joint_attention_dim": 32,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 24,
            "sample_size": 8,
            "pos_embed_max_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            **changes,
        }
    )


def flux(**changes) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        **{
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "in_channels": 4,
            "axes_dims_rope": (4, 4, 8),
            "guidance_embeds": True,
            **changes,
        }
    )


def real(name: str) -> dict[str, nn.Module]:
    """The published configurations, on the meta device."""
    with torch.device("meta"):
        return _REAL[name]()


_REAL = {
    "sd15": lambda: {
        "unet": sd1(block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, norm_num_groups=32, attention_head_dim=8),
        "text_encoder": CLIPTextModel(text_config(768, 12, intermediate_size=3072, num_attention_heads=12)),
    },
    "sd21": lambda: {
        "unet": sd1(
            block_out_channels=(320, 640, 1280, 1280),
            cross_attention_dim=1024,
            norm_num_groups=32,
            attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True,
        ),
        "text_encoder": CLIPTextModel(text_config(1024, 23, intermediate_size=4096, num_attention_heads=16, hidden_act="gelu")),
    },
    "sdxl": lambda: {
        "unet": UNet2DConditionModel(
            **XL,
            block_out_channels=(320, 640, 1280),
            attention_head_dim=(5, 10, 20),
            transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=2048,
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            sample_size=128,
        ),
        "text_encoder": CLIPTextModel(text_config(768, 12, intermediate_size=3072, num_attention_heads=12)),
        "text_encoder_2": CLIPTextModelWithProjection(
            text_config(1280, 32, intermediate_size=5120, num_attention_heads=20, projection_dim=1280, hidden_act="gelu")
        ),
    },
    "sd3": lambda: {
        "transformer": SD3Transformer2DModel(
            sample_size=128,
            num_layers=24,
            num_attention_heads=24,
            caption_projection_dim=1536,
            out_channels=16,
            pos_embed_max_size=192,
        )
    },
    "flux": lambda: {"transformer": FluxTransformer2DModel(guidance_embeds=True)},
    "z_image": lambda: {"transformer": ZImageTransformer2DModel()},
}


def random_layers(network: nn.Module, keep=lambda name: True, rank: int = 3, alpha: float = 7.0, seed: int = 0) -> dict:
    """A LoRA on every linear and convolution layer whose name ``keep`` accepts."""
    rng = torch.Generator().manual_seed(seed)
    out = {}
    for name, module in network.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and keep(name):
            shape = tuple(module.weight.shape)
            down = torch.randn(rank, *shape[1:], generator=rng) / max(module.weight[0].numel(), 1) ** 0.5
            up = torch.randn(shape[0], rank, *(1,) * (len(shape) - 2), generator=rng) * 0.2
            out[name] = LowRank(down, up, alpha / rank)
    return out


def attached(network: nn.Module, layers: dict, rank: int = 3, alpha: float = 7.0) -> nn.Module:
    """The network with the LoRA as PEFT attaches it."""
    from peft import LoraConfig

    network.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(layers)))
    modules = dict(network.named_modules())
    with torch.no_grad():
        for name, layer in layers.items():
            modules[name].lora_A.default.weight.copy_(layer.down)
            modules[name].lora_B.default.weight.copy_(layer.up)
    return network


@torch.no_grad()
def answer(network: nn.Module) -> torch.Tensor:
    """What the network says to one fixed input."""
    rng = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng)

    config, t = network.config, torch.tensor([300.0])
    if isinstance(network, UNet2DConditionModel):
        added = None
        if config.addition_embed_type:
            added = {"text_embeds": draw(1, 32), "time_ids": torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]])}
        return network(draw(1, 4, 16, 16), t, draw(1, 5, config.cross_attention_dim), added_cond_kwargs=added).sample
    if isinstance(network, SD3Transformer2DModel):
        return network(draw(1, 4, 16, 16), draw(1, 5, 32), draw(1, config.pooled_projection_dim), t).sample
    return network(
        draw(1, 16, 4),
        draw(1, 5, 32),
        draw(1, config.pooled_projection_dim),
        t / 1000,
        img_ids=torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        txt_ids=torch.zeros(5, 3),
        guidance=torch.tensor([3.5]),
    ).sample
