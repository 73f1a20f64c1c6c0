"""A frozen network in fewer bytes, below a LoRA: linear layers in 8 bits (torchao) or in 4 (bitsandbytes).

int8    one byte a weight, one scale a row; what goes in and comes out stays as it is (torchao's weight-only int8)
nf4     half a byte a weight, in blocks of 64 whose scales are quantised as well (QLoRA: Dettmers et al. 2023, arXiv 2305.14314)

Quantised are the linear layers of the repeated blocks: attention, feed-forward, and those that make scales and shifts of the time
for a norm (adaLN), a quarter of FLUX. In full precision stay the layers before and after the blocks (patches, captions,
time, the last projection), the time's projections of a UNet, every norm and every convolution. What adaLN adds to the error was
measured on the trained miniature (``tiny-flow``): nf4 changes the answer by 5.3 % without it, by 5.7 % with it; int8 by 0.4 %.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.errors import UserError

NONE, INT8, NF4 = "none", "int8", "nf4"
LIBRARIES = {INT8: "torchao", NF4: "bitsandbytes"}
_BLOCK = 64  # weights that share a scale in nf4
_SCALES = 256  # scales that share a scale
_CODES = 4 * (16 + 256 + 1)  # bytes of a layer's two tables and its offset

_IN_A_BLOCK = re.compile(r"(^|\.)[a-z_]+\.\d+\.")
_IN_FULL = re.compile(r"(^|[._])(time|t_embedder|embed|embedder|emb|final)", re.IGNORECASE)


def quantisable(network: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that are quantised, by name."""
    linear = ((name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear))
    return {name: module for name, module in linear if _IN_A_BLOCK.search(name) and not _IN_FULL.search(name)}


def require(kind: str) -> None:
    """Raise UserError if the library for this kind is not installed."""
    if kind == NONE:
        return
    try:
        with _without_chatter():
            importlib.import_module(LIBRARIES[kind])
    except ImportError as error:
        raise UserError(
            f"compute.quantise is {kind}, which needs the package {LIBRARIES[kind]}: pip install 'diffalign[quantise]', "
            "or set it to none."
        ) from error


def quantise(network: nn.Module, kind: str, device: torch.device | str = "cpu") -> None:
    """Quantise a frozen network in place, layer by layer on ``device``; each goes back to where it was.

    Raises:
        UserError: the library is missing, or it has quantised weights already.
    """
    require(kind)
    if is_quantised(network):
        raise UserError(f"The weights are quantised already: leave out compute.quantise (found {kind}).")
    make = {INT8: _int8, NF4: _nf4}[kind]
    network.requires_grad_(False)
    with _without_chatter():
        for name, layer in quantisable(network).items():
            where = layer.weight.device
            parent, _, last = name.rpartition(".")
            setattr(network.get_submodule(parent), last, make(layer, device).to(where))
    network.is_loaded_in_4bit = kind == NF4  # by which PEFT knows such layers


def is_quantised(network: nn.Module) -> bool:
    """Whether some weights are: by ``quantise``, or in the file that they were read from."""
    return any(not parameter.is_floating_point() or hasattr(parameter, "qdata") for parameter in network.parameters())


def keep_from_exchange(network: nn.Module) -> None:
    """Let several processes not send each other int8 weights: torchao's tensors cannot be, and all have read the same ones.

    Call when layers have their last names, with an adapter around them.
    """
    names = [name for name, parameter in network.named_parameters() if hasattr(parameter, "qdata")]
    if names:
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, names)


def quantised_bytes(network: nn.Module, kind: str) -> int:
    """Bytes that ``quantise`` would leave of a network, with parameters and buffers; shapes are enough, nothing is loaded."""
    total = sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers()))
    if kind == NONE:
        return total
    weights = [layer.weight for layer in quantisable(network).values()]
    return total - sum(w.numel() * w.element_size() for w in weights) + sum(_bytes(w, kind) for w in weights)


def held_bytes(network: nn.Module) -> int:
    """Bytes of a network's parameters and buffers, the scales of quantised ones among them."""
    return sum(_held(tensor) for tensor in (*network.parameters(), *network.buffers()))


def _bytes(weight: Tensor, kind: str) -> int:
    if kind == INT8:
        return weight.numel() + weight.shape[0] * (4 + 1)  # a scale in float32 and a zero point in int8
    blocks = -(-weight.numel() // _BLOCK)
    return -(-weight.numel() // 2) + blocks + 4 * -(-blocks // _SCALES) + _CODES


def _held(tensor: Tensor) -> int:
    parts = [tensor]
    if hasattr(tensor, "qdata"):
        parts = [part for part in (tensor.qdata, tensor.scale, tensor.zero_point) if part is not None]
    elif getattr(tensor, "quant_state", None) is not None:
        state = tensor.quant_state
        parts += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return sum(part.numel() * part.element_size() for part in parts)


# ---------------------------------------------------------------------------------------------------------------- layers


def _int8(layer: nn.Linear, device: torch.device | str) -> nn.Linear:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    out = _Frozen(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    out.weight, out.bias = layer.weight, layer.bias
    out.to(device)
    quantize_(out, Int8WeightOnlyConfig())
    return out.train(layer.training)


def _nf4(layer: nn.Linear, device: torch.device | str) -> nn.Linear:
    from bitsandbytes.nn import Linear4bit, Params4bit

    dtype, has_bias = layer.weight.dtype, layer.bias is not None
    out = Linear4bit(layer.in_features, layer.out_features, has_bias, compute_dtype=dtype, quant_type=NF4, device="meta")
    out.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type=NF4, compress_statistics=True, module=out)
    out.bias = layer.bias
    out.support_avx512bf16_for_cpu = False  # the packing for a CPU's inference is in place, and has no way back for gradients
    return out.to(device).train(layer.training)  # quantised by the move


class _Frozen(nn.Linear):
    """A linear layer with int8 weights, for gradients of what goes in.

    torchao computes it as plain operations, of which autograd keeps the weights as floats until the way back: twice the bytes
    that were saved.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _FrozenProduct.apply(x, self.weight, self.bias)


class _FrozenProduct(torch.autograd.Function):
    """x [..., in] · weight [out, in]ᵀ + bias; on the way back the weights are made floats again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ ctx.weight.dequantize(gradient.dtype), None, None


@contextmanager
def _without_chatter() -> Iterator[None]:
    """Within: the libraries do not talk of kernels that they could have."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
