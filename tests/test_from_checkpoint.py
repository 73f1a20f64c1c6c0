"""What a run had learnt by a checkpoint can be used: of runs that were stopped, blew up, or were better before their end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from family_runs import Saved, assert_equal, run, weights

from diffalign.errors import UserError
from pipelines import cli, families
from pipelines.families._lora import LORA_FILE
from pipelines.generation import generate


def written(folder: Path, out: Path, step: str, *more: str) -> Path:
    assert cli.main(["export", str(folder), "--checkpoint", step, "--out", str(out), *more]) == 0
    return out


def stopped(folder: Path) -> Path:
    """As a run looks that was stopped: there are checkpoints and no result."""
    for path in folder.iterdir():
        if path.name not in ("checkpoints", "config.yaml", "metrics.jsonl", "cache", "diffalign.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


@pytest.mark.parametrize("more", [{}, {"ema_decay": 0.9}, {"adapter": "full"}], ids=["lora", "average", "full"])
def test_the_last_checkpoint_is_the_result_and_earlier_ones_are_those_of_shorter_runs(
    more: dict, saved: Saved, pairs: Path, tmp_path: Path
) -> None:
    how = {"schedule": "constant", **more}
    for steps in (1, 3):
        run(saved, pairs, "diffusion-dpo", tmp_path / f"{steps}", steps=steps, keep_checkpoints=3, **how)
    ends = [weights(tmp_path / name) for name in ("1", "3")]
    folder = stopped(tmp_path / "3")
    assert_equal(weights(written(folder, tmp_path / "latest", "latest")), ends[1])
    assert_equal(weights(written(folder, tmp_path / "first", "1")), ends[0])
    assert any(not torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_best_checkpoint_is_the_one_with_the_lowest_validation_loss(
    saved: Saved, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Steps this large overshoot, so that the end is not the best."""
    how = {"schedule": "constant", "learning_rate": 0.05, "validation_pairs": 2}
    often = {"checkpoint_every": 1, "keep_checkpoints": 1, "keep_best": True}
    run(saved, pairs, "diffusion-dpo", tmp_path / "run", steps=6, **often, **how)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if row["kind"] == "validation" and row["step"]}
    best = min(losses, key=losses.__getitem__)
    assert best < 6
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["best_checkpoint"] == {"step": best, "validation_loss": losses[best]}
    assert f"that of step {best} has the lowest validation loss" in " ".join(capsys.readouterr().out.split())
    run(saved, pairs, "diffusion-dpo", tmp_path / "short", steps=best, **how)
    assert_equal(weights(written(tmp_path / "run", tmp_path / "best", "best")), weights(tmp_path / "short"))
    for note in (tmp_path / "run" / "checkpoints").rglob("checkpoint.json"):
        note.write_text(json.dumps({k: v for k, v in json.loads(note.read_text()).items() if k != "validation_loss"}))
    assert cli.main(["export", str(tmp_path / "run"), "--checkpoint", "best", "--out", str(tmp_path / "none")]) == 2
    assert "nobody knows the best. --keep-best" in " ".join(capsys.readouterr().err.split())


def test_what_comes_out_is_sampled_with_exported_and_gone_on_from(saved: Saved, pairs: Path, tmp_path: Path) -> None:
    run(saved, pairs, "diffusion-dpo", tmp_path / "run", steps=2)
    folder = stopped(tmp_path / "run")
    lora = written(folder, tmp_path / "lora", "2")
    generate(str(lora), "a red star", tmp_path / "pictures", load=families.load_pipeline, steps=1)
    run(saved, pairs, "diffusion-dpo", tmp_path / "more", steps=1, learning_rate=1e-4, start_lora=str(lora))
    assert json.loads((tmp_path / "more" / "summary.json").read_text())["start_lora"] == str(lora)
    assert written(folder, tmp_path / "one.safetensors", "2", "--to", "kohya").is_file()
    merged = families.load_pipeline(str(written(folder, tmp_path / "merged", "2", "--merge")))
    assert merged.unet is not None and not (tmp_path / "merged" / LORA_FILE).exists()


def test_what_cannot_be_written_is_told(saved: Saved, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(saved, pairs, "diffusion-dpo", tmp_path / "run", steps=2)
    folder = stopped(tmp_path / "run")
    for words, told in (
        (["export", str(folder), "--checkpoint", "7"], "no checkpoint of step 7; there are 1, 2, latest and best"),
        (["export", str(saved.folder), "--checkpoint", "latest"], "has no checkpoint"),
        (["export", str(folder)], "is not finished. `diffalign export"),
        (["export", str(folder / "checkpoints" / "checkpoint-00000002")], "--checkpoint 2 --out FOLDER"),
    ):
        assert cli.main([*words, "--out", str(tmp_path / "out")]) == 2
        assert told in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UserError, match="checkpoint latest"):
        families.load_pipeline(str(folder))
    (folder / "checkpoints" / "checkpoint-00000002" / "weights.pt").write_bytes(b"")
    assert cli.main(["export", str(folder), "--checkpoint", "2", "--out", str(tmp_path / "out")]) == 2
    assert "is damaged" in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "out").exists()
