"""Which rows are kept out of training, and what a run says where they are fewer than were asked for."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from diffalign import objectives
from diffalign.data.hold_out import shortfall, split_rows
from pipelines import config, families, ingredients


def test_nothing_is_said_where_as_many_are_held_out_as_were_asked_for() -> None:
    assert shortfall(29, 29, 59, "pairs") is None and shortfall(0, 0, 59, "pairs") is None


def test_rows_of_one_prompt_stay_together_and_that_is_said() -> None:
    """Ten prompts of seven rows each: of ten rows asked for, seven can be held out."""
    _, held_out = split_rows(np.repeat(np.arange(10), 7), 10, seed=0)
    line = "--validation-pairs 10 holds out 7 of 70 rows: no more than half of them are, and rows of one prompt stay together"
    assert shortfall(10, len(held_out), 70, "rows") == line


@pytest.mark.parametrize(("kind", "called"), [("pairs", "pairs"), ("pictures", "pictures")])
def test_a_run_says_how_many_it_was_asked_for_and_how_many_it_holds_out(kind: str, called: str) -> None:
    objective = objectives.load("diffusion-dpo").Objective
    said: list[str] = []
    cache = SimpleNamespace(prompt_numbers=np.arange(59), kind=kind, skipped_count=0)
    for asked in (59, 29):
        given = {"model": "tiny", "pairs": "never", "output": "never", "validation_pairs": asked}
        settings = config.resolve(config.placed(given, objective), objective)
        _, held_out = ingredients._split(settings, cache, None, families.load_family("tiny", network=False), None, said.append)
        assert len(held_out) == 29
    (line,) = [line for line in said if "--validation-pairs" in line]
    assert line.startswith(f"--validation-pairs 59 holds out 29 of 59 {called}: no more than half")
