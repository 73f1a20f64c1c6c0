"""``--dry-run``: what is counted without loading anything is what a loaded model has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from diffalign import objectives
from pipelines import config
from pipelines.estimate import Estimate, estimate
from pipelines.families import load_family
from pipelines.image_settings import TrainSettings
from pipelines.tiny.model import checkpoint_path


def settings(**options: object) -> TrainSettings:
    objective = objectives.load("diffusion-dpo").Objective
    given = {"model": "tiny", "pairs": "tiny", "output": "never", "prompts": None, **options}
    return config.resolve(config.placed(given, objective), objective)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_parameters_are_those_of_the_loaded_model(adapter: str) -> None:
    family = load_family(str(checkpoint_path()))
    if adapter == "lora":
        family.attach_lora(rank=3)
    else:
        family.train_fully()
    guess = estimate(settings(adapter=adapter, rank=3))
    assert guess.trainable == sum(p.numel() for p in family.denoiser.trainable_parameters())
    assert guess.bytes["weights"] == 4 * sum(p.numel() for p in family.network.parameters())
    assert (guess.bytes["reference"] > 0) == (adapter == "full")


def test_activations_grow_with_the_micro_batch_and_not_with_accumulation() -> None:
    one, four, accumulated = (estimate(settings(batch_size=b, accumulation=a)) for b, a in ((1, 1), (4, 1), (1, 4)))
    assert four.bytes["activations"] == pytest.approx(4 * one.bytes["activations"], rel=0.01)
    assert accumulated.bytes == one.bytes


def test_the_comparison_is_announced_where_there_will_be_one() -> None:
    assert estimate(settings()).seconds_comparing == 0
    compared = estimate(settings(prompts="tiny", judges=["oracle"], prompt_count=10))
    assert compared.seconds_comparing > 0 and "comparison with the base" in compared.to_text()


def test_a_model_that_is_not_here_has_no_estimate_and_says_so(tmp_path: Path) -> None:
    guess = estimate(replace(settings(), model=str(tmp_path / "nowhere")))
    assert isinstance(guess, Estimate) and "nowhere" in guess.to_text()
