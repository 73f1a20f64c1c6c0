"""A float32 adapter under autocast: its layers take activations as they come, and give what PEFT's own copies of them give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from miniatures import MINIATURES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.families import wrap


class Copies(TorchDispatchMode):
    """Counts what is brought to another dtype."""

    def __enter__(self) -> Copies:
        self.count = 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, given=(), more=None):
        self.count += function.overloadpacket.__name__ == "_to_copy"
        return function(*given, **(more or {}))


def asked(base: torch.dtype) -> tuple[Any, Any]:
    """A family whose base is in ``base``, with an adapter that matters, and a function that asks it and goes backward."""
    pipe = MINIATURES["sd3"].build()
    with torch.no_grad():
        said, _ = MINIATURES["sd3"].said(pipe, ["a red circle", "two blue squares"])
    family = wrap(pipe)
    family.network.to(base)
    family.attach_lora(rank=2, seed=0)
    parameters = list(family.denoiser.trainable_parameters())
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    x = torch.randn((2, *family.latent_shape(32)), generator=torch.Generator().manual_seed(1))

    def step() -> list[Tensor]:
        answer = family.denoiser(x, torch.tensor([300.0, 600.0]), said)
        return [answer.detach(), *torch.autograd.grad(answer.float().square().mean(), parameters)]

    return family, step


def peft_copies(family: Any) -> int:
    """Have PEFT bring activations to the adapter's dtype again; how many layers have one."""
    layers = [module for module in family.network.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        del layer._cast_input_dtype
    return len(layers)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_numbers_with_fewer_copies(base: torch.dtype) -> None:
    family, step = asked(base)
    with torch.autocast("cpu", torch.bfloat16):
        step()  # weights that autocast keeps a copy of are not counted
        with Copies() as ours:
            found = step()
        layers = peft_copies(family)
        with Copies() as theirs:
            expected = step()
    assert layers > 4
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert ours.count <= theirs.count - 2 * layers


def test_without_autocast_a_half_precision_base_still_works() -> None:
    family, step = asked(torch.bfloat16)
    found = step()
    peft_copies(family)
    assert all(torch.equal(a, b) for a, b in zip(found, step(), strict=True))
