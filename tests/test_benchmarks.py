"""What the benchmarks compare must be the same thing computed in two ways."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def rollout(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("rollout")
    for name in ("rollout", "step"):
        sys.modules.pop(name, None)


def gradients(network: torch.nn.Module) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    return found


def test_both_ways_of_learning_from_a_pair_give_the_same_gradient(rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    """The released way adds up transitions, ours takes the mean of each batch of five: a factor of five."""
    monkeypatch.setattr(rollout, "STEPS", 10)
    bench = rollout.Bench("tiny", batch=5)
    with torch.no_grad():  # away from the start, where half of a LoRA has no gradient
        for p in bench.policy.network.parameters():
            if p.requires_grad:
                p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    made = bench.sampled(range(2), batch=2, prompts=[0, 0])
    reference = rollout.densities(made, bench.start, bench.given, bench.objective.sampling)
    bench.judge(made, reference)
    bench.learn_released()
    released = gradients(bench.policy.network)
    bench.learn_ours()
    ours = gradients(bench.policy.network)
    assert len(ours) == len(released) > 0 and max(float(g.abs().max()) for g in ours) > 0
    for a, b in zip(ours, released, strict=True):
        torch.testing.assert_close(5 * a, b, rtol=1e-3, atol=1e-6)


def test_samples_are_counted(rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "STEPS", 4)
    learning = next(r for r in rollout.measure("tiny", rounds=1, batch=2) if r["what"] == "D3PO, learning")
    assert learning["counts"]["released"] == {"learning": 16, "looking": 16, "calls": 16}
    assert learning["counts"]["ours"] == {"learning": 16, "looking": 0, "calls": 2}
