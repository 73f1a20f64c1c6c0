"""The global generators: a run saves its own with its checkpoints, and leaves its caller's as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from diffalign.processes import ManyProcesses


class RandomState:
    """The global generators of every process. Only LoRA dropout draws from them; pairs, t and noise do not.

    Processes that the run did not have before keep what they were seeded with.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._ranks: list[dict[str, Any]] = []

    def collect(self) -> None:
        self._ranks = ManyProcesses(self._accelerator).all_gather_object(get_random_state())

    def state_dict(self) -> dict[str, Any]:
        return {"ranks": self._ranks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        ranks, mine = state["ranks"], self._accelerator.process_index
        if mine < len(ranks):
            set_random_state(ranks[mine])


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Within, generators may be seeded; afterwards they go on as if nothing had been drawn: they belong to who calls."""
    before = get_random_state()
    try:
        yield
    finally:
        set_random_state(before)


def get_random_state() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "device": _accelerator().get_rng_state() if _accelerator() else None,  # this process's own
        "numpy": [kind, keys.tolist(), *rest],
        "python": [version, list(internal), gauss],
    }


def _accelerator() -> Any:
    """PyTorch's module for the kind of accelerator that is here, such as ``torch.cuda``; None on a CPU."""
    return torch.get_device_module() if torch.accelerator.is_available() else None


def set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    saved = state.get("device", state.get("cuda"))  # older checkpoints say cuda, and the oldest hold a list, one for every device
    if isinstance(saved, Tensor) and _accelerator():
        _accelerator().set_rng_state(saved)
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
