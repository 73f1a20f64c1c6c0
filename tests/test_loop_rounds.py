"""Rounds of the loop: a reference that is renewed, Nesterov's extrapolation, and a resume that notices neither."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from judged import CASES, PAIRS_OF, SEED, Case, things_given
from miniature import save_untrained, write_pairs
from torch import nn
from worlds import assert_same, small_denoiser

from diffalign.data.loader import LoaderSettings, validation_batches
from diffalign.errors import UserError
from diffalign.loop_rounds import LoopRounds
from diffalign.objectives._about import FROZEN_START
from diffalign.optimisation import Ema, OptimizerSettings
from diffalign.references import AdapterOff, Frozen, Snapshot
from diffalign.train import LoopSettings, Trainer
from diffalign.weights import TrainedWeights
from pipelines import cli
from pipelines.families import _lora


def make_trainer(
    output: Path,
    case: Case = CASES["diffusion-dpo"],
    *,
    lora: bool = True,
    steps: int = 6,
    ema: float = 0.0,
    dropout: float = 0.0,
    renewed: bool | None = None,
    report: Callable = lambda step, numbers: None,
    **loop: Any,
) -> Trainer:
    """A run on the small UNet with a checkpoint every two steps."""
    torch.manual_seed(3)
    policy = small_denoiser()
    if lora:
        _lora.attach(policy.network, rank=4, alpha=8, targets=("to_q", "to_v"), dropout=dropout, seed=1)
    policy.network.train()
    start, weights = AdapterOff(policy) if lora else Frozen(small_denoiser()), TrainedWeights(policy.network)
    renewed = loop.get("round_reference") == "round" if renewed is None else renewed
    given = things_given(policy, start, case, torch.float32, reference=Snapshot(policy, weights) if renewed else None)
    output.mkdir(parents=True, exist_ok=True)
    return Trainer(
        learner=case.objective.learner(given),
        policy=policy,
        validation=validation_batches(PAIRS_OF["pairs"](12), [10, 11], LoaderSettings(case.batch, seed=SEED), 2),
        accelerator=Accelerator(cpu=True),
        output=output,
        loop=LoopSettings(steps=steps, checkpoint_every=2, validate_every=2, keep_checkpoints=9, ema_decay=ema, **loop),
        optimizer=OptimizerSettings(learning_rate=1e-3),
        identity={},
        report=report,
        weights=weights,
    )


def saved(folder: Path, step: int) -> dict[str, Any]:
    """Everything in a checkpoint but the random state."""
    files = (folder / "checkpoints" / f"checkpoint-{step:08d}").glob("*.pt")
    return {p.stem: torch.load(p, weights_only=True) for p in files if p.stem != "random"}


def lines(folder: Path, kind: str = "train") -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows if row["kind"] == kind]


# ---------------------------------------------------------------------------------------------------------- arithmetic


class Scripted:
    """A network of one weight that moves by what a test says."""

    def __init__(self) -> None:
        self.network = nn.Linear(1, 1, bias=False)
        self.weights = TrainedWeights(self.network)
        self.value = 0.0

    @property
    def value(self) -> float:
        return self.network.weight.item()

    @value.setter
    def value(self, value: float) -> None:
        self.network.weight.data.fill_(value)


def test_extrapolation_by_hand() -> None:
    """a = 1/2, rounds of two steps; e and s are the ends and beginnings of rounds.

    e_1 = 3, s_1 = 3 + (3 - 0)/2 = 4.5;  e_2 = 6.5, s_2 = 6.5 + (6.5 - 3)/2 = 8.25;  e_3 = 9, and no s_3: nothing comes after.
    """
    it = Scripted()
    past = Snapshot(it, it.weights)
    rounds = LoopRounds(it.weights, 2, 0.5, past)
    rounds.begin()
    seen = []
    for step, by in enumerate((1.0, 2.0, 1.0, 1.0, 0.25, 0.5), start=1):
        it.value += by
        rounds.stepped(step, last=step == 6)
        seen.append((it.value, past.weights["weight"].item()))
    assert seen == [(1, 0), (4.5, 4.5), (5.5, 4.5), (8.25, 8.25), (8.5, 8.25), (9, 8.25)]


def test_a_reference_alone_moves_no_weight() -> None:
    it = Scripted()
    past = Snapshot(it, it.weights)
    rounds = LoopRounds(it.weights, 2, 0.0, past)
    rounds.begin()
    for step in range(1, 5):
        it.value += 1
        rounds.stepped(step, last=False)
        assert it.value == step and past.weights["weight"].item() == step // 2 * 2
    assert rounds.state_dict()["end"] == {}  # nobody would look at it


def test_the_average_is_carried_along_by_the_same_way() -> None:
    it = Scripted()
    ema = Ema(it.network.parameters(), decay=0.5)
    rounds = LoopRounds(it.weights, 1, 0.5, ema=ema)
    rounds.begin()
    it.value = 4.0
    ema.update()  # decay (1 + 1) / (10 + 1): 4 * 9 / 11
    rounds.stepped(1, last=False)
    assert it.value == 6.0
    with ema.applied():
        assert it.value == pytest.approx(4 * 9 / 11 + 2.0)


def test_what_was_begun_goes_on_where_it_was() -> None:
    """Saved in the middle of a round and at its end, and taken up by another object after the weights were put back."""
    one, other = Scripted(), Scripted()
    for it, parts in ((one, [range(1, 10)]), (other, [range(1, 4), range(4, 7), range(7, 10)])):
        kept = None
        for part in parts:
            rounds = LoopRounds(it.weights, 2, 0.5, Snapshot(it, it.weights))
            if kept:
                rounds.load_state_dict(kept)
            rounds.begin()
            for step in part:
                it.value += 0.5 * step
                rounds.stepped(step, last=False)
            kept = rounds.state_dict()
    assert one.value == other.value


# ------------------------------------------------------------------------------------------------------------- in a run


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_rounds_that_change_nothing_leave_the_run_as_it_was_to_the_bit(lora: bool, tmp_path: Path) -> None:
    make_trainer(tmp_path / "plain", lora=lora, ema=0.9).run()
    make_trainer(tmp_path / "rounds", lora=lora, ema=0.9, round_every=2, extrapolation=0.0).run()
    for step in (2, 4, 6):
        assert_same(saved(tmp_path / "plain", step), saved(tmp_path / "rounds", step))
    for kind in ("train", "validation"):
        assert lines(tmp_path / "plain", kind) == lines(tmp_path / "rounds", kind)
    assert "rounds" not in saved(tmp_path / "plain", 6)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_run_jumps_after_its_rounds_and_the_optimizer_does_not_notice(lora: bool, tmp_path: Path) -> None:
    """Until the first round's end both runs are one; there the weights go on by half of their way, and the average with them."""
    plain = make_trainer(tmp_path / "plain", lora=lora, ema=0.9)
    start = plain._stateful["weights"].copy()
    plain.run()
    make_trainer(tmp_path / "jumping", lora=lora, ema=0.9, round_every=2, extrapolation=0.5).run()
    before, after = saved(tmp_path / "plain", 2), saved(tmp_path / "jumping", 2)
    assert_same(before["optimizer"], after["optimizer"])
    for name, w in before["weights"].items():
        torch.testing.assert_close(after["weights"][name], w + 0.5 * (w - start[name]), rtol=0, atol=1e-7)
    assert any(not torch.equal(w, after["weights"][n]) for n, w in before["weights"].items())
    for name, old, new in zip(before["weights"], before["ema"]["average"], after["ema"]["average"], strict=True):
        torch.testing.assert_close(new - old, 0.5 * (before["weights"][name] - start[name]), rtol=0, atol=1e-6)
    assert_same(after["rounds"]["end"], dict(before["weights"]))  # from which the next round's momentum is taken


