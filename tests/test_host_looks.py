"""How often the host waits for the device in a training step: counted on PyTorch's meta device, which nobody can look into.

Tensors there have shapes and no numbers. Whatever would make a GPU's host wait (reading a number, copying to the CPU, a copy to
the device that is not asynchronous, a result whose shape depends on numbers) is caught and counted here; the rest of the step is
the real one.
"""

from __future__ import annotations

import traceback
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from judged import CASES, make_trainer
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import small_denoiser

import diffalign
from diffalign.train import Interruption

PACKAGES = (str(Path(diffalign.__file__).parent), str(Path(diffalign.__file__).parent.parent / "pipelines"))
META = torch.device("meta")
BY_NUMBERS = {"nonzero", "masked_select", "unique_dim", "_unique2", "repeat_interleave"}
"""Operations whose result has a shape that depends on numbers."""


class Looks(TorchDispatchMode):
    """Notes what the host waits for, with the line of ours that asked, and answers zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.sent = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if first is not None and first.is_meta and name == "_local_scalar_dense":
            return self._note("number", 0.5)
        if first is not None and first.is_meta and name in BY_NUMBERS:
            self._note(name, None)
        if name == "_to_copy" and (to := kwargs.get("device")) is not None:
            if first.is_meta and to.type == "cpu":
                return self._note("to the CPU", torch.full(first.shape, 0.5, dtype=kwargs.get("dtype") or first.dtype))
            if not first.is_meta and to.type == "meta":
                self.sent += 1
                if not kwargs.get("non_blocking"):
                    self._note("to the device, waiting", None)
        return function(*args, **kwargs)

    def _note(self, what: str, answer: Any) -> Any:
        ours = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGES)]
        self.found.append(f"{what}: {Path(ours[-1].filename).name}, {ours[-1].name}")
        return answer


ONE = ["to the CPU: train.py, _means"]
"""What every step ends with: all its numbers, and whether to stop, in one transfer."""

MORE = {"smpo as ddim-inpo": ["to the CPU: inversion.py, <listcomp>"] * 2}
"""DDIM-InPO's noise is seeded by the batch's own draw, one look for each pair."""


@pytest.mark.parametrize(("name", "lora"), [*((name, True) for name in CASES), ("diffusion-dpo", False)])
def test_the_host_looks_once_in_an_optimizer_step(name: str, lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    here = make_trainer(tmp_path / "here", CASES[name], lora=lora, accelerator=accelerator)
    for state in (PartialState, AcceleratorState):
        monkeypatch.setitem(state._shared_state, "device", META)  # where Accelerate believes to be
    there = make_trainer(tmp_path / "there", CASES[name], lora=lora, accelerator=accelerator, make=_without_numbers)
    first, second = islice(here._learner.source.steps(0, 2), 2)  # what is sampled is sampled here
    for thing, known in there._learner.things.items():
        known.load_state_dict(here._learner.things[thing].state_dict())
    if bank := getattr(there._learner.source, "bank", None):
        there._learner.source.reference.become(bank[0])
    with Looks():
        there._optimizer_step(first, Interruption())  # the schedule's table is brought over once
    with Looks() as looks:
        numbers, _ = there._optimizer_step(second, Interruption())
    assert looks.found == [*MORE.get(name, []), *ONE]
    assert looks.sent and numbers.keys() >= {"loss", "gradient_norm", "learning_rate"}


def _without_numbers(dtype: torch.dtype) -> Any:
    denoiser = small_denoiser(dtype)
    denoiser.network.to(META)
    return denoiser
