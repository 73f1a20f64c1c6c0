"""How often the host waits for the device in a training step: counted on PyTorch's meta device, which nobody can look into.

Tensors there have shapes and no numbers. Whatever would make a GPU's host wait (reading a number, copying to the CPU, a copy to
the device that is not asynchronous or not from pinned memory, numbers of Python made into a tensor there, a result whose shape
depends on numbers) is caught and counted here; the rest of the step is the real one. So is float64 where the device is taken for
one that lacks it, as MPS does.
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
from family_runs import on_disk
from judged import CASES, make_trainer
from miniatures import MINIATURES, PIXELS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from worlds import given, small_denoiser

import diffalign
from diffalign.interruption import Interruption
from diffalign.objectives.diffusion_dpo import DiffusionDPO
from diffalign.references import AdapterOff
from diffalign.types import PairBatch, placed
from pipelines.families import load_family

PACKAGES = (str(Path(diffalign.__file__).parent), str(Path(diffalign.__file__).parent.parent / "pipelines"))
META = torch.device("meta")
BY_NUMBERS = {"nonzero", "masked_select", "unique_dim", "_unique2", "repeat_interleave"}
"""Operations whose result has a shape that depends on numbers."""
INDEXED = {"index", "index_put_", "index_put", "_index_put_impl_"}


@pytest.fixture
def without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is ours: Diffusers asks for MPS by its name."""
    monkeypatch.setattr(diffalign.types, "WITHOUT_FLOAT64", {"meta"})


class Looks(TorchDispatchMode):
    """Notes what the host waits for, and float64 on the device, with the line of ours that asked, and answers zeros."""

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
        if name in INDEXED and any(index is not None and index.dtype == torch.bool and index.is_meta for index in args[1]):
            if name == "index":
                return self._note("rows by a mask", first)  # as if all were kept
            if args[2].is_meta or args[2].numel() > 1:  # one number of the host's is filled in by the mask itself
                return self._note("written to rows by a mask", first)
        if name == "copy_" and first.is_meta != args[1].is_meta:
            if not (len(args) > 2 and args[2]):
                return self._note("to the device, waiting" if first.is_meta else "to the CPU", first)
            self._refuse_pageable(args[1])
        if name == "_to_copy" and (to := kwargs.get("device")) is not None:
            if first.is_meta and to.type == "cpu":
                return self._note("to the CPU", torch.full(first.shape, 0.5, dtype=kwargs.get("dtype") or first.dtype))
            if not first.is_meta and to.type == "meta":
                self.sent += 1
                if not kwargs.get("non_blocking"):
                    self._note("to the device, waiting", None)
                else:
                    self._refuse_pageable(first)
        made = function(*args, **kwargs)
        mine = [x for x in tree_leaves(made) if isinstance(x, torch.Tensor) and x.is_meta]
        if META.type in diffalign.types.WITHOUT_FLOAT64 and any(x.dtype == torch.float64 for x in mine):
            self._note("float64 there", None)
        return made

    def __enter__(self) -> Looks:
        self._made = MadeThere(self)
        self._made.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._made.__exit__(*error)

    def _refuse_pageable(self, sent: torch.Tensor) -> None:
        """A GPU's host waits for a copy from memory that is not pinned, whatever the copy says of itself. ``placed`` pins it,
        where the device is a GPU."""
        if not sent.is_meta and not sent.is_pinned() and not any(f.name == "placed" for f in traceback.extract_stack()):
            self._note("to the device, not pinned", None)

    def _note(self, what: str, answer: Any) -> Any:
        stack = traceback.extract_stack()
        ours = next((frame for frame in reversed(stack) if frame.filename.startswith(PACKAGES)), stack[0])
        self.found.append(f"{what}: {Path(ours.filename).name}, {ours.name}")
        return answer


class MadeThere(TorchFunctionMode):
    """Notes tensors that are made on the device of numbers that the host has: PyTorch copies them behind every dispatch."""

    MAKERS = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)

    def __init__(self, looks: Looks) -> None:
        super().__init__()
        self._looks = looks

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if function in self.MAKERS and made.is_meta:
            numbers = args[1] if function is torch.Tensor.new_tensor else args[0]
            if not (isinstance(numbers, torch.Tensor) and numbers.is_meta):
                self._looks._note("made of numbers", None)
        return made


