"""From losses to new weights: gradients are added up over micro-batches, averaged over processes, clipped, and taken.

Accelerate does it for one process, for copies of the model (DDP) and for shares of it (FSDP2); DeepSpeed has a way of its own of
keeping moments in shares (``zero``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffalign.checkpoint import Stateful
from diffalign.optimisation import OptimizerSettings, build_optimizer
from diffalign.sharding import UnshardedOptimizer, is_sharded


class Updates(Protocol):
    """The engine that keeps gradients and moments, as the loop uses it."""

    optimizer: torch.optim.Optimizer  # its groups hold the learning rate
    saved: Stateful  # moments, whole and by parameter, however they are kept here

    def accumulating(self, last: bool) -> AbstractContextManager:
        """A context around the losses and the backward pass of a micro-batch; ``last`` if it is the step's last."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``, []."""

    def clip_gradients(self) -> Tensor:
        """The gradient's norm over all processes, [], before it is clipped; not finite if the gradient is not."""

    def apply(self) -> None:
        """Update the weights, and forget the gradient. In fp16, a gradient that is not finite makes no update."""

    def weights_changed(self) -> None:
        """Take over parameters that were written from outside (a loaded state, a new round)."""


class AccelerateUpdates:
    """Updates by Accelerate and a PyTorch optimizer."""

    def __init__(
        self, accelerator: Accelerator, network: nn.Module, parameters: Iterable[nn.Parameter], settings: OptimizerSettings
    ) -> None:
        self._accelerator, self._network, self._parameters = accelerator, network, list(parameters)
        self._most, self._sharded = settings.max_grad_norm or math.inf, is_sharded(self._parameters)
        self._optimizer = accelerator.prepare_optimizer(build_optimizer(self._parameters, settings))
        self.optimizer: torch.optim.Optimizer = self._optimizer.optimizer
        self.saved: Stateful = UnshardedOptimizer(self.optimizer)

    def accumulating(self, last: bool) -> AbstractContextManager:
        # FSDP2 would keep the whole gradient on every device until it is sent: every micro-batch's is reduced to shares at once.
        return nullcontext() if last or self._sharded else self._accelerator.no_sync(self._network)

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def clip_gradients(self) -> Tensor:
        return self._accelerator.clip_grad_norm_(self._parameters, self._most)

    def apply(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()

    def weights_changed(self) -> None:
        """Nothing: the optimizer updates these very parameters."""


def updates_of(
    accelerator: Accelerator,
    network: nn.Module,
    parameters: Iterable[nn.Parameter],
    settings: OptimizerSettings,
    zero: Mapping[str, Any] | None = None,
) -> Updates:
    """``zero`` is the section ``zero_optimization`` of DeepSpeed's configuration, if that is to keep the moments."""
    if zero is None:
        return AccelerateUpdates(accelerator, network, parameters, settings)
    from diffalign.zero import ZeroUpdates

    return ZeroUpdates(accelerator, network, parameters, settings, zero)
