"""Full fine-tuning's second network, the reference, computes as the first one does: the same kernels, orders and graphs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from family_runs import on_disk, run, write_pairs
from miniatures import MINIATURES
from torch import nn

from pipelines import devices, ingredients, training
from pipelines.families import _attention, wrap
from pipelines.families._compiled import repeated_blocks
from pipelines.run import settings_of


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[ingredients.Prepared]:
    """What runs from now on are given."""
    seen: list[ingredients.Prepared] = []
    build = training.build_trainer

    def watched(name: str, settings: Any, given: ingredients.Prepared, *more: Any) -> Any:
        seen.append(given)
        return build(name, settings, given, *more)

    monkeypatch.setattr(training, "build_trainer", watched)
    return seen


def test_every_switch_is_set_in_both(prepared: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: set[nn.Module] = set()
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled.add(self))
    saved, out = on_disk("stable_diffusion", tmp_path), tmp_path / "run"
    switches = {"channels_last": True, "attention": "flash", "compile": True, "gradient_checkpointing": True}
    run(saved, write_pairs(tmp_path / "pairs", 6), "diffusion-dpo", out, adapter="full", **switches)
    policy, reference = prepared[0].family.network, prepared[0].reference._model.network
    assert reference is not policy and not any(p.requires_grad for p in reference.parameters()) and not reference.training
    for network in (policy, reference):
        assert network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        assert compiled.issuperset(repeated_blocks(network))
        assert all(layer.forward.__func__ is _attention._by_flash for layer in _attention.layers(network))
        assert all(layer.forward.__self__ is layer for layer in _attention.layers(network))  # not one of the other network
    first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0 and first["margin"] == 0.0  # to the bit: nothing but the weights could make a difference


@pytest.mark.parametrize("shares", [False, True])
def test_shares_of_weights_have_no_order_of_their_own(shares: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "is_sharding", lambda _: shares)
    family, said = wrap(MINIATURES["stable_diffusion"].build()), list[str]()
    settings = settings_of("diffusion-dpo", None, {"model": "m", "output": "o", "pairs": "tiny", "channels_last": True})
    ingredients._choose_kernels(settings, family, Accelerator(cpu=True), said.append)
    assert family.network.conv_in.weight.is_contiguous(memory_format=torch.channels_last) != shares
    assert any("channels-last is left out" in line for line in said) == shares
