"""What the benchmarks compare must be the same thing computed in two ways."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from diffalign import objectives
from pipelines import config, families, recipes
from pipelines.prompts import held_out_prompts

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def program(name: str) -> Any:
    """A fixture: one of the benchmarks as a module, gone again afterwards with what it imports from beside itself."""

    @pytest.fixture
    def imported(monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module(name)
        for beside in BENCHMARKS.glob("*.py"):
            sys.modules.pop(beside.stem, None)

    return imported


rollout, bench, prepare, step, scaling = map(program, ("rollout", "objectives", "prepare", "step", "scaling"))


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
    tiny = rollout.Bench("tiny", batch=2)
    learning, frozen = (rollout.compared(tiny, step, rounds=1) for step in ("learn", "start"))
    assert learning["counts"]["released"] == {"learning": 16, "looking": 16, "calls": 16}
    assert learning["counts"]["ours"] == {"learning": 16, "looking": 0, "calls": 2}
    assert frozen["counts"]["ours"] == {"learning": 16, "looking": 16, "calls": 3}


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


def test_sigkill_costs_a_shard_at_most(prepare: Any) -> None:
    """A real process and a real signal: 768 pictures in three shards."""
    found = prepare.kill(384, kills=1)
    assert found["pictures"] == 768 and found["per_shard"] == 256
    assert 0 < found["encoded_again"] <= 256


def test_both_ways_of_preparing_encode_the_same(prepare: Any, tmp_path: Path) -> None:
    """As many pictures and prompts, and to the same latents; then memory and start-up, as far as they can be told here."""
    from step import SHAPES, build_pipeline, write_pairs

    from pipelines.families import stable_diffusion

    encoder = stable_diffusion.build(build_pipeline("tiny")).encoder
    table, transform = prepare.open_pairs(write_pairs(tmp_path, 64, 3)), prepare.Transform(SHAPES["tiny"]["pixels"])
    one = prepare.one_at_a_time(table, encoder, transform, tmp_path)
    cache = prepare.in_batches(table, encoder, transform, tmp_path / "cache")
    for row in range(3):
        for k, side in enumerate(("winner", "loser")):
            torch.testing.assert_close(cache.moments(row, side)[0], one[2 * row + k], rtol=2e-3, atol=2e-3)


def test_the_table_of_families_says_what_passed_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("families")
    try:
        passed = {("smpo", "sdxl"): {"lora": True, "full": False}, ("sft", "sdxl"): {"lora": True, "full": True}}
        passed |= {(name, "flux"): {"lora": True, "full": name != "sft"} for name in objectives.names(of_prompts=False)}
        cells = {row[0]: row[2:] for row in module.table(passed).rows}
        assert cells["sdxl"] == ["sft, smpo", "sft"] and cells["pixart"] == ["-", "-"]
        assert cells["flux"][0] == "all" and "sft" not in cells["flux"][1].split(", ") and "smpo" in cells["flux"][1]
        first, last = module.MARKS
        assert module.written(f"a {first} old {last} b", "new") == f"a {first}\nnew\n{last} b"
        with pytest.raises(ValueError, match="found 0"):
            module.written("a b", "new")
    finally:
        sys.modules.pop("families", None)


def test_the_documented_table_has_every_family_and_objective() -> None:
    page = (BENCHMARKS.parent / "docs" / "families.md").read_text(encoding="utf-8")
    lines = page.split("<!-- families -->")[1].split("<!-- end of families -->")[0].strip().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert [row[0] for row in rows[2:]] == families.names()
    assert {cell for row in rows[2:] for cell in row[2:]} == {"all"}  # an exception belongs into the text
    assert f"*All* are {', '.join(objectives.names(of_prompts=False))}. " in page


# ------------------------------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_what_the_yardstick_computes_and_we_do_not(step, adapter: str, tmp_path: Path) -> None:
    """Pictures and prompts encoded and samples through the networks in a step of two pairs."""
    variants = (*step.VARIANTS, step.SAME_BATCH)
    bench = step.Bench("tiny", 64, adapter, 2, variants, tmp_path)
    counted = {v.name: counts_of(bench, v) for v in variants}
    asked = {"learning": 4, "frozen": 4, "pictures": 0, "prompts": 0}
    for half in ("", ", bf16"):
        assert counted[f"naive{half}"] == asked | {"pictures": 4, "prompts": 2}
        assert counted[f"cached{half}"] == asked
        assert counted[f"cached errors{half}"] == asked | {"frozen": 0}
        assert counted[f"cached errors{half}, 4 at a time"] == asked | {"frozen": 0, "learning": 16}
    assert counted["naive, 4 at a time"] == {"learning": 16, "frozen": 16, "pictures": 16, "prompts": 8}


def counts_of(bench: Any, variant: Any) -> dict[str, int]:
    """Samples through the networks and the encoders in one step, from the hooks of the very modules."""
    counts = dict.fromkeys(("learning", "frozen", "pictures", "prompts"), 0)

    def through_the_unet(_: torch.nn.Module, given: tuple) -> None:
        counts["learning" if torch.is_grad_enabled() else "frozen"] += len(given[0])

    def counting(what: str) -> Any:
        def hook(_: torch.nn.Module, given: tuple, more: dict | None = None) -> None:
            counts[what] += len((*given, *(more or {}).values())[0])

        return hook

    networks = {id(n): n for n in (bench.policies[variant].family.network, *(d.network for d in bench.frozen.values()))}
    handles = [network.register_forward_pre_hook(through_the_unet) for network in networks.values()]
    for encoder in bench.encoders.values():
        vae, text_encoder = encoder.networks()
        handles.append(vae.encoder.register_forward_pre_hook(counting("pictures")))
        handles.append(text_encoder.register_forward_pre_hook(counting("prompts"), with_kwargs=True))
    bench.step(variant)
    for handle in handles:
        handle.remove()
    return counts


def test_where_draws_are_kept_nothing_else_differs(step, tmp_path: Path) -> None:
    """Cached errors are what the switched-off adapter says at the same draws."""
    cached, kept = (next(v for v in step.VARIANTS if v.name == name) for name in ("cached", "cached errors"))
    bench = step.Bench("tiny", 64, "lora", 2, (cached, kept), tmp_path)
    batch = next(bench.batches[kept])
    ours, theirs = bench.losses[kept](batch), bench.losses[cached](replace(batch, known=None))
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ many devices


def test_what_rings_send_and_what_it_costs(scaling: Any) -> None:
    """By hand: of 800 bytes, 8 processes send 2 (7/8) 800 to add up and (7/8) 800 to gather. A model of 1e9 parameters takes 6
    passes of 1e12 for each of two pairs, at 1e14 per second 0.12 s; 2 (7/8) 4e9 bytes at 100 GB/s 0.07 s, of which 0.04 hide."""
    assert scaling.on_the_wire({"allreduce": 800, "allgather_base": 800}, 8) == 1400 + 700
    assert scaling.on_the_wire({"allreduce": 800}, 1) == 0
    work, speeds = scaling.Work("a LoRA", 10**9, 1e12), scaling.Speeds(100.0, 100.0, 50.0, 8)
    found = work.efficiency(8, 2, 1, speeds)
    assert (found["compute_seconds"], found["communication_seconds"]) == pytest.approx((0.12, 0.07))
    assert (found["least"], found["most"]) == pytest.approx((0.12 / 0.19, 0.12 / 0.15))
    assert work.efficiency(64, 2, 1, speeds)["communication_seconds"] == pytest.approx(2 * 63 / 64 * 4e9 / 50e9)
    whole = scaling.Work("all, sharded", 10**9, 1e12, sharded=True).efficiency(2, 2, 3, speeds)
    assert whole["sent_gb"] == pytest.approx(0.5 * (4 + 3 * 4))  # gradients once, weights in bf16 twice per micro-step


def test_the_scaling_of_sharding_is_that_of_the_shipped_configuration(scaling: Any) -> None:
    from spread import environment

    assert scaling.environment().items() <= environment("fsdp2").items()


@pytest.mark.slow
def test_bytes_are_counted_to_the_last(scaling: Any) -> None:
    """Gradients once; with FSDP2 weights twice as well. And less than 200 bytes for a step's ten metrics and its agreement."""
    args = scaling.parser().parse_args(["--steps", "1", "--pairs", "1"])
    for way in ("lora", "full", "sharded"):
        found = scaling.launch(way, 2, args)
        weights, payload = 4 * found["trained"], dict(found["payload"])
        small = payload.pop("allreduce")
        if way == "sharded":
            assert payload == {"allgather_base": 2 * weights, "reduce_scatter_base": weights}
        assert 0 < small - (0 if way == "sharded" else weights) < 200
