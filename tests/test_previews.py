"""Pictures while a run goes on: of the policy as it is, from the same noise, and without a trace in what is learnt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from family_runs import Saved, assert_equal, brightness, on_disk, run, weights, write_pairs
from launched import together
from PIL import Image
from spread import environment

from diffalign.errors import UserError
from pipelines import previews
from pipelines.training import align

FAMILIES = ["stable_diffusion", "sdxl", "pixart", "sd3", "flux", "sana", "z_image"]
SHOWN = {"preview_every": 1, "preview_steps": 2, "preview_count": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("previews")
    (folder / "p.txt").write_text("a large red star\na small blue circle\na green cross\n")
    return folder


@pytest.fixture(scope="module")
def pairs(folder: Path) -> Path:
    return write_pairs(folder / "data")


def sheets(output: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted((output / "previews").iterdir())}


def miniature(name: str, folder: Path) -> Saved:
    return on_disk(name, folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_shows_what_it_has_learnt(name: str, folder: Path, pairs: Path, tmp_path: Path) -> None:
    run(
        miniature(name, folder), pairs, "diffusion-dpo", tmp_path / "run", steps=1, preview_prompts=str(folder / "p.txt"), **SHOWN
    )
    found = sheets(tmp_path / "run")
    assert list(found) == ["00000000.png", "00000001.png"]
    before, after = found.values()
    assert before.shape == after.shape and before.std() > 5 and not np.array_equal(before, after)


def test_the_same_is_learnt_with_and_without(folder: Path, pairs: Path, tmp_path: Path) -> None:
    saved, prompts = miniature("stable_diffusion", folder), {"preview_prompts": str(folder / "p.txt")}
    how = {"steps": 3, "dropout": 0.3, "ema_decay": 0.9, "tracker": "tensorboard"}
    run(saved, pairs, "diffusion-dpo", tmp_path / "without", **how)
    run(saved, pairs, "diffusion-dpo", tmp_path / "with", **how, **prompts, **SHOWN)
    assert_equal(weights(tmp_path / "with"), weights(tmp_path / "without"))
    whole = sheets(tmp_path / "with")
    assert list(whole) == [f"{step:08d}.png" for step in range(4)]
    assert len(shown_to_tensorboard(tmp_path / "with")) == 4
    run(saved, pairs, "diffusion-dpo", tmp_path / "other", **{**how, "steps": 1}, **prompts, **SHOWN)
    assert np.array_equal(sheets(tmp_path / "other")["00000000.png"], whole["00000000.png"])


def shown_to_tensorboard(output: Path) -> list:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = []
    for file in output.rglob("events.out.tfevents*"):  # the settings have one of their own
        events = EventAccumulator(str(file), {"images": 0})
        events.Reload()
        found += events.Images("previews") if "previews" in events.Tags()["images"] else []
    return found


def test_an_objective_that_samples_and_a_run_that_goes_on(folder: Path, pairs: Path, tmp_path: Path) -> None:
    saved, how = miniature("stable_diffusion", folder), {**SHOWN, "preview_every": 2, "preview_prompts": str(folder / "p.txt")}
    run(saved, pairs, "d3po", tmp_path / "run", steps=4, judge=brightness, **how)
    found = sheets(tmp_path / "run")
    assert list(found) == ["00000000.png", "00000002.png", "00000004.png"]
    for gone in ("00000004.png", "00000000.png"):
        (tmp_path / "run" / "previews" / gone).unlink()
    last = tmp_path / "run" / "checkpoints" / "checkpoint-00000004"
    last.rename(tmp_path / "aside")
    run(saved, pairs, "d3po", tmp_path / "run", steps=4, judge=brightness, resume=True, **how)
    again = sheets(tmp_path / "run")
    assert list(again) == ["00000002.png", "00000004.png"]
    assert np.array_equal(again["00000004.png"], found["00000004.png"])


def test_a_run_goes_on_where_there_is_no_memory_for_pictures(
    folder: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    own, calls = previews.Previews._sampled, []
    monkeypatch.setattr(previews.Previews, "_sampled", lambda self: full() if calls else calls.append(1) or own(self))
    prompts = {"preview_prompts": str(folder / "p.txt")}
    run(miniature("stable_diffusion", folder), pairs, "diffusion-dpo", tmp_path / "run", steps=3, **prompts, **SHOWN)
    assert list(sheets(tmp_path / "run")) == ["00000000.png"]
    assert capsys.readouterr().out.count("no memory for previews") == 1


def drawn_together(place: str, rank: int, folder: Path, pairs: Path, output: Path) -> list[tuple[int, str, str]]:
    """Two steps on two processes with sharded weights, one of which finds no memory in ``previews.PLACE``, the second time."""
    words = [Path(__file__).with_name("drawing_together.py"), place, rank, "train", "diffusion-dpo", "--adapter", "full"]
    words += ["--model", miniature("stable_diffusion", folder).folder, "--pairs", pairs, "--output", output, "--steps", "2"]
    words += ["--validation-pairs", "2", "--prompts", "none", "--preview-prompts", folder / "p.txt", "--quiet"]
    words += ["--preview-every", "1", "--preview-steps", "1", "--preview-count", "1"]
    return together([words] * 2, **environment("fsdp2"))


def test_processes_give_up_together(folder: Path, pairs: Path, tmp_path: Path) -> None:
    """Nobody draws alone: the next sampling would meet the others' training step."""
    found = drawn_together("_picture", 0, folder, pairs, tmp_path / "run")
    assert [status for status, _, _ in found] == [0, 0], found
    assert [said.count("no memory for previews") for _, said, _ in found] == [1, 0]
    assert list(sheets(tmp_path / "run")) == ["00000000.png"]


def test_no_memory_in_the_middle_of_what_all_do_ends_all(folder: Path, pairs: Path, tmp_path: Path) -> None:
    (other, _, _), (status, _, told) = drawn_together("rollout", 1, folder, pairs, tmp_path / "run")
    assert other != 0 and status == 2
    assert "Process 1 has no memory for previews" in told and "without --preview-every" in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"preview_every": 5}, "nothing to draw previews of"),
        ({"preview_every": 5, "preview_prompts": "nowhere.txt"}, "nowhere.txt"),
        ({"preview_count": 3}, "preview_count would do nothing: --preview-every"),
    ],
)
def test_what_would_show_nothing_is_refused_before_anything_is_loaded(options: dict, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        align("diffusion-dpo", model="tiny", pairs="tiny", output=str(tmp_path / "run"), **options)
    assert not (tmp_path / "run").exists()
