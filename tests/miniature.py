"""An untrained miniature Stable Diffusion on disk, and small things that tests do with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from pipelines.tiny import model as tiny
from pipelines.tiny import scenes

PROMPTS = ["a red circle", "a small blue square on a green background", ""]


def save_untrained(path: Path) -> Path:
    """The miniature with random weights, as Diffusers saves it."""
    torch.manual_seed(0)
    tokenizer = tiny.build_tokenizer()
    tiny.assemble(tokenizer, tiny.build_text_encoder(tokenizer), tiny.build_vae(), tiny.build_unet()).save_pretrained(path)
    return path


def write_pairs(folder: Path, n: int, broken: int = 0) -> Path:
    """A JSONL of ``n`` pairs with pictures beside it; the last ``broken`` winners are no pictures."""
    rng, rows = np.random.default_rng(3), []
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        scene, caption = scenes.draw_captioned(rng)
        scenes.render(scene).save(folder / f"w{i}.png")
        scenes.render(scenes.draw_captioned(rng)[0]).save(folder / f"l{i}.png")
        rows.append({"prompt": caption, "chosen": f"w{i}.png", "rejected": f"l{i}.png"})
    for i in range(n - broken, n):
        (folder / f"w{i}.png").write_bytes(b"not a picture")
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def edited(folder: Path, target: Path, part: str, **changes) -> Path:
    """A copy of a model folder with some fields of one configuration changed."""
    shutil.copytree(folder, target)
    name = {"scheduler": "scheduler_config.json", "": "model_index.json"}.get(part, "config.json")
    file = target / part / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return target


def draw(batch: int = 2, dtype: torch.dtype = torch.float32):
    rng = torch.Generator().manual_seed(1)
    x_t = torch.randn(batch, 4, 16, 16, generator=rng).to(dtype)
    text = torch.randn(batch, tiny.MAX_TOKENS, tiny.WIDTH, generator=rng).to(dtype)
    return x_t, torch.tensor([10, 900])[:batch], {"encoder_hidden_states": text}


def make_adapter_matter(family) -> None:
    """An adapter starts as the identity (B = 0); move it."""
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in family.denoiser.trainable_parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=rng))


def sample(pipe: StableDiffusionPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    out = pipe(
        PROMPTS[:1], num_inference_steps=2, generator=torch.Generator().manual_seed(3), output_type="pt", height=64, width=64
    )
    return torch.as_tensor(out.images)


# The original (LDM) layout has other names for the same tensors.


def original_names(pipe: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    """The pipeline's tensors under the names of the original (LDM) layout."""
    return {
        **{
            "model.diffusion_model."
            + _unet_name(n, len(pipe.unet.config.block_out_channels), pipe.unet.config.layers_per_block): v
            for n, v in pipe.unet.state_dict().items()
        },
        **{
            "first_stage_model." + _vae_name(n, len(pipe.vae.config.block_out_channels)): _as_convolution(n, v)
            for n, v in pipe.vae.state_dict().items()
        },
        **{
            "cond_stage_model.transformer.text_model." + n.removeprefix("text_model."): v
            for n, v in pipe.text_encoder.state_dict().items()
        },
    }


def _renamed(name: str, pairs: dict[str, str]) -> str:
    for new, old in pairs.items():
        name = name.replace(new, old)
    return name


def _unet_name(name: str, levels: int, layers: int) -> str:
    resnet = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    head, *rest = name.split(".")
    if head in ("down_blocks", "up_blocks"):
        level, kind, number = int(rest[0]), rest[1], int(rest[2])
        tail = ".".join(rest[3:])
        if head == "down_blocks":
            block = f"input_blocks.{1 + level * (layers + 1) + (layers if kind == 'downsamplers' else number)}"
            place = {"resnets": 0, "attentions": 1, "downsamplers": 0}[kind]
            tail = tail.replace("conv.", "op.") if kind == "downsamplers" else tail
        else:
            block = f"output_blocks.{level * (layers + 1) + (layers if kind == 'upsamplers' else number)}"
            has_attention = level > 0 if levels == 4 else level < levels - 1
            place = {"resnets": 0, "attentions": 1, "upsamplers": 2 if has_attention else 1}[kind]
        return f"{block}.{place}.{_renamed(tail, resnet) if kind == 'resnets' else tail}"
    if head == "mid_block":
        place = {("resnets", "0"): 0, ("attentions", "0"): 1, ("resnets", "1"): 2}[(rest[0], rest[1])]
        tail = ".".join(rest[2:])
        return f"middle_block.{place}.{_renamed(tail, resnet) if rest[0] == 'resnets' else tail}"
    return _renamed(
        name,
        {
            "time_embedding.linear_1": "time_embed.0",
            "time_embedding.linear_2": "time_embed.2",
            "conv_in": "input_blocks.0.0",
            "conv_norm_out": "out.0",
            "conv_out": "out.2",
        },
    )


def _vae_name(name: str, levels: int) -> str:
    parts = name.split(".")
    if "up_blocks" in parts:
        i = parts.index("up_blocks")
        parts[i : i + 2] = ["up", str(levels - 1 - int(parts[i + 1]))]
    elif "down_blocks" in parts:
        parts[parts.index("down_blocks")] = "down"
    name = ".".join(parts)
    name = _renamed(
        name, {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1"}
    )
    name = _renamed(
        name,
        {
            "resnets": "block",
            "downsamplers.0": "downsample",
            "upsamplers.0": "upsample",
            "conv_norm_out": "norm_out",
            "conv_shortcut": "nin_shortcut",
        },
    )
    return _renamed(name, {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"})


def _as_convolution(name: str, value: torch.Tensor) -> torch.Tensor:
    return value[:, :, None, None] if "attentions" in name and value.ndim == 2 else value
