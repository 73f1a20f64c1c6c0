"""A run that is over goes on with more steps, as if it had been asked for all of them at first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from family_runs import Saved, assert_equal, run, weights

from diffalign.errors import UserError

LEARNT = ("loss", "gradient_norm", "learning_rate")


def lines(output: Path, kind: str) -> list[dict]:
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in ("step", *LEARNT) if name in line} for line in found if line["kind"] == kind]


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("diffusion-dpo", {"ema_decay": 0.9, "warmup_steps": 2, "dropout": 0.1}),
        ("diffusion-dpo", {"adapter": "full", "reference_draws": 2}),
        ("seppo", {}),
        ("d3po", {"round_epochs": 2}),
        ("diffusion-dro", {}),
    ],
    ids=["lora", "full with cached errors", "seppo", "d3po", "diffusion-dro"],
)
def test_made_longer_it_is_the_long_run_to_the_bit(name: str, more: dict, saved: Saved, pairs: Path, tmp_path: Path) -> None:
    long, longer = tmp_path / "long", tmp_path / "longer"
    run(saved, pairs, name, long, steps=4, **more)
    run(saved, pairs, name, longer, steps=2, **more)
    short = weights(longer)
    run(saved, pairs, name, longer, steps=4, resume=True, **more)
    assert_equal(weights(long), weights(longer))
    assert any((short[key] != value).any() for key, value in weights(longer).items())
    assert lines(longer, "train") == lines(long, "train") and len(lines(long, "train")) == 4
    summary = json.loads((longer / "summary.json").read_text())
    assert summary["steps"] == 4 and "steps: 4" in (longer / "config.yaml").read_text()


@pytest.mark.parametrize(
    "more",
    [
        {"schedule": "cosine"},
        {"round_every": 1, "extrapolation": 0.5},
        {"curriculum": "margin", "curriculum_stages": 2, "reward": ("jpeg",)},
    ],
    ids=lambda more: next(iter(more)),
)
def test_where_the_length_is_learnt_it_cannot_change(more: dict, saved: Saved, pairs: Path, tmp_path: Path) -> None:
    run(saved, pairs, "diffusion-dpo", tmp_path / "run", **more)
    with pytest.raises(UserError, match="belongs to another run: steps was 2 and is now 4"):
        run(saved, pairs, "diffusion-dpo", tmp_path / "run", steps=4, resume=True, **more)


def test_a_run_cannot_be_made_shorter(saved: Saved, pairs: Path, tmp_path: Path) -> None:
    run(saved, pairs, "diffusion-dpo", tmp_path / "run", steps=3)
    before = weights(tmp_path / "run")
    with pytest.raises(UserError, match="is at step 3 already, and the run is to have 2. Resume with more steps"):
        run(saved, pairs, "diffusion-dpo", tmp_path / "run", steps=2, resume=True)
    assert_equal(before, weights(tmp_path / "run"))


def test_checkpoints_from_when_every_run_said_its_length_go_on(saved: Saved, pairs: Path, tmp_path: Path) -> None:
    run(saved, pairs, "diffusion-dpo", tmp_path / "run", steps=2)
    for note in (tmp_path / "run" / "checkpoints").glob("*/checkpoint.json"):
        written = json.loads(note.read_text())
        assert "steps" not in written["identity"] and "optimizer" not in written["identity"]["optimizer"]
        written["identity"]["steps"] = 2
        note.write_text(json.dumps(written))
    run(saved, pairs, "diffusion-dpo", tmp_path / "run", steps=3, resume=True)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3