ONE = ["to the CPU: train.py, _means"]
"""What every step ends with: all its numbers, and whether to stop, in one transfer."""


@pytest.mark.usefixtures("without_float64")
@pytest.mark.parametrize(("name", "lora"), [*((name, True) for name in CASES), ("diffusion-dpo", False)])
def test_the_host_looks_once_in_an_optimizer_step(name: str, lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    here = make_trainer(tmp_path / "here", CASES[name], lora=lora, accelerator=accelerator)
    for state in (PartialState, AcceleratorState):
        monkeypatch.setitem(state._shared_state, "device", META)  # where Accelerate believes to be
    there = make_trainer(tmp_path / "there", CASES[name], lora=lora, accelerator=accelerator, make=_without_numbers)
    first, second = islice(here._learner.source.steps(0, 2), 2)  # what is sampled is sampled here
    for thing, known in there._learner.stateful.items():
        known.load_state_dict(here._learner.stateful[thing].state_dict())
    if bank := getattr(there._learner.source, "bank", None):
        there._learner.source.reference.become(bank[0])
    with Looks():
        there._optimizer_step(first, Interruption())  # the schedule's table is brought over once
    with Looks() as looks:
        numbers, _ = there._optimizer_step(second, Interruption())
    assert looks.found == ONE
    assert looks.sent and numbers.keys() >= {"loss", "gradient_norm", "learning_rate"}


def _without_numbers(dtype: torch.dtype) -> Any:
    denoiser = small_denoiser(dtype)
    denoiser.network.to(META)
    return denoiser


@pytest.mark.usefixtures("without_float64")
def test_what_would_wait_is_seen() -> None:
    """The counter's own check: each of these waits on a GPU, or is refused by MPS, and each is noted once."""
    there, here = torch.zeros(1, device=META), torch.zeros(1)
    for wait in (
        lambda: there.cpu(),
        lambda: here.to(META),
        lambda: there.copy_(here),
        lambda: here.copy_(there),
        lambda: there[there > 0],
        lambda: there.index_put_((there > 0,), there),
        lambda: here.to(META, non_blocking=True),
        lambda: there.copy_(here, non_blocking=True),
        lambda: there.item(),
        lambda: torch.tensor([1.0], device=META),
        lambda: torch.as_tensor([1.0], device=META),
        lambda: there.new_tensor([1.0]),
        lambda: there.double(),
    ):
        with Looks() as looks:
            wait()
        assert len(looks.found) == 1
    with Looks() as looks:
        placed(here, META), there.new_full((2,), 1.0), there[:2] + 1, torch.full((), 2.0, device=META)
        there[there > 0] = 0.5
    assert not looks.found


# Without T5, SD3 switches autocast off for its few zeros, and autocast knows no meta device.
@pytest.mark.parametrize("name", [name for name in MINIATURES if "without T5" not in name])
def test_no_familys_network_has_the_host_wait(name: str, tmp_path: Path) -> None:
    """Policy and reference, forwards and backwards; of what the libraries do, only what we asked for counts."""
    family = load_family(str(on_disk(name, tmp_path).folder))
    family.attach_lora(rank=2)
    prompt = family.encoder.encode_prompts(["a red circle", "a"])
    size = family.latent_shape(PIXELS)
    flow = family.denoiser.schedule.continuous
    t = torch.tensor([300.0, 20.0]) if flow else torch.tensor([300, 20])
    draw = {"winner": torch.randn(2, *size), "loser": torch.randn(2, *size), "noise": torch.randn(2, *size), "t": t}
    one = torch.ones(2)
    batch = PairBatch(**draw, conditioning=prompt, label=one, weight=one, index=torch.arange(2), framing=torch.zeros(2, 2, 6))
    family.network.to(META)
    objective, start = DiffusionDPO(beta=500), AdapterOff(family.denoiser)
    learner = objective.learner(given(family.denoiser, start, ()))
    for _ in range(2):  # the first brings the schedule's table over
        with Looks() as looks:
            learner.losses(batch.to(META)).loss.mean().backward()
    assert not looks.found and looks.sent
