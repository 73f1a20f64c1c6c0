"""Costs of a forward pass with gradients: bytes that autograd keeps, and operations; counted from shapes, without values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pipelines.families._family import Family
from pipelines.families._sketch import shapes_only


@dataclass(frozen=True)
class Pass:
    """One forward pass of ``rows`` samples."""

    rows: int
    kept: int  # bytes that stay until the backward pass
    inner: int  # bytes that the largest recomputed block keeps while it is gone through again; 0 without checkpointing
    flops: int


Encoded = Mapping[str, tuple[torch.Size, torch.dtype]]
"""Shapes and types of an encoded prompt, with a batch dimension of 1."""


def encoded_prompt(family: Family) -> Encoded:
    """Shapes of one encoded prompt, by the text encoders of a family from ``families.sketch``."""
    with shapes_only(family.network, *family.encoder.networks()):
        return {name: (value.shape, value.dtype) for name, value in family.encoder.encode_prompts(["a"]).items()}


def forward_pass(
    family: Family, prompt: Encoded, size: tuple[int, int, int], rows: int, checkpointing: bool, autocast: torch.dtype | None
) -> Pass:
    """Costs of a forward pass with gradients, for a family from ``families.sketch`` whose trained parameters require them.

    Args:
        size: (C, h, w) of a latent.
        autocast: what the network computes in, if not in float32; adapters are float32 in a network of any precision.
    """
    keeping = _Keeping(family.network)
    with shapes_only(family.network, *family.encoder.networks()):
        conditioning = _conditioning(family, prompt, rows)
        x_t = torch.zeros(rows, *size)
        t = torch.zeros(rows, dtype=torch.float32 if family.denoiser.schedule.continuous else torch.int64)
        half = torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None)
        with _recomputed(family.network, checkpointing, keeping), keeping, half, FlopCounterMode(display=False) as counter:
            family.denoiser(x_t, t, conditioning)
    return Pass(rows, keeping.bytes, keeping.inner, counter.get_total_flops())


def _conditioning(family: Family, prompt: Encoded, rows: int) -> dict[str, torch.Tensor]:
    """Conditioning of ``rows`` samples; every token counts, so masks are left out where a network can do without."""
    needed = {name: value for name, value in prompt.items() if not family.denoiser.can_do_without(name)}
    return {name: torch.zeros(rows, *shape[1:], dtype=dtype) for name, (shape, dtype) in needed.items()}


def picture_bytes(family: Family, resolution: int, batch: int) -> int:
    """The most that lies in memory at one time while the autoencoder encodes ``batch`` pictures, beside its weights."""
    live = _Living(*family.encoder.networks())
    with shapes_only(*family.encoder.networks()):
        pixels = torch.zeros(batch, 3, resolution, resolution)
        with torch.no_grad(), live:
            family.encoder.encode_images(pixels)
    return live.most


def decoding_bytes(family: Family, size: tuple[int, int, int], pictures: int) -> int:
    """The most that lies in memory at one time while latents (C, h, w) of ``pictures`` are decoded, beside the weights."""
    live = _Living(*family.encoder.networks())
    with shapes_only(*family.encoder.networks()), live:
        family.encoder.decode(torch.zeros(pictures, *size))
    return live.most


def asking_bytes(family: Family, prompt: Encoded, size: tuple[int, int, int], rows: int) -> int:
    """Peak bytes of activations in a forward pass over ``rows`` latents (C, h, w) without gradients."""
    live = _Living(family.network)
    with shapes_only(family.network, *family.encoder.networks()):
        conditioning = _conditioning(family, prompt, rows)
        t = torch.zeros(rows, dtype=torch.float32 if family.denoiser.schedule.continuous else torch.int64)
        with torch.no_grad(), live:
            family.denoiser(torch.zeros(rows, *size), t, conditioning)
    return live.most


class _Living(TorchDispatchMode):
    """While it is entered: the most bytes that results of operations hold at one time, views of the networks' weights aside."""

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        self._networks, self._own = networks, frozenset()
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __enter__(self) -> _Living:
        self._own = {_storage(p) for network in self._networks for p in (*network.parameters(), *network.buffers())}
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._held = {key: (ref, size) for key, (ref, size) in self._held.items() if not ref.expired()}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                held = tensor.untyped_storage()
                if held._cdata not in self._own:
                    self._held.setdefault(held._cdata, (StorageWeakRef(held), held.nbytes()))
        self.most = max(self.most, sum(size for _, size in self._held.values()))
        return out


def encoding_bytes(family: Family) -> dict[str, int]:
    """Bytes of each network that encodes, by the pipeline's names."""
    named = zip(family.encoder.components, family.encoder.networks(), strict=True)
    return {name: weights_bytes(network) for name, network in named}


def prompt_bytes(prompt: Encoded, of_a_number: int) -> int:
    """Bytes of one encoded prompt whose floats take ``of_a_number``."""
    each = ((shape.numel(), of_a_number if dtype.is_floating_point else dtype.itemsize) for shape, dtype in prompt.values())
    return sum(count * size for count, size in each)


def weights_bytes(network: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*network.parameters(), *network.buffers()))


class _Keeping:
    """While it is entered: notes the memory of all that autograd keeps, once, except weights."""

    def __init__(self, network: nn.Module) -> None:
        self._network, self._own = network, frozenset()
        self._kept: dict[int, torch.UntypedStorage] = {}  # held, or another might come to lie where one was
        self.inner = 0

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._kept.values())

    def __enter__(self) -> None:
        self._own = {_storage(p) for p in self._network.parameters()}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self.note, lambda tensor: tensor)
        self._hooks.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def note(self, tensor: torch.Tensor) -> torch.Tensor:
        if _storage(tensor) not in self._own:
            self._kept[_storage(tensor)] = tensor.untyped_storage()
        return tensor

    @contextmanager
    def within(self, given: list[torch.Tensor]) -> Iterator[None]:
        """A block that is gone through again: what it keeps counts by itself, what it is given stays."""
        outside, self._kept = self._kept, {}
        try:
            yield
        finally:
            self.inner, self._kept = max(self.inner, self.bytes), outside
            for tensor in given:
                self.note(tensor)


@contextmanager
def _recomputed(network: nn.Module, on: bool, keeping: _Keeping) -> Iterator[None]:
    """Within: blocks that gradient checkpointing would go through again are watched one by one."""
    if not on:
        yield
        return

    def watched(block: Any, *given: Any, **options: Any) -> Any:
        with keeping.within([one for one in (*given, *options.values()) if isinstance(one, torch.Tensor)]):
            return block(*given, **options)

    network.enable_gradient_checkpointing(watched)
    try:
        yield
    finally:
        network.disable_gradient_checkpointing()


def _storage(tensor: torch.Tensor) -> int:
    """Identity of the storage of a tensor or view; storages on the meta device have no address, but are still distinct."""
    return tensor.untyped_storage()._cdata
