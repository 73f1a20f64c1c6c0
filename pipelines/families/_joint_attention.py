"""SD3's joint attention for text that ends in tokens which are all alike.

Without its T5, SD3 puts 256 zeros behind a caption. They have no places of their own, so they stay alike in every layer, and n
keys that are alike are one key whose logit is larger by log n: the network can be shown fewer of them, and answers the same.

``KEPT`` are shown, because log n in bfloat16 would be one n that is 1.4 % too small: the second takes what the first leaves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional as F

KEPT = 2
WORTH = 4
"""Fewer are shown where they would be more than one for this many tokens of the picture, which is below 512 pixels: a bias in
attention costs something, too."""


def with_few_zeros(states: Tensor, zeros: int, places: int) -> dict[str, Any]:
    """Arguments with the text for a transformer whose attention is ``JointAttention``.

    Args:
        states: [B, L, D], the last ``zeros`` of the L zeros.
        places: tokens of the picture.
    """
    if WORTH * zeros <= places:
        return {"encoder_hidden_states": states}
    return {"encoder_hidden_states": states[:, : KEPT - zeros], "joint_attention_kwargs": {"alike": zeros}}


@contextmanager
def few_zeros_while_sampling(transformer: nn.Module, zeros: int) -> Iterator[None]:
    """A block in which a pipeline without T5 samples with few zeros. Other attention processors stay as they are."""
    before = transformer.attn_processors
    if any(type(one) not in (JointAttnProcessor2_0, JointAttention) for one in before.values()):
        yield
        return

    def shorten(_: nn.Module, given: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        height, width = options["hidden_states"].shape[-2:]
        places = height * width // transformer.config.patch_size**2
        told = with_few_zeros(options["encoder_hidden_states"], zeros, places)
        more = {**(options.get("joint_attention_kwargs") or {}), **told.get("joint_attention_kwargs", {})}
        return given, {**options, **told, "joint_attention_kwargs": more or None}

    transformer.set_attn_processor(JointAttention())
    handle = transformer.register_forward_pre_hook(shorten, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        transformer.set_attn_processor(before)


class JointAttention:
    """Diffusers' ``JointAttnProcessor2_0`` with one option more, which comes by ``joint_attention_kwargs={"alike": n}``.

    ``float32`` attends in that precision: in bfloat16 the way back through a CPU's attention takes five times as long.
    """

    def __init__(self, float32: bool = False) -> None:
        self.float32 = float32

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        alike: int = 0,
        **_: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """States of the picture [B, N, D] and of the text [B, L, D], whose last ``KEPT`` tokens count as ``alike``, if given."""
        x, c, heads = hidden_states, encoder_hidden_states, attn.heads
        q, k, v = _split(heads, attn.to_q(x), attn.to_k(x), attn.to_v(x), attn.norm_q, attn.norm_k)
        if c is None:
            return attn.to_out[1](attn.to_out[0](self._attended(q, k, v, 0).to(x.dtype)))
        added = _split(heads, attn.add_q_proj(c), attn.add_k_proj(c), attn.add_v_proj(c), attn.norm_added_q, attn.norm_added_k)
        q, k, v = (torch.cat(both, dim=2) for both in zip((q, k, v), added, strict=True))
        out = self._attended(q, k, v, alike).to(x.dtype)
        of_x, of_c = out[:, : x.shape[1]], out[:, x.shape[1] :]
        return attn.to_out[1](attn.to_out[0](of_x)), of_c if attn.context_pre_only else attn.to_add_out(of_c)

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, alike: int) -> Tensor:
        dtype = torch.float32 if self.float32 else v.dtype  # a norm with float32 weights leaves q and k in float32
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        bias = None
        if alike:
            bias = q.new_zeros(k.shape[2])
            bias[-2], bias[-1] = logits_of(alike)
            bias = bias.expand(q.shape[2], -1)
        with torch.autocast(q.device.type, enabled=False):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return out.transpose(1, 2).flatten(2)


def _split(heads: int, q: Tensor, k: Tensor, v: Tensor, norm_q: Any, norm_k: Any) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, D] as [B, heads, N, D / heads], queries and keys normed where the network does."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return (norm_q(q) if norm_q else q), (norm_k(k) if norm_k else k), v


def logits_of(count: int) -> tuple[float, float]:
    """Logits of ``KEPT`` tokens that weigh as ``count`` together; the first is exact in bfloat16."""
    first = (math.ceil(32 * math.log(count)) - 1) / 32
    return first, math.log(count - math.exp(first))
