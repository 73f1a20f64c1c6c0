"""What the benchmarks compare must be the same thing computed in two ways."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from diffalign import objectives
from pipelines import config, families, recipes
from pipelines.prompts import held_out_prompts

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
    found = {r["what"]: r for r in rollout.measure("tiny", rounds=1, batch=2)}
    learning, frozen = found["D3PO, learning"], found["D3PO, learning, frozen start"]
    assert learning["counts"]["released"] == {"learning": 16, "looking": 16, "calls": 16}
    assert learning["counts"]["ours"] == {"learning": 16, "looking": 0, "calls": 2}
    assert frozen["counts"]["ours"] == {"learning": 16, "looking": 16, "calls": 3}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("objectives")
    sys.modules.pop("objectives", None)


def test_every_objective_gets_the_same_budget(bench: Any) -> None:
    """To half a step of its own, in forward passes of the recipe as it is."""
    budget = 23_040
    for name in bench.OBJECTIVES:
        steps = bench.steps_for(budget, bench.Variant(name, name))
        objective = objectives.load(name).Objective
        settings = config.resolve(config.merge(recipes.load(name, "tiny"), config.placed({"output": "."}, objective)), objective)
        pairs = settings.batch.accumulation * (1 if name in ("d3po", "ddpo") else settings.batch.batch_size)
        each = pairs * settings.objective.cost.forwards
        assert abs(steps * each - budget) <= each / 2, name


def test_flips_are_of_the_share_and_the_captions_are_unseen(bench: Any, tmp_path: Path) -> None:
    plain, flipped = (pq.read_table(bench.flipped_pairs(level, tmp_path))["label_0"].to_numpy() for level in (0.0, 0.3))
    sure = plain != 0.5
    assert (flipped[~sure] == 0.5).all()
    assert (flipped[sure] != plain[sure]).mean() == pytest.approx(0.3, abs=0.03)
    tuned = {prompt.text for prompt in held_out_prompts("tiny", 224)}
    assert not tuned & set(bench.unseen(bench.captions())) and len(set(bench.unseen(bench.captions()))) > 100


def test_the_sweep_is_named_by_what_it_runs(bench: Any) -> None:
    assert (
        bench.noisy("dpo", 0.0).name == bench.noisy("rdpo", 0.0).name == "diffusion-dpo" and bench.noisy("smpo", 0).name == "smpo"
    )
    told = bench.noisy("rdpo", 0.2)
    assert told.name == "noise20-rdpo" and dict(told.options) == {"loss": "rdpo", "loss_options": {"noise": 0.2}}
    assert bench.noisy("adpo", 0.0).name == "noise00-adpo"


def test_the_table_of_families_says_what_passed_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("families")
    try:
        found = module.table({("smpo", "sdxl"): {"lora": True, "full": False}, ("sft", "sdxl"): {"lora": True, "full": True}})
        cells = {row[0]: dict(zip(found.headings, row, strict=True)) for row in found.rows}
        assert cells["smpo"]["sdxl"] == "LoRA" and cells["sft"]["sdxl"] == "LoRA, full" and cells["sft"]["pixart"] == "-"
        first, last = module.MARKS
        assert module.written(f"a {first} old {last} b", "new") == f"a {first}\nnew\n{last} b"
        with pytest.raises(ValueError, match="found 0"):
            module.written("a b", "new")
    finally:
        sys.modules.pop("families", None)


def test_the_readmes_table_has_every_family_and_objective() -> None:
    readme = (BENCHMARKS.parent / "README.md").read_text(encoding="utf-8")
    lines = readme.split("<!-- families -->")[1].split("<!-- end of families -->")[0].strip().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert rows[0] == ["objective", *families.names()]
    assert [row[0] for row in rows[2:]] == objectives.names(of_prompts=False)
    assert {cell for row in rows[2:] for cell in row[1:]} <= {"LoRA, full", "LoRA", "full", "-"}
