"""LoRAs by the layers they change, whatever file they came from: joined, scaled, merged.

A layer's weight W [out, in] (or [out, in, kh, kw]) becomes W + scale · up · down, with down [r, in] (or [r, in, kh, kw]) and
up [out, r] (or [out, r, 1, 1]), all float32. What files call alpha is scale · r (Hu et al. 2021, arXiv 2106.09685, section 4.1).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diffalign.errors import UserError


@dataclass(frozen=True)
class LowRank:
    """The change of one layer."""

    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def alpha(self) -> float:
        return self.scale * self.rank

    def delta(self) -> Tensor:
        """The update of the layer's weight, in its shape."""
        flat = self.up.flatten(1).float() @ self.down.flatten(1).float()
        return self.scale * flat.reshape(self.up.shape[0], *self.down.shape[1:])


Layers = Mapping[str, LowRank]
"""Low-rank updates by the layers' names inside one network, as in Diffusers (or Transformers)."""
Lora = Mapping[str, Layers]
"""Layers by the pipeline's component: ``unet`` or ``transformer``, and text encoders where a LoRA changes them."""


def digest(lora: Lora) -> str:
    """sha256 over everything that decides what a LoRA does."""
    sha = hashlib.sha256()
    for component in sorted(lora):
        for name, layer in sorted(lora[component].items()):
            sha.update(f"{component}.{name} {layer.scale!r} {tuple(layer.down.shape)} {tuple(layer.up.shape)}\n".encode())
            for tensor in (layer.down, layer.up):
                sha.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return sha.hexdigest()


def scaled(lora: Lora, factor: float) -> Lora:
    """The same LoRA, ``factor`` times as strong."""
    return {c: {n: replace(x, scale=x.scale * factor) for n, x in layers.items()} for c, layers in lora.items()}


def with_one_alpha(lora: Lora) -> Lora:
    """The same LoRA with the alpha of most layers in all of them; the difference goes into the up matrices.

    Diffusers loses alphas that differ from layer to layer when it reads kohya's names of a UNet's attention.
    """
    found = [layer.alpha for layers in lora.values() for layer in layers.values()]
    alpha = max(sorted(set(found)), key=found.count)
    return {c: {n: _with_alpha(layer, alpha) for n, layer in layers.items()} for c, layers in lora.items()}


def _with_alpha(layer: LowRank, alpha: float) -> LowRank:
    return layer if layer.alpha == alpha else LowRank(layer.down, layer.up * (layer.alpha / alpha), alpha / layer.rank)


def joined(first: Lora, second: Lora) -> Lora:
    """One LoRA that does what both do: ranks add up, and the sum of the products is one product of concatenations."""
    out = {}
    for component in first.keys() | second.keys():
        one, two = first.get(component, {}), second.get(component, {})
        out[component] = {n: _concatenated([x[n] for x in (one, two) if n in x]) for n in sorted(one.keys() | two.keys())}
    return out


def _concatenated(parts: list[LowRank]) -> LowRank:
    """Scales differ from part to part, so they go into the up matrices."""
    if len(parts) == 1:
        return parts[0]
    return LowRank(torch.cat([p.down for p in parts]), torch.cat([p.up * p.scale for p in parts], dim=1), 1.0)


@torch.no_grad()
def merge(layers: Layers, network: nn.Module, called: str) -> None:
    """Add the changes to the weights of ``network``, layer by layer in float32; a weight keeps its dtype.

    Raises:
        UserError: the LoRA ``called`` so is of another network, or the weights are quantised.
    """
    modules = dict(network.named_modules())
    for name, layer in layers.items():
        weight = getattr(modules.get(name), "weight", None)
        if weight is None or not torch.is_floating_point(weight):
            there = "no such layer" if weight is None else f"its weights there are {weight.dtype}"
            raise UserError(f"The LoRA {called} changes the layer {name} of the {type(network).__name__}, but {there}.")
        delta = layer.delta()
        if delta.shape != weight.shape:
            raise UserError(
                f"The LoRA {called} is of another model: its change of {name} has the shape {tuple(delta.shape)}, "
                f"and the layer has {tuple(weight.shape)}."
            )
        weight.copy_((weight.float() + delta.to(weight.device)).to(weight.dtype))
