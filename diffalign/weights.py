"""The weights that are trained: copied, put back, and exchanged for others for a moment.

Past checkpoints, the start of a round and the delayed copy of a policy are all the same network with other weights. They are
kept as tensors beside it, not as second networks: an adapter's are small, and a network's are at least not also a graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diffalign.errors import UserError

Weights = Mapping[str, Tensor]
"""Tensors by the parameters' names."""


class TrainedWeights:
    """The parameters of ``network`` (never a wrapper of it) that require a gradient now: the adapter's, or all of them."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._named = {n: p for n, p in network.named_parameters() if p.requires_grad}

    def copy(self, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """What they are at this moment, on their own device if none is given."""
        return {name: p.detach().to(device or p.device, copy=True) for name, p in self._named.items()}

    def placed(self, weights: Weights) -> dict[str, Tensor]:
        """``weights`` where the parameters are and in their dtypes; not copied where they are so already.

        Raises:
            UserError: they are of other parameters.
        """
        self._refuse_others(weights)
        return {name: weights[name].to(p.device, p.dtype) for name, p in self._named.items()}

    @contextmanager
    def held(self, weights: Weights) -> Iterator[None]:
        """Within: the network computes with ``weights`` (as ``placed``), without dropout. Nothing is copied.

        Meant for calls without gradient. An optimizer never notices: the parameters keep their identity and their gradients.
        """
        kept = {name: p.data for name, p in self._named.items()}
        try:
            for name, parameter in self._named.items():
                parameter.data = weights[name]
            with without_dropout(self._network):
                yield
        finally:
            for name, parameter in self._named.items():
                parameter.data = kept[name]

    @torch.no_grad()
    def move(self, start: Weights, by: float) -> None:
        """Nesterov's extrapolation: each weight w becomes ``w + by (w - start)``, in place."""
        for name, parameter in self._named.items():
            parameter.add_(parameter - start[name].to(parameter), alpha=by)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self._named.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Weights) -> None:
        self._refuse_others(state)
        for name, parameter in self._named.items():
            parameter.copy_(state[name])  # in place: the optimizer holds these very tensors

    def _refuse_others(self, weights: Weights) -> None:
        if weights.keys() != self._named.keys():
            odd = sorted(weights.keys() ^ self._named.keys())[:3]
            raise UserError(f"The checkpoint holds other weights than this run trains (for example {', '.join(odd)}).")


@contextmanager
def without_dropout(network: nn.Module) -> Iterator[None]:
    """Within: nothing is dropped out, and no random number is drawn for it."""
    dropping = [m for m in network.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.training]
    try:
        for module in dropping:
            module.training = False
        yield
    finally:
        for module in dropping:
            module.training = True
