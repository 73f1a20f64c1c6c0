"""An objective that somebody else wrote, from public parts alone: it stands beside the shipped ones."""

from __future__ import annotations

import json
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from family_runs import Saved, assert_equal, run, weights
from torch import Tensor
from torch.nn import functional as F

from diffalign import objectives
from diffalign.errors import UserError
from diffalign.learner import Learner, RunContext
from diffalign.likelihood import denoising, log_ratio, pair_errors
from diffalign.objectives import FROZEN_START, PAIRS, About, Cost, register
from diffalign.protocols import Predictor
from diffalign.settings import check_options, option
from diffalign.sources.dataset import noised
from diffalign.types import Outcome, PairBatch
from pipelines import cli
from pipelines.run import settings_of


@dataclass(frozen=True)
class Anchored:
    """DPO that is also held to the winner."""

    about: ClassVar[About] = About("0000.00000", "data set", FROZEN_START, "own", (PAIRS,), draws_ahead=True)
    cost: ClassVar[Cost] = Cost(with_gradient=2, forward_only=2)
    beta: float = option(2000.0, "strength of the tie to the reference", gt=0)
    anchor: float = option(0.1, "how much the winner's error counts", ge=0)

    def __post_init__(self) -> None:
        check_options(self)

    def learner(self, given: RunContext) -> Learner:
        given.require(pairs="preference pairs")

        def losses(batch: PairBatch) -> Outcome:
            return self(batch, given.policy, given.compared_with)

        return Learner(given.pairs, losses, losses, reference=given.reference)

    def __call__(self, batch: PairBatch, policy: Predictor, reference: Predictor) -> Outcome:
        pair = noised(batch, policy.schedule)
        before, now = pair_errors(reference, pair), pair_errors(policy, pair)
        margin = self.beta / 2 * log_ratio(denoising(*now), denoising(*before)).margin
        loss: Tensor = -F.logsigmoid(margin) + self.anchor * now[0]
        return Outcome(loss, pair.t, {"margin_of_my_own": margin.detach()})


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "_BROUGHT", {})
    register("anchored")(Anchored)


@pytest.mark.curves
@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("more", [{}, {"adapter": "full"}, {"reference_draws": 2}], ids=["lora", "full", "cached errors"])
def test_it_trains_and_resumes_to_the_bit(more: dict, saved: Saved, pairs: Path, tmp_path: Path) -> None:
    run(saved, pairs, "anchored", tmp_path / "whole", steps=2, anchor=0.5, checkpoint_every=1, **more)
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "aligned by anchored" in card and (tmp_path / "whole" / "curves.png").is_file()
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert any("margin_of_my_own" in row for row in rows if row["kind"] == "validation")
    (tmp_path / "whole" / "checkpoints" / "checkpoint-00000002").rename(tmp_path / "aside")
    first = weights(tmp_path / "whole")
    run(saved, pairs, "anchored", tmp_path / "whole", steps=2, anchor=0.5, checkpoint_every=1, resume=True, **more)
    assert_equal(first, weights(tmp_path / "whole"))


@pytest.mark.usefixtures("registered")
def test_the_command_line_knows_it(capsys: pytest.CaptureFixture) -> None:
    assert "anchored" in objectives.names(of_prompts=False) and objectives.load("anchored").Objective is Anchored
    assert cli.main(["objectives"]) == 0 and "anchored" in capsys.readouterr().out
    assert cli.main(["objectives", "anchored"]) == 0
    assert "how much the winner's error counts" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        cli.main(["train", "anchored", "--help"])
    assert "--anchor" in capsys.readouterr().out


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(("taken", "of"), [("alpha", "lora"), ("seed", "every run"), ("recipe", "the call")])
def test_a_setting_that_is_called_like_another_is_refused(taken: str, of: str, capsys: pytest.CaptureFixture) -> None:
    """Or it would never be reached: ``align("scaled", alpha=2)`` would scale the LoRA."""
    scaled = make_dataclass("Scaled", [(taken, float, option(0.5, "scale"))], bases=(Anchored,), frozen=True)
    register("scaled")(scaled)
    words = rf"Scaled calls settings of its own as others are called already: {taken} \(of {of}\)\."
    with pytest.raises(UserError, match=words):
        settings_of("scaled", None, {"model": "m", "pairs": "p", "output": "o", taken: 2})
    assert cli.main(["train", "diffusion-dpo", "--recipe", "list"]) == 2
    assert f"diffalign train: Scaled calls settings of its own as others are called already: {taken}" in capsys.readouterr().err


@pytest.mark.usefixtures("registered")
def test_what_cannot_be_registered_is_told() -> None:
    with pytest.raises(UserError, match="There is an objective 'kto' already"):
        register("kto")
    with pytest.raises(UserError, match="small letters, digits and hyphens"):
        register("My DPO")
    with pytest.raises(UserError, match="lacks cost, learner"):
        register("bare")(dataclass(frozen=True)(type("Bare", (), {"about": Anchored.about})))
    register("anchored")(Anchored)  # a cell that is run again
