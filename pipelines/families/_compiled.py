"""torch.compile, block by block: what repeats is compiled once for all of its kind, in seconds rather than minutes.

A block is called in two ways, with its adapter and a graph (the policy) and without either (the reference); each has a compiled
graph of its own, and both stay: nothing about the network changes from one to the other but a flag in the layers (``_lora``).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

RESNETS = ("ResnetBlock2D",)
"""Blocks of UNets that Diffusers does not list among the repeated ones; half of SD1.5's time is theirs."""
GRAPHS = 64
"""Compiled graphs of one kind of block: a UNet's have four sizes, each called in several ways. PyTorch gives up after eight."""


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks that a network is made of, outermost ones, in its order; empty if it does not say."""
    named = {*getattr(network, "_repeated_blocks", ()), *(getattr(network, "_no_split_modules", None) or ()), *RESNETS}
    counts = Counter(type(module).__name__ for module in network.modules())
    kinds = {name for name in named if counts[name] > 1 and not _holds_blocks(network, name, named)}
    return [module for module in network.modules() if type(module).__name__ in kinds]


def _holds_blocks(network: nn.Module, name: str, named: set[str]) -> bool:
    """Whether modules of this kind are made of other kinds that are named, as a UNet's levels are."""
    of_kind = (module for module in network.modules() if type(module).__name__ == name)
    return any(type(inner).__name__ in named - {name} for module in of_kind for inner in module.modules())


def compile_blocks(network: nn.Module, **options: Any) -> int:
    """Have ``torch.compile(**options)`` take every repeated block of ``network`` from now on; how many they are.

    Raises:
        ValueError: the network does not say what it is made of.
    """
    import torch._dynamo

    blocks = repeated_blocks(network)
    if not blocks:
        raise ValueError(f"{type(network).__name__} does not say which of its blocks repeat")
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    torch._dynamo.config.optimize_ddp = False  # it would cut blocks where DDP's buckets end; between blocks is often enough
    for block in blocks:
        block.compile(**options)
    return len(blocks)
