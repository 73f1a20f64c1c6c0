"""LoRAs in PEFT: reading one off a network that carries it, and writing its tensors and configuration."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import UserError
from pipelines.families._quiet import quietly
from pipelines.low_rank import Layers, LowRank


def layers_of(network: nn.Module, called: str) -> Layers:
    """The update that the one adapter of ``network`` makes to each layer, by the layer's name.

    Raises:
        UserError: the adapter ``called`` so is more than a plain LoRA.
    """
    from peft.tuners.lora import LoraLayer

    return {name: _layer(called, name, module) for name, module in network.named_modules() if isinstance(module, LoraLayer)}


def _layer(called: str, name: str, module: Any) -> LowRank:
    (adapter,) = module.r
    if kind := _more_than_lora(module, adapter):
        raise UserError(f"{called} is more than a plain LoRA ({kind}, in {name}), which cannot be used here.")
    down, up = (matrices[adapter].weight.detach().to("cpu", torch.float32) for matrices in (module.lora_A, module.lora_B))
    return LowRank(down, up, float(module.scaling[adapter]))


def _more_than_lora(module: Any, adapter: str) -> str:
    """Description of the part of this layer's update that is not up · down; empty if there is none."""
    if adapter not in module.lora_A:
        return "LoRA of an embedding"
    if module.lora_bias.get(adapter):
        return "a bias"
    variant = type(module.lora_variant[adapter]).__name__ if adapter in module.lora_variant else ""
    return "DoRA" if "dora" in variant.lower() else variant


def weights(layers: Layers) -> dict[str, Tensor]:
    """The tensors of a LoRA by PEFT's names inside the network."""
    downs = {f"{name}.lora_A.weight": layer.down for name, layer in layers.items()}
    return downs | {f"{name}.lora_B.weight": layer.up for name, layer in layers.items()}


def config(layers: Layers, could_match: Collection[str], **more: Any) -> Any:
    """PEFT's configuration of these layers: one rank and alpha, and patterns for layers that have others.

    Args:
        could_match: names of all layers of the network that the targets are not to match by mistake.
        more: other fields of ``LoraConfig``.
    """
    with quietly():
        from peft import LoraConfig

    rank, alpha = most_common(layers)
    ranks = {f"^{name}": layer.rank for name, layer in layers.items() if layer.rank != rank}
    alphas = {f"^{name}": layer.alpha for name, layer in layers.items() if layer.alpha != alpha}
    targets = _targets(set(layers), could_match)
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, rank_pattern=ranks, alpha_pattern=alphas, **more)


def most_common(layers: Layers) -> tuple[int, float]:
    """Rank and alpha of most layers."""
    found = [(layer.rank, layer.alpha) for layer in layers.values()]
    return max(sorted(set(found)), key=found.count)


def _targets(wanted: set[str], could_match: Collection[str]) -> list[str]:
    """Ends of names that match exactly the wanted layers, if there are such; otherwise the whole names."""
    ends = {".".join(name.split(".")[-2:]) if name.split(".")[-1].isdigit() else name.split(".")[-1] for name in wanted}
    matched = {name for name in could_match if any(name == end or name.endswith(f".{end}") for end in ends)}
    return sorted(ends if matched == wanted else wanted)
