"""LoRAs in the layouts that other programs read: kohya's (A1111, Forge, ComfyUI) and ComfyUI's own.

kohya     ``lora_unet_`` and the layer's name with underscores. SD 1.x and 2.x by Diffusers' names, everything else by the
          names of the original network (SDXL ``input_blocks_4_1_...``, SD3 ``joint_blocks_0_x_block_attn_qkv``, FLUX
          ``double_blocks_0_img_attn_qkv``). Text encoders ``lora_te_``, or ``lora_te1_`` and ``lora_te2_``.
comfyui   ``diffusion_model.`` and the original name with dots; ``text_encoders.clip_l.transformer.`` for text encoders.
          Z-Image by Diffusers' names, as all its trainers write it: q, k and v stay apart, and Diffusers reads the file as well.
          (ComfyUI maps those; of kohya's layout it knows fused names, Diffusers others, so there is none for Z-Image.)

Both have ``.lora_down.weight`` [r, in], ``.lora_up.weight`` [out, r] and ``.alpha`` for each layer: the change is
alpha / r · up · down. Where the original fuses n projections (q, k, v), their LoRAs become one of rank n · r: the downs one
above the other, the ups block-diagonal, and alpha n times as large, so that alpha / r stays.

Sources of the names: kohya-ss/sd-scripts (``networks/lora.py``, ``lora_sd3.py``, ``lora_flux.py``), ComfyUI (``comfy/lora.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffalign.errors import UserError
from pipelines.low_rank import Layers, Lora, LowRank
from pipelines.original_names import Place, places

LAYOUTS = ("kohya", "comfyui")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
_DOWNS, _UPS = (DOWN, ".lora_A.weight"), (UP, ".lora_B.weight")

Parts = Mapping[str, nn.Module]
"""The networks that a LoRA may change, by the pipeline's component."""


@dataclass(frozen=True)
class Slot:
    """A layer, and its place under a name in a file."""

    component: str
    layer: str
    place: Place


def network_of(parts: Parts) -> str:
    """The component that is the denoiser."""
    return next(name for name in parts if name not in TEXT_ENCODERS)


def is_sdxl(network: nn.Module) -> bool:
    """Whether a UNet is SDXL's: conditioned on sizes and a pooled text."""
    return getattr(network.config, "addition_embed_type", None) == "text_time"


def layouts_of(network: nn.Module) -> tuple[str, ...]:
    """The layouts that other programs read LoRAs of this network in, if there are any at all (``places`` knows)."""
    return ("comfyui",) if _by_diffusers_names(network) else LAYOUTS


def _by_diffusers_names(network: nn.Module) -> bool:
    return type(network).__name__ == "ZImageTransformer2DModel"


def slots(parts: Parts, layout: str) -> dict[str, list[Slot]]:
    """Every name that a file in this layout may have for these networks, with the layers that stand there, in order.

    Raises:
        UserError: networks of this class have no such layout.
    """
    network = network_of(parts)
    if layout not in layouts_of(parts[network]):
        raise UserError(
            f"LoRAs of a {type(parts[network]).__name__} have no layout of {layout}'s; take --to comfyui or diffusers."
        )
    out: dict[str, list[Slot]] = {}
    for layer, place in _places(parts[network]).items():
        out.setdefault(_network_name(layout, parts[network], layer, place), []).append(Slot(network, layer, place))
    for component in (c for c in TEXT_ENCODERS if c in parts and type(parts[c]).__name__.startswith("CLIP")):
        for layer, module in parts[component].named_modules():
            if isinstance(module, nn.Linear):
                name = _text_name(layout, parts, component, layer)
                out[name] = [Slot(component, layer, Place(name))]
    return {name: sorted(found, key=lambda slot: slot.place.part) for name, found in out.items()}


def _places(network: nn.Module) -> dict[str, Place]:
    if not _by_diffusers_names(network):
        return places(network)
    return {name: Place(name) for name, module in network.named_modules() if isinstance(module, nn.Linear)}


def _network_name(layout: str, network: nn.Module, layer: str, place: Place) -> str:
    if layout == "comfyui":
        return f"diffusion_model.{place.name}"
    by_diffusers = type(network).__name__ == "UNet2DConditionModel" and not is_sdxl(network)
    return "lora_unet_" + (layer if by_diffusers else place.name).replace(".", "_")


