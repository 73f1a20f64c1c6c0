"""Weights of which every process holds a share (FSDP2): a process's own share of a tensor, the whole of it, and the way back.

Whatever is saved is whole, by the names and in the order that one process would have. So a run goes on with another number of
processes, or with none of this at all. Where nothing is sharded, a tensor is its own share and its own whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from diffalign.processes import patient_group


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether processes hold shares of any of them."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def own(tensor: Tensor) -> Tensor:
    """This process's share: a view, so what is written there is written to the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def share(whole: Tensor, like: Tensor) -> Tensor:
    """This process's share of ``whole`` if it is shared out as ``like``; nothing is sent."""
    return own(shared_out(whole, like))


def shared_out(whole: Tensor, like: Tensor) -> Tensor:
    """``whole``, which every process has, shared out as ``like`` is."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def joined(mine: Tensor, like: Tensor) -> Tensor:
    """The shares ``mine`` of a tensor that is shared out as ``like``, as one tensor that still is."""
    if not isinstance(like, DTensor):
        return mine
    return DTensor.from_local(mine, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def whole(tensor: Tensor, keep: bool = True) -> Tensor:
    """The full tensor, on the CPU if it was sharded; every process must call it. With ``keep`` False a sharded one is empty."""
    if not isinstance(tensor, DTensor):
        return tensor
    gathered = tensor.detach().full_tensor()
    return gathered.cpu() if keep else gathered.new_empty(0, device="cpu")


def plain(tensor: Tensor) -> Tensor:
    """A result of sharded tensors (a norm) on the device; every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def from_main(mine: Tensor | None, like: Tensor) -> Tensor:
    """The main process's tensor, placed and laid out as ``like``, which has its shape; every process must call it, the others
    with None."""
    if not torch.distributed.is_initialized():
        return mine.to(like.device, like.dtype)
    plain = {"dtype": like.dtype, "device": like.device}
    sent = torch.empty(like.shape, **plain) if mine is None else mine.to(**plain).contiguous()
    torch.distributed.broadcast(sent, 0)
    return torch.empty_like(like).copy_(sent)


def all_on_main(thing: Any) -> list[Any]:
    """Every process's ``thing`` (plain values and tensors), by rank, in the main process; an empty list in the others. All must
    call it. What is sent goes from host to host, one process after the other: no device holds any of it."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if world == 1:
        return [thing]
    group = patient_group()
    if is_main():
        return [thing, *(_received(rank, group) for rank in range(1, world))]
    torch.distributed.send_object_list([thing], dst=0, group=group, device=torch.device("cpu"))
    return []


def _received(rank: int, group: Any) -> Any:
    found: list[Any] = [None]
    torch.distributed.recv_object_list(found, src=rank, group=group, device=torch.device("cpu"))
    return found[0]


class Gathered:
    """A state that one process can write: sharded tensors are whole in it, once every process has called ``collect``.

    It is handed out once, because it is as large as the model.
    """

    def __init__(self) -> None:
        self._state: Any = None

    def collect(self, state: Any) -> None:
        """Take in a nest of dicts and lists with tensors in it; only the main process keeps anything."""
        self._state = _mapped(state, lambda tensor: whole(tensor, keep=is_main()))

    def taken(self) -> Any:
        """What was collected.

        Raises:
            ValueError: nothing was since the last time.
        """
        if self._state is None:
            raise ValueError("shares of several processes are to be saved: all of them must call collect() first")
        state, self._state = self._state, None
        return state


def _mapped(state: Any, of_tensor: Any) -> Any:
    if isinstance(state, Tensor):
        return of_tensor(state)
    if isinstance(state, Mapping):
        return {key: _mapped(value, of_tensor) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [_mapped(value, of_tensor) for value in state]
    return state


class UnshardedOptimizer:
    """An optimizer, saved as if nothing were sharded."""

    copies_on_load = True

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer, self._gathered = optimizer, Gathered()
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._sharded = is_sharded(self._parameters)

    def collect(self) -> None:
        if self._sharded:
            self._gathered.collect(self._optimizer.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return self._gathered.taken() if self._sharded else self._optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._optimizer.load_state_dict(self._in_shares(state) if self._sharded else state)
        for moments in self._optimizer.state.values():  # PyTorch keeps what is on the CPU as it was given
            here = {name: value for name, value in moments.items() if isinstance(value, Tensor) and value.device.type == "cpu"}
            moments.update({name: value.clone() for name, value in here.items()})

    def _in_shares(self, state: Mapping[str, Any]) -> dict[str, Any]:
        moments = state["state"].items()
        return {**state, "state": {number: _as_shared(those, self._parameters[number]) for number, those in moments}}


def _as_shared(moments: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """The moments of one parameter: what has its shape is shared out as it is; a count of steps is not."""
    return {
        name: shared_out(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value
        for name, value in moments.items()
    }
