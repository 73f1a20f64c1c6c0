"""A frozen copy of a network that is trained in half precision by autocast: half as large, and the same answers to the bit.

Autocast rounds the weights of linear layers and convolutions at every call; the copy has them rounded once. Everything else stays
as wide as the trained network has it: norms, embeddings, tables, weights that are shared with these, and the first layer, whose
type says what a network takes (``_denoiser.working_dtype``). Were all of it rounded, policy and reference would differ before the
first step, by a margin of about 1 at the betas of Diffusion-DPO.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

_ROUNDED_BY_AUTOCAST = (nn.Linear, _ConvNd, Conv1D)
"""Layers whose weights and biases autocast takes in half precision; Conv1D is GPT-2's linear layer."""


def frozen_copy(network: nn.Module, half: torch.dtype | None = None, everything: bool = False) -> nn.Module:
    """A copy in evaluation mode without gradients, to be called under autocast if ``half`` is given.

    Args:
        half: the type that autocast computes in, float16 or bfloat16; None or float32 for a plain copy.
        everything: round all weights but the first layer's, as shares of sharded weights are gathered (``devices.shard``).
    """
    known: dict[int, nn.Parameter] = {}  # what deepcopy takes as copied already
    rounded = set() if half in (None, torch.float32) else _rounded(network, everything)
    for parameter in network.parameters():
        dtype = half if id(parameter) in rounded else parameter.dtype
        known[id(parameter)] = nn.Parameter(parameter.detach().to(dtype, copy=True), requires_grad=False)
    return copy.deepcopy(network, known).eval()


def _rounded(network: nn.Module, everything: bool) -> set[int]:
    """The ids of parameters that are rounded: used by such layers, and by no other module."""
    first, of_layers, of_others = id(next(network.parameters())), set(), set()
    for module in network.modules():
        own = {id(parameter) for parameter in module.parameters(recurse=False)}
        rounded = (everything or isinstance(module, _ROUNDED_BY_AUTOCAST)) and first not in own
        (of_layers if rounded else of_others).update(own)
    return of_layers - of_others
