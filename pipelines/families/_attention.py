"""Which kernel computes attention: PyTorch's own choice, its flash kernel and no other, or xformers.

PyTorch's ``scaled_dot_product_attention`` (SDPA) chooses among its kernels by shape, dtype and device and falls back silently on
one that keeps whole matrices in memory; what it chooses here is printed at the beginning of a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffalign.errors import UserError

KINDS = ("sdpa", "flash", "xformers")
_NAMES = {
    SDPBackend.MATH: "plain",
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "memory-efficient",
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
}
_PLAIN = "_forward_by_any_kernel"


def layers(network: nn.Module) -> Iterator[nn.Module]:
    """The layers of ``network`` that compute attention: those that Diffusers gives a processor."""
    return (module for module in network.modules() if hasattr(module, "processor") and hasattr(module, "to_q"))


def heads(network: nn.Module) -> list[int]:
    """The different numbers of channels of a head, ascending."""
    return sorted({module.to_q.out_features // module.heads for module in layers(network)})


def chosen(head: int, dtype: torch.dtype, device: torch.device | str) -> str:
    """What SDPA calls for heads of ``head`` channels without a mask: flash, cuDNN, memory-efficient, or plain."""
    backend = SDPBackend(torch._fused_sdp_choice(*_some(head, dtype, device)))
    return _NAMES.get(backend, backend.name.lower())


def describe(kind: str, network: nn.Module, dtype: torch.dtype, device: torch.device | str) -> str:
    """One line on what computes attention in ``network`` on ``device``; empty without a layer of a known kind."""
    sizes = heads(network)
    if kind == "xformers" or not sizes:
        return f"attention: {kind}" if sizes else ""
    kernels = {head: kind if kind == "flash" else chosen(head, dtype, device) for head in sizes}
    whole = ", ".join(f"{kernel} for heads of {_listed(kernels, kernel)}" for kernel in dict.fromkeys(kernels.values()))
    return f"attention: SDPA, {whole} channels in {str(dtype).removeprefix('torch.')} on {torch.device(device).type}"


def _listed(kernels: dict[int, str], kernel: str) -> str:
    return ", ".join(str(head) for head, found in kernels.items() if found == kernel)


def only_flash(network: nn.Module, dtype: torch.dtype, device: torch.device | str) -> None:
    """From now on every attention layer computes by PyTorch's flash kernel or fails; also where its block is recomputed.

    Raises:
        UserError: the kernel cannot do it here, with the reason that PyTorch gives.
    """
    for head in heads(network):
        try:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                F.scaled_dot_product_attention(*_some(head, dtype, device))
        except RuntimeError as error:
            raise UserError(
                f"attention flash: PyTorch's flash kernel cannot take heads of {head} channels in {dtype} on "
                f"{torch.device(device).type} ({error}). Use sdpa, which takes what fits."
            ) from error
    for layer in layers(network):
        if not hasattr(layer, _PLAIN):
            setattr(layer, _PLAIN, layer.forward)
            layer.forward = MethodType(_by_flash, layer)  # a copy of the layer gets one of its own


def any_kernel(network: nn.Module) -> None:
    """Undo ``only_flash``."""
    for layer in layers(network):
        if vars(layer).pop(_PLAIN, None) is not None:
            del layer.forward


def _by_flash(layer: nn.Module, *given: Any, **more: Any) -> Any:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return getattr(layer, _PLAIN)(*given, **more)


def _some(head: int, dtype: torch.dtype, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a short sequence, with a gradient as in training."""
    q = torch.zeros(1, 1, 64, head, dtype=dtype, device=device, requires_grad=True)
    return q, q, q
