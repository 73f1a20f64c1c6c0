"""What the denoisers of all families share; a family's own file only calls its network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from diffalign.schedule import NoiseSchedule
from diffalign.types import FRAMING, Conditioning
from pipelines.families import _lora


@dataclass(frozen=True)
class NetworkDenoiser(ABC):
    """A network as a ``diffalign.protocols.Denoiser``; it may be wrapped (DDP, autocast, compiled)."""

    schedule: NoiseSchedule
    network: nn.Module
    OPTIONAL: ClassVar[tuple[str, ...]] = ()

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """``x_t`` [B, C, H, W], ``t`` [B] -> prediction [B, C, H, W]; inputs are cast to the base weights' dtype, and the
        answer is given in the wider of that and ``x_t``'s."""
        dtype = working_dtype(self.network)
        prediction = self.predict(x_t.to(dtype), t, conditioning)
        return prediction.to(torch.promote_types(prediction.dtype, x_t.dtype))

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """One call of the network: ``x_t`` is in its dtype, the conditioning is not yet."""

    def can_do_without(self, name: str) -> bool:
        """Whether ``predict`` takes a conditioning without this tensor, as if every token counted."""
        return name in self.OPTIONAL

    def with_network(self, network: nn.Module) -> Self:
        """The same, around a wrapped version of the network."""
        return replace(self, network=network)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Everything after ``train_fully``, the adapter after ``attach_lora``; in a stable order."""
        return (parameter for parameter in self.network.parameters() if parameter.requires_grad)

    def adapter_off(self) -> AbstractContextManager[None]:
        """Within: the network before alignment, to the bit.

        Raises:
            ValueError: there is no adapter.
        """
        return _lora.switched_off(self.network)


def working_dtype(network: nn.Module) -> torch.dtype:
    """What a network computes in: its first layer's, of the base even under LoRA; quantised weights are of no such type."""
    return next(parameter.dtype for parameter in network.parameters() if parameter.is_floating_point())


def framing_of(conditioning: Conditioning, x_t: Tensor, factor: int) -> Tensor:
    """How the pictures were cut, [B, 6] float32, see ``FRAMING``, for latents ``x_t`` of ``factor`` pixels each.

    What is not known, or was sampled, is taken for a picture of just this size, as the pipelines take it when they sample.
    """
    height, width = (side * factor for side in x_t.shape[-2:])
    whole = torch.zeros(6, device=x_t.device)  # filled there: a copy of a list would have the host wait
    whole[0::4], whole[1::4] = height, width
    whole = whole.expand(len(x_t), 6)
    known = conditioning.get(FRAMING)
    return whole if known is None else torch.where(known.isnan(), whole, known.to(whole))
