"""Names of a Diffusers network's layers in the network that its authors published.

The original networks of SD3 and FLUX fuse projections that Diffusers keeps apart, so a layer's place there is a name and,
where several share it, some of the rows. Where an output is split into scale and shift, Diffusers has the halves the other
way round.

Sources of the names (facts, not code): CompVis/stable-diffusion and Stability-AI/generative-models (UNet, autoencoder, text
encoders), Stability-AI/sd3-ref (``MMDiT``), black-forest-labs/flux (``Flux``); agreed with by Diffusers' converters of single
files and ComfyUI's key maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from diffalign.errors import UserError


@dataclass(frozen=True)
class Place:
    """Place of a layer in the original network."""

    name: str
    part: int = 0  # which of the ``of`` layers that are fused there
    of: int = 1
    rows: tuple[int, int] | None = None  # its outputs among those of the fused layer, from and to
    swapped: bool = False  # whether the halves of its outputs are the other way round


def places(network: nn.Module) -> dict[str, Place]:
    """The place of every linear and convolution layer of a network, by Diffusers' name.

    Raises:
        UserError: networks of this class have no original layout that other programs load LoRAs in.
    """
    kind = type(network).__name__
    if kind not in _NETWORKS:
        known = ", ".join(_NETWORKS)
        raise UserError(
            f"There is no established layout of LoRAs for a {kind} outside Diffusers; there is one for {known}. "
            "Export to diffusers, or merge the LoRA into the whole pipeline (--to diffusers --merge)."
        )
    layers = {n: m for n, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    return dict(_with_rows(layers, _NETWORKS[kind](network.config, list(layers))))


def _with_rows(layers: Mapping[str, nn.Module], found: Mapping[str, Place]) -> Iterator[tuple[str, Place]]:
    """Fill in the rows of fused layers: parts follow one another."""
    groups: dict[str, list[str]] = {}
    for name, place in found.items():
        groups.setdefault(place.name, []).append(name)
    for names in groups.values():
        start = 0
        for name in sorted(names, key=lambda n: found[n].part):
            place, size = found[name], layers[name].weight.shape[0]
            rows = (start, start + size) if place.of > 1 else None
            yield name, Place(place.name, place.part, place.of, rows, place.swapped)
            start += size


# ---------------------------------------------------------------------------------------------------------------- UNet

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_name(name: str, config: Mapping[str, Any]) -> str:
    """The original name of a layer, or of a tensor, of ``UNet2DConditionModel`` with this configuration.

    The original numbers its blocks through: with L resnets in each level, level i of the way down begins at input block
    1 + i (L + 1), and level i of the way up at output block i (L + 1).

    Raises:
        UserError: levels of different depth, or a part that the original has not.
    """
    levels = config["layers_per_block"]
    if not isinstance(levels, int):
        raise UserError(f"The original layout has equally many resnets in each level; this UNet has {levels}.")
    head, *rest = name.split(".")
    if head in ("down_blocks", "up_blocks"):
        block = _numbered(head, int(rest[0]), rest[1], int(rest[2]), levels, config)
        return f"{block}.{_inner(rest[1], '.'.join(rest[3:]))}"
    if head == "mid_block":
        place = {("resnets", "0"): 0, ("attentions", "0"): 1, ("resnets", "1"): 2}[rest[0], rest[1]]
        return f"middle_block.{place}.{_inner(rest[0], '.'.join(rest[2:]))}"
    for ours, theirs in _UNET_TOP.items():
        if name == ours or name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    raise UserError(f"The original layout of the UNet has no place for {name}.")


def _numbered(side: str, level: int, kind: str, number: int, depth: int, config: Mapping[str, Any]) -> str:
    """The block of a resnet, an attention or a resampler, and its place there."""
    index = level * (depth + 1) + (depth if kind.endswith("samplers") else number)
    if side == "down_blocks":
        return f"input_blocks.{index + 1}.{1 if kind == 'attentions' else 0}"
    after_attention = 2 if "CrossAttn" in config["up_block_types"][level] else 1
    place = {"resnets": 0, "attentions": 1, "upsamplers": after_attention}[kind]
    return f"output_blocks.{index}.{place}"


def _inner(kind: str, tail: str) -> str:
    if kind == "resnets":
        first, dot, rest = tail.partition(".")
        return f"{_RESNET[first]}{dot}{rest}"
    return "op" + tail.removeprefix("conv") if kind == "downsamplers" else tail


def _unet(config: Mapping[str, Any], names: list[str]) -> dict[str, Place]:
    return {name: Place(unet_name(name, config)) for name in names}


# -------------------------------------------------------------------------------------------------------- transformers

_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")


def _fused(names: tuple[str, ...], place: str) -> dict[str, Place]:
    return {name: Place(place, part, len(names)) for part, name in enumerate(names)}


def _plain(pairs: Mapping[str, str]) -> dict[str, Place]:
    return {name: Place(place) for name, place in pairs.items()}


_SD3_BLOCK = {
    **_fused(_QKV, "x_block.attn.qkv"),
    **_fused(("attn2.to_q", "attn2.to_k", "attn2.to_v"), "x_block.attn2.qkv"),
    **_fused(_ADDED, "context_block.attn.qkv"),
    **_plain(
        {
            "attn.to_out.0": "x_block.attn.proj",
            "attn2.to_out.0": "x_block.attn2.proj",
            "attn.to_add_out": "context_block.attn.proj",
            "norm1.linear": "x_block.adaLN_modulation.1",
            "norm1_context.linear": "context_block.adaLN_modulation.1",
            "ff.net.0.proj": "x_block.mlp.fc1",
            "ff.net.2": "x_block.mlp.fc2",
            "ff_context.net.0.proj": "context_block.mlp.fc1",
            "ff_context.net.2": "context_block.mlp.fc2",
        }
    ),
}
_SD3_TOP = {
    **_plain(
        {
            "pos_embed.proj": "x_embedder.proj",
            "context_embedder": "context_embedder",
            "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
            "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
            "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
            "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
            "proj_out": "final_layer.linear",
        }
    ),
    "norm_out.linear": Place("final_layer.adaLN_modulation.1", swapped=True),
}
_FLUX_DOUBLE = {
    **_fused(_QKV, "img_attn.qkv"),
    **_fused(_ADDED, "txt_attn.qkv"),
    **_plain(
        {
            "attn.to_out.0": "img_attn.proj",
            "attn.to_add_out": "txt_attn.proj",
            "norm1.linear": "img_mod.lin",
            "norm1_context.linear": "txt_mod.lin",
            "ff.net.0.proj": "img_mlp.0",
            "ff.net.2": "img_mlp.2",
            "ff_context.net.0.proj": "txt_mlp.0",
            "ff_context.net.2": "txt_mlp.2",
        }
    ),
}
_FLUX_SINGLE = {
    **_fused((*_QKV, "proj_mlp"), "linear1"),
    **_plain({"proj_out": "linear2", "norm.linear": "modulation.lin"}),
}
_FLUX_TOP = {
    **_plain(
        {
            "x_embedder": "img_in",
            "context_embedder": "txt_in",
            "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
            "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
            "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
            "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
            "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
            "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
            "proj_out": "final_layer.linear",
        }
    ),
    "norm_out.linear": Place("final_layer.adaLN_modulation.1", swapped=True),
}


def _sd3(config: Mapping[str, Any], names: list[str]) -> dict[str, Place]:
    found = _placed(names, _SD3_TOP, {"transformer_blocks": ("joint_blocks", _SD3_BLOCK)})
    last = f"transformer_blocks.{config['num_layers'] - 1}.norm1_context.linear"  # of the block that ends the text's way
    return {name: Place(p.name, p.part, p.of, swapped=p.swapped or name == last) for name, p in found.items()}


def _flux(config: Mapping[str, Any], names: list[str]) -> dict[str, Place]:
    blocks = {
        "transformer_blocks": ("double_blocks", _FLUX_DOUBLE),
        "single_transformer_blocks": ("single_blocks", _FLUX_SINGLE),
    }
    return _placed(names, _FLUX_TOP, blocks)


def _placed(
    names: list[str], top: Mapping[str, Place], blocks: Mapping[str, tuple[str, Mapping[str, Place]]]
) -> dict[str, Place]:
    """Places from tables: of layers at the top, and of those in numbered blocks."""
    out = {}
    for name in names:
        head, _, rest = name.partition(".")
        if head in blocks:
            number, _, tail = rest.partition(".")
            theirs, table = blocks[head]
            place = table[tail]
            out[name] = Place(f"{theirs}.{number}.{place.name}", place.part, place.of)
        else:
            out[name] = top[name]
    return out


_NETWORKS: dict[str, Callable[[Mapping[str, Any], list[str]], dict[str, Place]]] = {
    "UNet2DConditionModel": _unet,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
}
