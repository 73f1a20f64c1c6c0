"""Compiled blocks: the same numbers, one graph for each way of asking, and none made anew when the reference is asked between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from miniatures import MINIATURES
from torch import Tensor

from diffalign.references import AdapterOff
from pipelines.families import _convolutions, wrap
from pipelines.families._compiled import repeated_blocks


class Counting:
    """A compiler that compiles nothing, and counts what it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs += 1
        return graph.forward


def asked(name: str, products: bool = False) -> tuple[Any, Any]:
    """A family with an adapter that matters, and a step of it: the reference asked without a graph, the policy with one."""
    pipe = MINIATURES[name].build()
    with torch.no_grad():
        said, _ = MINIATURES[name].said(pipe, ["a red circle", "two blue squares"])
    family = wrap(pipe)
    assert not products or family.use_products() > 0
    family.attach_lora(rank=2, seed=0)
    with torch.no_grad():
        for i, parameter in enumerate(family.denoiser.trainable_parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    family.network.train()
    shape = family.latent_shape(32)
    x = torch.randn((2, *shape), generator=torch.Generator().manual_seed(1))
    t = torch.tensor([300, 600]) if not family.denoiser.schedule.continuous else torch.tensor([300.0, 600.0])
    reference = AdapterOff(family.denoiser)

    def step() -> list[Tensor]:
        for parameter in family.denoiser.trainable_parameters():
            parameter.grad = None
        before, now = reference(x, t, said), family.denoiser(x, t, said)
        now.square().mean().backward()
        return [before, now.detach(), *(p.grad.clone() for p in family.denoiser.trainable_parameters())]

    return family, step


@pytest.mark.parametrize(("name", "products"), [("stable_diffusion", False), ("stable_diffusion", True), ("sd3", False)])
def test_graphs_survive_the_switch_of_the_adapter(name: str, products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where convolutions choose by their picture's size."""
    monkeypatch.setattr(_convolutions, "WEIGHTS", 1)
    monkeypatch.setattr(_convolutions, "SHARE", {torch.float32: 0.25})  # below 4 positions for each channel
    torch.compiler.reset()
    family, step = asked(name, products)
    plain, compiler = step(), Counting()
    assert not torch.equal(plain[0], plain[1])  # the adapter matters
    count = family.compile_blocks(backend=compiler)
    assert count == len(repeated_blocks(family.network)) > 1
    first = step()
    made = compiler.graphs
    with torch.compiler.set_stance("fail_on_recompile"):
        again = step()
    assert compiler.graphs == made > 0
    for a, b, c in zip(plain, first, again, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
        assert torch.equal(b, c)