def _text_name(layout: str, parts: Parts, component: str, layer: str) -> str:
    """CLIP's layers by the names that Transformers gave them for most of its life, with ``text_model`` in front."""
    whole = layer if layer.startswith("text_") else f"text_model.{layer}"
    if layout == "comfyui":
        clip = "clip_h" if _is_sd2(parts) else {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}[component]
        return f"text_encoders.{clip}.transformer.{whole}"
    single = type(parts[network_of(parts)]).__name__ == "UNet2DConditionModel" and "text_encoder_2" not in parts
    prefix = "lora_te_" if single else {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[component]
    return prefix + whole.replace(".", "_")


def _is_sd2(parts: Parts) -> bool:
    """Whether a UNet is that of SD 2.x, which other programs recognise by the width of its text conditioning."""
    return getattr(parts[network_of(parts)].config, "cross_attention_dim", None) == 1024


# -------------------------------------------------------------------------------------------------------------- writing


def written(lora: Lora, parts: Parts, layout: str) -> dict[str, Tensor]:
    """The tensors of a file in ``layout``.

    Raises:
        UserError: networks of this class have no such layout.
    """
    out: dict[str, Tensor] = {}
    for name, found in slots(parts, layout).items():
        present = [(s.place, lora[s.component][s.layer]) for s in found if s.layer in lora.get(s.component, {})]
        if present:
            layer = _fused(present, _height(parts, found)) if found[0].place.of > 1 else _alone(*present[0])
            alpha = torch.tensor(layer.alpha, dtype=torch.float32)
            out |= {name + DOWN: layer.down.contiguous(), name + UP: layer.up.contiguous(), name + ALPHA: alpha}
    return out


def _height(parts: Parts, found: list[Slot]) -> int:
    return max(slot.place.rows[1] for slot in found)


def _alone(place: Place, layer: LowRank) -> LowRank:
    """Readers turn the halves back but forget alpha there (Diffusers' of FLUX, for one): the scale goes into the up matrix."""
    return LowRank(layer.down, _turned(layer.up * layer.scale), 1.0) if place.swapped else layer


def _turned(up: Tensor) -> Tensor:
    """The halves of the outputs the other way round; twice is as it was."""
    return torch.cat(up.chunk(2)[::-1])


def _fused(present: list[tuple[Place, LowRank]], height: int) -> LowRank:
    """One LoRA of the fused layer; rows of projections without a LoRA stay zero."""
    scales = {layer.scale for _, layer in present}
    scale = scales.pop() if len(scales) == 1 else None
    up = present[0][1].up.new_zeros(height, sum(layer.rank for _, layer in present))
    column = 0
    for place, layer in present:
        up[slice(*place.rows), column : column + layer.rank] = layer.up if scale is not None else layer.up * layer.scale
        column += layer.rank
    return LowRank(torch.cat([layer.down for _, layer in present]), up, 1.0 if scale is None else scale)


# -------------------------------------------------------------------------------------------------------------- reading


def parsed(tensors: Mapping[str, Tensor], parts: Parts) -> Lora | None:
    """The LoRA in the tensors of a file, or None if a name in it belongs to neither layout.

    Raises:
        UserError: networks of this class have no such layout.
    """
    for layout in layouts_of(parts[network_of(parts)]):
        known = slots(parts, layout)
        names = {_stem(key) for key in tensors}
        if names and names <= known.keys() and all(_whole(tensors, name) for name in names):
            return _by_component((slot, _read(tensors, name, slot.place)) for name in sorted(names) for slot in known[name])
    return None


def _stem(key: str) -> str | None:
    return next((key.removesuffix(end) for end in (*_DOWNS, *_UPS, ALPHA) if key.endswith(end)), None)


def _whole(tensors: Mapping[str, Tensor], name: str) -> bool:
    return all(any(name + end in tensors for end in ends) for ends in (_DOWNS, _UPS))


def _read(tensors: Mapping[str, Tensor], name: str, place: Place) -> LowRank:
    """The LoRA of one layer; from a fused layer, its own rows of the up matrix and all of the down matrix."""
    down = next(tensors[name + end] for end in _DOWNS if name + end in tensors).float()
    up = next(tensors[name + end] for end in _UPS if name + end in tensors).float()
    alpha = float(tensors[name + ALPHA]) if name + ALPHA in tensors else down.shape[0]
    if place.rows:
        up = up[slice(*place.rows)].contiguous()
    return LowRank(down, _turned(up) if place.swapped else up, alpha / down.shape[0])


def _by_component(found: Iterator[tuple[Slot, LowRank]]) -> dict[str, Layers]:
    out: dict[str, dict[str, LowRank]] = {}
    for slot, layer in found:
        out.setdefault(slot.component, {})[slot.layer] = layer
    return out
