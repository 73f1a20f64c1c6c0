"""The weights that are trained: copied, put back, and exchanged for others for a moment.

Past checkpoints, the start of a round and the delayed copy of a policy are all the same network with other weights. They are
kept as tensors beside it, not as second networks: an adapter's are small, and a network's are at least not also a graph.

Where every process holds a share of the parameters (FSDP2), it keeps shares, and saves whole tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.sharding import Gathered, from_main, is_sharded, joined, own, share, whole

Weights = Mapping[str, Tensor]
"""Tensors by the parameters' names."""


class TrainedWeights:
    """The parameters of ``network`` (never a wrapper of it) that require a gradient now: the adapter's, or all of them."""

    copies_on_load = True

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._named = {n: p for n, p in network.named_parameters() if p.requires_grad}
        self.sharded = is_sharded(self._named.values())
        self._gathered = Gathered()
        self._dropouts = _dropouts(network)

    def copy(self, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """A copy of the trained weights, by name, on their own device if none is given.

        Sharded weights: this process's shares; with a ``device``, which must be the CPU, the full tensors, and all processes
        must call it.
        """
        if device is not None and self.sharded:
            return {name: whole(p) for name, p in self._named.items()}
        return {name: own(p.detach()).to(device or p.device, copy=True) for name, p in self._named.items()}

    def placed(self, weights: Weights) -> dict[str, Tensor]:
        """``weights``, whole, where the parameters are and in their dtypes; not copied where they are so already. Of sharded
        parameters, this process's shares.

        Raises:
            UserError: they are of other parameters.
        """
        self._refuse_others(weights)
        return {name: share(weights[name].to(p.device, p.dtype), p) for name, p in self._named.items()}

    def stored(self, weights: Weights | None = None) -> dict[str, Tensor]:
        """A copy on the CPU: of ``weights``, which are whole, or of what they are now. Of sharded ones, this process's shares.

        Raises:
            UserError: they are of other parameters.
        """
        if weights is None:
            return {name: own(p.detach()).to("cpu", copy=True) for name, p in self._named.items()}
        self._refuse_others(weights)
        return {name: share(weights[name], p).to("cpu", copy=True) for name, p in self._named.items()}

    def fetched(self, stored: Weights | None) -> dict[str, Tensor]:
        """Weights that were ``stored``, on the parameters' device. All processes must call it.

        Sharded weights: each process gives its own shares. Otherwise the main process gives them, the others None, and all get
        them.
        """
        if self.sharded:
            return {name: stored[name].to(p.device) for name, p in self._named.items()}
        return {name: from_main(None if stored is None else stored[name], p.detach()) for name, p in self._named.items()}

    def gathered(self, weights: Weights) -> dict[str, Tensor]:
        """``weights``, as ``copy``, ``placed`` or ``fetched`` gave them, in a form that ``Gathered`` makes whole."""
        return {name: joined(weights[name], p) for name, p in self._named.items()} if weights else {}

    @contextmanager
    def held(self, weights: Weights) -> Iterator[None]:
        """Within: the network computes with ``weights`` (as ``placed``), without dropout. Nothing is copied, but FSDP2's shares.

        Meant for calls without gradient. An optimizer never notices: the parameters keep their identity and their gradients.
        """
        with self._shares_held(weights) if self.sharded else self._data_held(weights), _switched_off(self._dropouts):
            yield

    @contextmanager
    def _data_held(self, weights: Weights) -> Iterator[None]:
        kept = {name: p.data for name, p in self._named.items()}
        try:
            for name, parameter in self._named.items():
                parameter.data = weights[name]
            yield
        finally:
            for name, parameter in self._named.items():
                parameter.data = kept[name]

    @contextmanager
    def _shares_held(self, weights: Weights) -> Iterator[None]:
        """FSDP2 gathers from the memory that it laid out itself, so that is what must hold them."""
        kept = self.copy()
        try:
            self._write(weights)
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, weights: Weights) -> None:
        for name, parameter in self._named.items():
            own(parameter.detach()).copy_(weights[name])

    @torch.no_grad()
    def move(self, start: Weights, by: float) -> None:
        """Nesterov's extrapolation: each weight w becomes ``w + by (w - start)``, in place. ``start`` is whole."""
        for name, parameter in self._named.items():
            mine = own(parameter)
            mine.add_(mine - share(start[name].to(parameter.device, parameter.dtype), parameter), alpha=by)

    def collect(self) -> None:
        """Before sharded ones are saved, on all processes."""
        if self.sharded:
            self._gathered.collect({name: p.detach() for name, p in self._named.items()})

    def state_dict(self) -> dict[str, Tensor]:
        return self._gathered.taken() if self.sharded else {name: p.detach() for name, p in self._named.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Weights) -> None:
        self._refuse_others(state)
        for name, parameter in self._named.items():  # the optimizer holds these very tensors
            own(parameter.detach()).copy_(share(state[name], parameter))

    def _refuse_others(self, weights: Weights) -> None:
        if weights.keys() != self._named.keys():
            odd = sorted(weights.keys() ^ self._named.keys())[:3]
            raise UserError(f"The checkpoint holds other weights than this run trains (for example {', '.join(odd)}).")


@contextmanager
def without_dropout(network: nn.Module) -> Iterator[None]:
    """Within: nothing is dropped out, and no random number is drawn for it. A network that drops nothing is left as it is."""
    with _switched_off(_dropouts(network)):
        yield


def _dropouts(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, nn.modules.dropout._DropoutNd)]


@contextmanager
def _switched_off(dropouts: Iterable[nn.Module]) -> Iterator[None]:
    # Layers of rate 0 do nothing anyway; compiled blocks would be compiled once more for another mode.
    dropping = [module for module in dropouts if module.p and module.training]
    try:
        for module in dropping:
            module.training = False
        yield
    finally:
        for module in dropping:
            module.training = True
