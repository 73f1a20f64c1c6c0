"""A whole pipeline of SD 1.x, 2.x or XL in one file, in the layout that their authors published it in.

``model.diffusion_model.`` UNet; ``first_stage_model.`` autoencoder; text encoders ``cond_stage_model.transformer.`` (OpenAI's
CLIP, SD 1.x), ``cond_stage_model.model.`` (OpenCLIP, SD 2.x), ``conditioner.embedders.0.transformer.`` and
``conditioner.embedders.1.model.`` (both, SDXL).

Sources of the names: CompVis/stable-diffusion, Stability-AI/stablediffusion and generative-models, mlfoundations/open_clip.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import UserError
from pipelines.families._marks import ENDS_IN_NOISE, V_PREDICTION
from pipelines.lora_layouts import is_sdxl
from pipelines.original_names import unet_name

UNET, VAE = "model.diffusion_model.", "first_stage_model."
FIRST_TEXT, OPEN_TEXT = "cond_stage_model.transformer.", "cond_stage_model.model."
XL_FIRST, XL_SECOND = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."


def tensors(pipe: Any) -> dict[str, Tensor]:
    """Every tensor of the pipeline by its name in one file.

    Raises:
        UserError: the pipeline is of another family.
    """
    network = getattr(pipe, "unet", None)
    if type(network).__name__ != "UNet2DConditionModel":
        raise UserError(
            "A single file in the original layout is written for Stable Diffusion 1.x, 2.x and XL; this is a "
            f"{type(pipe).__name__}. Export the whole pipeline instead: --to diffusers --merge."
        )
    return {
        **{UNET + unet_name(name, network.config): value for name, value in network.state_dict().items()},
        **{VAE + vae_name(name, pipe.vae.config): _as_convolution(name, value) for name, value in pipe.vae.state_dict().items()},
        **_marks(pipe, network),
        **dict(_texts(pipe, is_sdxl(network), network.config.cross_attention_dim == 1024)),
    }


def _marks(pipe: Any, network: Any) -> dict[str, Tensor]:
    """Marker tensors by which ComfyUI and others recognise v prediction and zero terminal SNR in an SDXL."""
    if not is_sdxl(network) or (settings := pipe.scheduler.config).get("prediction_type") != "v_prediction":
        return {}
    marks = [V_PREDICTION] + ([ENDS_IN_NOISE] if settings.get("rescale_betas_zero_snr") else [])
    return {name: torch.tensor([]) for name in marks}


def _texts(pipe: Any, xl: bool, sd2: bool) -> Iterator[tuple[str, Tensor]]:
    first = pipe.text_encoder.state_dict()
    if xl:
        yield from _prefixed(XL_FIRST, _clip(first))
        yield from _prefixed(XL_SECOND, _open_clip(pipe.text_encoder_2.state_dict()))
    elif sd2:
        yield from _prefixed(OPEN_TEXT, _open_clip(first))
    else:
        yield from _prefixed(FIRST_TEXT, _clip(first))


def _prefixed(prefix: str, named: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((prefix + name, value) for name, value in named.items())


# ---------------------------------------------------------------------------------------------------------- autoencoder

_VAE = {
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.": "mid.attn_1.",
    "downsamplers.0.": "downsample.",
    "upsamplers.0.": "upsample.",
    "resnets.": "block.",
    "conv_norm_out.": "norm_out.",
    "conv_shortcut.": "nin_shortcut.",
    "group_norm.": "norm.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "proj_out.",
}


def vae_name(name: str, config: Mapping[str, Any]) -> str:
    """The original name of a tensor of ``AutoencoderKL``. The original counts the decoder's levels from the finest one."""
    levels = len(config["block_out_channels"])
    name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{levels - 1 - int(found[1])}", name).replace("down_blocks.", "down.")
    for ours, theirs in _VAE.items():
        name = name.replace(ours, theirs)
    return name


def _as_convolution(name: str, value: Tensor) -> Tensor:
    """The original's attention has 1 x 1 convolutions where Diffusers has linear layers."""
    return value[:, :, None, None] if "attentions" in name and value.ndim == 2 else value


# -------------------------------------------------------------------------------------------------------- text encoders

_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.",
}
_IN_PROJECTION = re.compile(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)")


def _clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's CLIP as Transformers had it when the layout was fixed: everything inside ``text_model``."""
    return {
        f"text_model.{name.removeprefix('text_model.')}": value for name, value in state.items() if "position_ids" not in name
    }


def _open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's own names: q, k and v in one matrix, the projection transposed."""
    out, projections = {}, {}
    for full, value in state.items():
        name = full.removeprefix("text_model.")
        if found := _IN_PROJECTION.fullmatch(name):
            projections[found.groups()] = value
        elif name == "text_projection.weight":
            out["text_projection"] = value.T
        elif "position_ids" not in name:
            for ours, theirs in _OPEN_CLIP.items():
                name = name.replace(ours, theirs)
            out[name] = value
    for layer, kind in sorted({(layer, kind) for layer, _, kind in projections}):
        joined = torch.cat([projections[layer, which, kind] for which in "qkv"])
        out[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = joined
    return out
