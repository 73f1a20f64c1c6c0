"""What the numbers of a validation are taken to mean, and that somebody hears of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from family_runs import Saved, run

from diffalign.health import advice, denoising_health, error_over_pairs, policy_health, token_health
from diffalign.types import LogLikelihood, LogRatio

PICTURES = {"margin": 1.0, "accuracy": 0.6, "winner_drift": 0.0, "loser_drift": 0.001, "reference_winner_error": 0.1}
TEXTS = {"margin": 1.0, "accuracy": 0.6, "winner_ratio": 0.5, "loser_ratio": -0.5}


@pytest.mark.parametrize(
    ("means", "said"),
    [
        (PICTURES, None),
        (PICTURES | {"loser_drift": 0.0}, "has not moved"),
        (PICTURES | {"winner_drift": 0.0021, "loser_drift": 0.0042}, "errors rose by 2.1% and 4.2%"),
        (PICTURES | {"winner_drift": 0.0019, "loser_drift": 0.5}, None),  # the winner's is within bounds
        (PICTURES | {"margin": -0.1, "accuracy": 0.4}, "prefers the losers"),
        (PICTURES | {"margin": -0.1}, None),  # a few confident mistakes
        (PICTURES | {"margin": -0.03, "accuracy": 0.4}, None),  # within two standard errors of zero
        (TEXTS, None),
        (TEXTS | {"winner_ratio": 0.0, "loser_ratio": 0.0}, "has not moved"),
        (TEXTS | {"winner_ratio": -6.0, "loser_ratio": -7.0}, "less likely"),
        (TEXTS | {"margin": -0.1, "accuracy": 0.4}, "prefers rejected rewrites"),
        (TEXTS | {"margin": -0.03, "accuracy": 0.4}, None),
        ({"loss": 0.1}, None),  # an objective without a pair has neither
    ],
)
def test_each_known_trouble_has_its_sentence(means: dict, said: str | None) -> None:
    found = advice(means, margin_error=0.02)
    assert found is None if said is None else said in found


def test_of_one_held_out_pair_nobody_says_that_labels_are_wrong() -> None:
    one = error_over_pairs(torch.tensor([-1.0, -2.0]), torch.tensor([7, 7]))
    assert math.isnan(one) and advice(PICTURES | {"margin": -1.5, "accuracy": 0.0}, one) is None


def test_draws_of_one_pair_are_no_independent_samples() -> None:
    margins, rows = torch.tensor([1.0, 3.0, 5.0, 5.0, 8.0]), torch.tensor([4, 2, 4, 2, 9])
    assert error_over_pairs(margins, rows) == pytest.approx(torch.tensor([3.0, 4.0, 8.0]).std().item() / 3**0.5)


def test_a_tie_has_no_winner_to_be_ranked_first() -> None:
    label, ones = torch.tensor([1.0, 0.5, 0.5, 1.0]), torch.ones(4)
    winner, loser = torch.tensor([0.2, 0.3, -0.3, -0.1]), torch.zeros(4)
    ratio, errors = LogRatio(winner, loser), (-winner, -loser)
    likelihood = LogLikelihood(winner, loser)
    for found in (
        denoising_health(ratio, errors, errors, 10.0, label),
        policy_health(errors, 10.0, label),
        token_health(likelihood, None, 10.0, (ones, ones), label),
        token_health(likelihood, LogLikelihood(loser, loser), 10.0, (ones, ones), label),
    ):
        assert found["accuracy"].tolist() == [1.0, 0.5, 0.5, 0.0] and found["margin"].tolist() == [2.0, 0.0, 0.0, -1.0]


def test_a_run_ends_with_what_its_last_validation_advises(
    saved: Saved, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run(saved, pairs, "diffusion-dpo", tmp_path / "run", steps=3, learning_rate=1e-12, validation_draws=8)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    last = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["kind"] == "validation" and last["step"] == 3
    assert summary["advice"] == last["advice"] and len(summary["advice"]) > 20
    assert f"the last validation: {summary['advice']}" in capsys.readouterr().out
    run(saved, pairs, "diffusion-dpo", tmp_path / "calm", steps=1, learning_rate=1e-4, validation_draws=8)
    assert "advice" not in json.loads((tmp_path / "calm" / "summary.json").read_text())
