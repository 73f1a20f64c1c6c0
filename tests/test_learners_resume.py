"""Every objective goes on after a kill as if there had been none, to the bit: weights, optimizer, its own things, metrics."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from judged import CASES, Case, make_trainer
from worlds import assert_same, flow_denoiser, small_denoiser

from diffalign import objectives
from diffalign.errors import UserError

# The checkpoint is of step 2. Of CASES, a round is three steps long, so it falls in the middle of one; of these, on its end.
ON_A_BOUNDARY = {
    f"{name} on a boundary": replace(CASES[name], objective=replace(CASES[name].objective, **shorter))
    for name, shorter in {
        "seppo": {"round_steps": 2},
        "diffusion-dro": {"refresh": 2},
        "d3po": {"round_pairs": 2},
        "ddpo": {"round_pairs": 2},
    }.items()
}
OTHERS = {
    "kto with mismatched prompts": replace(CASES["kto"], objective=replace(CASES["kto"].objective, baseline="mismatched")),
    "diffusion-dpo with a running baseline": Case(replace(CASES["diffusion-dpo"].objective, loss="bco")),
    "diffusion-dro as in the paper": Case(replace(CASES["diffusion-dro"].objective, refresh=1, buffer=0)),
    "d3po of the best and the worst of four": Case(replace(CASES["d3po"].objective, candidates=4, timestep_fraction=0.5)),
    "d3po against the start, twice over": Case(
        replace(CASES["d3po"].objective, round_pairs=4, round_epochs=2, reference="start"), accumulation=2
    ),
}
ALL = {**CASES, **ON_A_BOUNDARY, **OTHERS}
FULL = {"sft", "kto of pictures", "smpo", "seppo", "diffusion-dro on a boundary", "d3po", "ddpo on a boundary"}
KILLED = {"diffusion-dpo", "d3po"}
"""The others are cut off after a whole run: what they have written since the checkpoint is to be forgotten, too."""


def test_every_objective_is_among_them() -> None:
    assert {name for name in CASES if name in objectives.names(of_prompts=False)} == set(objectives.names(of_prompts=False))


def last_state(folder: Path) -> dict[str, Any]:
    """Everything in the last checkpoint."""
    found = sorted((folder / "checkpoints").glob("checkpoint-*"))[-1]
    assert found.name == "checkpoint-00000004"
    return {p.stem: torch.load(p, weights_only=True) for p in found.glob("*.pt")}


def numbers(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def kill(step: int, _: Any) -> None:
    if step == 3:  # the checkpoint of step 2 is on disk, step 3 is lost
        raise RuntimeError("killed")


@pytest.mark.parametrize("make, name", [(small_denoiser, name) for name in ALL] + [(flow_denoiser, name) for name in CASES])
def test_four_steps_are_bitwise_two_and_a_kill_and_two(make: Callable, name: str, tmp_path: Path) -> None:
    options = {"case": ALL[name], "lora": name not in FULL, "dropout": 0.0 if name in FULL else 0.1, "make": make}
    whole = make_trainer(tmp_path / "whole", **options)
    began = {key: value.clone() for key, value in whole._stateful["weights"].state_dict().items()}
    whole.run()
    if name in KILLED:
        with pytest.raises(RuntimeError, match="killed"):
            make_trainer(tmp_path / "cut", report=kill, **options).run()
    else:
        shutil.copytree(tmp_path / "whole", tmp_path / "cut")
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / "checkpoint-00000004")
    torch.manual_seed(999)
    resumed = make_trainer(tmp_path / "cut", **options)
    assert resumed.resume()
    assert resumed.step == 2
    resumed.run()
    one, other = last_state(tmp_path / "whole"), last_state(tmp_path / "cut")
    assert_same(one, other)
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "cut")
    assert any(not torch.equal(value, one["weights"][key]) for key, value in began.items())  # something was learnt
    learnt = [row["loss"] for row in numbers(tmp_path / "whole") if row["kind"] == "train"]
    assert len(set(learnt)) > 1


@pytest.mark.parametrize(
    "name, stateful",
    {
        "seppo": {"bank"},
        "diffusion-dro": {"buffer", "delayed"},
        "d3po": {"round"},
        "ddpo": {"round", "rewards"},
        "kto": {"baseline"},
        "diffusion-dpo": set(),
        "smpo": set(),
    }.items(),
)
def test_what_is_saved_beside_the_weights(name: str, stateful: set[str], tmp_path: Path) -> None:
    make_trainer(tmp_path, CASES[name], lora=True, steps=2).run()
    saved = json.loads((tmp_path / "checkpoints" / "checkpoint-00000002" / "checkpoint.json").read_text())["stateful"]
    assert set(saved) == {"weights", "optimizer", "schedule", "position", "random"} | stateful


def test_a_buffer_of_another_size_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, CASES["diffusion-dro"], lora=True, steps=2).run()
    larger = replace(CASES["diffusion-dro"], objective=replace(CASES["diffusion-dro"].objective, buffer=6))
    with pytest.raises(ValueError, match="up to 5 trajectories, this one up to 6"):
        make_trainer(tmp_path, larger, lora=True).resume()


def test_a_past_of_other_weights_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, CASES["d3po"], lora=True, steps=2).run()
    with pytest.raises(UserError, match="holds other weights than this run trains"):
        make_trainer(tmp_path, CASES["d3po"], lora=False).resume()
