"""Convolutions over few positions: products with the same numbers, chosen where their picture is small against their weights."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from family_runs import on_disk, run, write_pairs
from miniatures import MINIATURES
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.families import _convolutions, wrap
from pipelines.families._convolutions import use_products

CHANNELS = 256
FLOAT32, BFLOAT16 = CHANNELS // 20, CHANNELS // 4
"""The most positions that are taken as a product."""


class Asked(TorchDispatchMode):
    """The names of what PyTorch computes inside."""

    def __enter__(self) -> list[str]:
        self.names: list[str] = []
        super().__enter__()
        return self.names

    def __torch_dispatch__(self, function, types, given=(), more=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*given, **(more or {}))


def convolution(dtype: torch.dtype = torch.float32, **options) -> nn.Conv2d:
    made = nn.Conv2d(CHANNELS, CHANNELS, **{"kernel_size": 3, "padding": 1, **options}).to(dtype).requires_grad_(False)
    return made


def answers(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What it makes of ``x``, and the gradient of that answer's squares by ``x``."""
    x = x.detach().requires_grad_()
    y = module(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    return y.detach(), gradient


@pytest.mark.parametrize("shape", [(1, 2, 3), (2, 1, 4), (3, 2, 2), (1, 1, 1)], ids=str)
def test_a_product_gives_what_the_convolution_gives(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_convolutions, "SHARE", {torch.float64: 1})  # so exactly that no wrong neighbour can hide
    batch, height, width = shape
    module = convolution(torch.float64)
    x = torch.randn(batch, CHANNELS, height, width, dtype=torch.float64)
    before = answers(module, x)
    assert use_products(module) == 1
    with Asked() as names:
        after = answers(module, x)
    assert "convolution" not in names and "convolution_backward" not in names
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)], ids=str)
def test_the_picture_decides(dtype: torch.dtype, most: int) -> None:
    module = convolution(dtype)
    use_products(module)
    for positions, product in ((most, True), (most + 1, False)):
        with Asked() as names:
            module(torch.zeros(positions, CHANNELS, 1, 1, dtype=dtype))
        assert ("convolution" in names) is not product, positions
    for other in (module.double(), module.to(device="meta", dtype=dtype)):
        with Asked() as names:
            other(torch.zeros(1, CHANNELS, 1, 1, dtype=other.weight.dtype, device=other.weight.device))
        assert "convolution" in names


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1, "padding": 0},
        {"stride": 2},
        {"padding": 0},
        {"dilation": 2, "padding": 2},
        {"groups": 2},
        {"padding_mode": "circular"},
    ],
    ids=str,
)
def test_other_convolutions_stay(options: dict) -> None:
    module = convolution(**options)
    assert use_products(module) == 0
    assert type(module) is nn.Conv2d


def test_small_ones_stay_and_what_is_saved_is_the_same() -> None:
    network = nn.Sequential(convolution(), nn.Conv2d(8, 8, 3, padding=1))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert use_products(network) == 1
    assert [vars(module)["_conv_forward"].__func__.__name__ for module in network] == ["convolved", "_plainly"]
    copied = copy.deepcopy(network[0])
    assert copied._conv_forward.__self__ is copied
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_network_without_large_ones_stays() -> None:
    small = nn.Conv2d(8, 8, 3, padding=1)
    assert use_products(small) == 0
    assert "_conv_forward" not in vars(small) and small.weight.is_contiguous()


def test_gradients_stand_as_activations_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels-last, all the way through a UNet with attention, whose blocks hand on pictures in the other order."""
    monkeypatch.setattr(_convolutions, "WEIGHTS", 1)
    pipe = MINIATURES["stable_diffusion"].build()
    family = wrap(pipe)
    with torch.no_grad():
        said, _ = MINIATURES["stable_diffusion"].said(pipe, ["a red circle"])
    x, t = torch.randn(1, *family.latent_shape(32)), torch.tensor([300])
    before = family.denoiser(x, t, said)
    assert family.use_products() > 0
    family.attach_lora(rank=2)
    found: list[tuple[Tensor, Tensor]] = []

    def listen(module: nn.Module, given: tuple[Tensor], answer: Tensor) -> None:
        if given[0].dim() == 4 and answer.requires_grad:
            answer.register_hook(lambda gradient: found.append((given[0], gradient)))

    for module in family.network.modules():
        if isinstance(module, nn.SiLU):
            module.register_forward_hook(listen)
    after = family.denoiser(x, t, said)
    after.square().mean().backward()
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert len(found) > 4
    assert all(one.is_contiguous(memory_format=torch.channels_last) for pair in found for one in pair)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_run_takes_products_below_a_lora(adapter: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_convolutions, "WEIGHTS", 1)
    monkeypatch.setattr(_convolutions, "SHARE", {torch.float32: 1e-9})
    taken = []
    asked = _convolutions.convolved
    monkeypatch.setattr(_convolutions, "convolved", lambda module, *given: taken.append(module) or asked(module, *given))
    saved, pairs = on_disk("stable_diffusion", tmp_path), write_pairs(tmp_path / "data", 4)
    run(saved, pairs, "diffusion-dpo", tmp_path / "run", adapter=adapter, steps=1)
    assert bool(taken) is (adapter == "lora")
