"""Small real things that several tests train on: the golden UNet, a schedule, encoded pairs in memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from diffalign.learner import RunContext
from diffalign.schedule import FlowSchedule, NoiseSchedule
from diffalign.weights import TrainedWeights
from pipelines.families.stable_diffusion import UNetDenoiser

UNET = Path(__file__).parent / "golden" / "unet"
SHAPE = (4, 8, 8)


def sd_alpha_bar(dtype: torch.dtype = torch.float32) -> Tensor:
    """SD1.5's scaled-linear schedule."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=dtype) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


def small_denoiser(dtype: torch.dtype = torch.float32, prediction_type: str = "epsilon") -> UNetDenoiser:
    """A genuine UNet of 0.2 million parameters."""
    net = UNet2DConditionModel.from_config(json.loads((UNET / "config.json").read_text()))
    net.load_state_dict(load_file(UNET / "reference.safetensors"))
    return UNetDenoiser(NoiseSchedule(sd_alpha_bar(), prediction_type), net.to(dtype))


def flow_denoiser(dtype: torch.dtype = torch.float32) -> UNetDenoiser:
    """The same UNet, asked for velocities at levels that are no whole numbers."""
    return replace(small_denoiser(dtype), schedule=FlowSchedule())


def given(policy: UNetDenoiser, start, source=None, **more) -> RunContext:
    """What a run would give an objective, on the CPU."""
    weights = TrainedWeights(getattr(policy.network, "module", policy.network))
    return RunContext(policy=policy, weights=weights, start=start, latent_shape=SHAPE, pairs=source, **more)


class PairsInMemory:
    """Encoded pairs as the cache gives them. Winners and losers differ by a constant pattern, so there is something to learn."""

    latent_shape = SHAPE

    def __init__(self, n: int = 12, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        g = torch.Generator().manual_seed(seed)
        pattern = torch.randn(SHAPE, generator=g)
        base = torch.randn((n, *SHAPE), generator=g)
        self._means = {"winner": (0.5 * base + 0.5 * pattern).to(dtype), "loser": (0.5 * base - 0.5 * pattern).to(dtype)}
        self._text = torch.randn((n + 1, 7, 32), generator=g).to(dtype)
        self.labels = [1.0] * n
        self.weights = [1.0] * n

    def __len__(self) -> int:
        return len(self.labels)

    def moments(self, pair_index: int, side: str, flipped: bool) -> tuple[Tensor, Tensor]:
        mean = self._means[side][pair_index]
        return (mean.flip(-1) if flipped else mean), torch.full_like(mean, 0.1)

    def conditioning(self, pair_index: int | None) -> dict[str, Tensor]:
        return {"encoder_hidden_states": self._text[-1 if pair_index is None else pair_index]}


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Equal to the bit, in every tensor and value of two saved states."""
    assert type(one) is type(other), where
    if isinstance(one, Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert one == other, where