def test_nothing_is_extrapolated_after_the_last_step(tmp_path: Path) -> None:
    make_trainer(tmp_path / "plain", steps=2).run()
    make_trainer(tmp_path / "jumping", steps=2, round_every=2, extrapolation=0.5).run()
    assert_same(saved(tmp_path / "plain", 2)["weights"], saved(tmp_path / "jumping", 2)["weights"])


RENEWABLE = [name for name, case in CASES.items() if case.objective.about.reference == FROZEN_START]


def test_there_are_objectives_whose_reference_can_be_renewed() -> None:
    assert {"diffusion-dpo", "ipo", "kto", "kto of pictures", "smpo", "diffusion-dro"} <= set(RENEWABLE)


@pytest.mark.parametrize("name", RENEWABLE)
def test_a_round_begins_at_its_own_reference(name: str, tmp_path: Path) -> None:
    """Policy and reference are one then: every margin is zero, which counts as half right; of three others none can be.

    Held-out pairs are still compared with the start.
    """
    case = replace(CASES[name], batch=3)
    make_trainer(tmp_path / "round", case, steps=4, round_every=2, round_reference="round").run()
    make_trainer(tmp_path / "start", case, steps=4).run()
    renewed, frozen = (lines(tmp_path / which) for which in ("round", "start"))
    assert [row["accuracy"] == 0.5 for row in renewed] == [True, False, True, False]
    assert [row["accuracy"] == 0.5 for row in frozen] == [True, False, False, False]
    assert renewed[:2] == frozen[:2]
    if case.kind == "pairs":
        held_out = [lines(tmp_path / which, "validation") for which in ("round", "start")]
        assert held_out[0][:2] == held_out[1][:2]  # at step 2 the reference of training has just become the policy
        assert held_out[0][1]["margin"] != 0


def test_iterative_dpo_begins_each_round_at_ln_2(tmp_path: Path) -> None:
    make_trainer(tmp_path, lora=False, steps=6, round_every=3, round_reference="round", extrapolation=0.5).run()
    at_ln_2 = [row["loss"] == pytest.approx(math.log(2), abs=1e-12) for row in lines(tmp_path)]
    assert at_ln_2 == [True, False, False, True, False, False]


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("every", [3, 2], ids=["in the middle of a round", "at its end"])
@pytest.mark.parametrize("reference", ["start", "round"])
def test_six_steps_are_bitwise_four_and_a_kill_and_two(lora: bool, every: int, reference: str, tmp_path: Path) -> None:
    def kill(step: int, _: Any) -> None:
        if step == 5:  # the checkpoint of step 4 is on disk, step 5 is lost
            raise RuntimeError("killed")

    rounds = {"round_every": every, "round_reference": reference, "extrapolation": 0.3}
    options = {"lora": lora, "ema": 0.9, "dropout": 0.1 if lora else 0.0, **rounds}
    make_trainer(tmp_path / "whole", **options).run()
    with pytest.raises(RuntimeError, match="killed"):
        make_trainer(tmp_path / "cut", report=kill, **options).run()
    torch.manual_seed(999)
    resumed = make_trainer(tmp_path / "cut", **options)
    assert resumed.resume() and resumed.step == 4
    resumed.run()
    assert_same(saved(tmp_path / "whole", 6), saved(tmp_path / "cut", 6))
    for kind in ("train", "validation"):
        assert lines(tmp_path / "whole", kind) == lines(tmp_path / "cut", kind)
    make_trainer(tmp_path / "other", **{**options, "extrapolation": 0.0}).run()
    other, whole = saved(tmp_path / "other", 6)["weights"], saved(tmp_path / "whole", 6)["weights"]
    assert any(not torch.equal(other[name], whole[name]) for name in whole)  # the jumps are felt at the end


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({}, "every was 2 and is now none"),
        ({"round_every": 3, "extrapolation": 0.3}, "every was 2 and is now 3"),
        ({"round_every": 2, "extrapolation": 0.2}, "extrapolation was 0.3 and is now 0.2"),
    ],
)
def test_a_run_with_other_rounds_is_another_run(other: dict, named: str, tmp_path: Path) -> None:
    make_trainer(tmp_path, steps=2, round_every=2, extrapolation=0.3).run()
    with pytest.raises(UserError, match=f"belongs to another run: rounds.{named}"):
        make_trainer(tmp_path, **other).resume()


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["sft", "seppo", "d3po", "ddpo"])
def test_an_objective_without_a_renewable_reference_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="round_reference is round, but this objective has no reference that the loop could renew"
    ):
        make_trainer(tmp_path, CASES[name], round_every=2, round_reference="round")


def test_a_round_reference_needs_somebody_who_keeps_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no reference that the loop could renew"):
        make_trainer(tmp_path, renewed=False, round_every=2, round_reference="round")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"extrapolation": 0.3}, "set round_every to their length"),
        ({"round_reference": "round"}, "set round_every to their length"),
        ({"round_every": 2, "round_reference": "last"}, "round_reference is one of start, round; got 'last'"),
        ({"round_every": 2, "extrapolation": -0.3}, "extrapolation should be at least 0"),
        ({"round_every": -2}, "round_every should be at least 0"),
    ],
)
def test_settings_that_mean_nothing(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoopSettings(**settings)


# ------------------------------------------------------------------------------------------------------ as a user calls it


def test_curry_dpo_from_the_command_line(tmp_path: Path) -> None:
    """Judged pairs, two stages of two steps, each compared with what the stage before it left."""
    model, pairs = save_untrained(tmp_path / "model"), write_pairs(tmp_path / "data", 10)
    words = ["--model", str(model), "--pairs", str(pairs), "--output", str(tmp_path / "run"), "--quiet", "--rank", "2"]
    words += ["--steps", "4", "--batch-size", "2", "--validation-pairs", "2", "--learning-rate", "1e-2", "--reward", "jpeg"]
    words += ["--curriculum", "margin", "--curriculum-stages", "2", "--curriculum-cumulative", "false"]
    words += ["--round-every", "2", "--round-reference", "round", "--extrapolation", "0.3"]
    assert cli.main(["train", "diffusion-dpo", *words]) == 0
    margins = [row["margin"] for row in lines(tmp_path / "run")]
    assert [m == 0 for m in margins] == [True, False, True, False]
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["data"]["curriculum"] == "margin" and written["loop"]["extrapolation"] == 0.3
    assert set(saved(tmp_path / "run", 4)["rounds"]["reference"]["kept"]) == set(saved(tmp_path / "run", 4)["weights"])


def test_a_curriculum_without_scores_says_where_to_get_them(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, pairs = save_untrained(tmp_path / "model"), write_pairs(tmp_path / "data", 10)
    words = ["--model", str(model), "--pairs", str(pairs), "--output", str(tmp_path / "run"), "--quiet", "--curriculum", "margin"]
    assert cli.main(["train", "diffusion-dpo", "--steps", "9", *words]) == 2
    assert "A curriculum orders pairs by a judge's scores" in capsys.readouterr().err
