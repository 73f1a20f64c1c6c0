"""``--reference-draws``: whole runs without a reference, and what is refused before they begin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_runs import assert_equal, on_disk, weights, write_pairs

from diffalign.errors import StaleCacheError, UserError
from pipelines import dry_run, reference_errors
from pipelines.families._denoiser import NetworkDenoiser
from pipelines.families._family import Family
from pipelines.run import settings_of
from pipelines.training import align

PACE = {"steps": 3, "batch_size": 2, "learning_rate": 1e-3, "checkpoint_every": 1, "tracker": "none", "progress": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def pairs(folders: Path) -> Path:
    return write_pairs(folders / "data", 6)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Samples of every call of a network that is loaded to be trained or is a copy of one, and whether with a gradient."""
    calls: list[tuple[int, bool]] = []
    plain = NetworkDenoiser.__call__

    def heard(self: NetworkDenoiser, x_t: torch.Tensor, *given: Any) -> torch.Tensor:
        calls.append((len(x_t), torch.is_grad_enabled()))
        return plain(self, x_t, *given)

    monkeypatch.setattr(NetworkDenoiser, "__call__", heard)
    return calls


@pytest.fixture
def no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a second network was made")

    monkeypatch.setattr(Family, "frozen_copy", refuse)


def looked(calls: list[tuple[int, bool]]) -> int:
    """Samples without a gradient."""
    return sum(n for n, learning in calls if not learning)


def run(
    folders: Path, pairs: Path, output: Path, name: str = "diffusion-dpo", family: str = "stable_diffusion", **more: Any
) -> dict:
    saved = on_disk(family, folders)
    own = {"validation_pairs": 2, "validation_draws": 2, "cache": folders / f"{family}-cache", "resolution": 32, "prompts": None}
    return align(name, model=str(saved.folder), pairs=str(pairs), output=output, **{**own, **PACE, **more})


def metrics(output: Path, kind: str) -> list[dict]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_run_asks_once_and_then_no_more(
    adapter: str, folders: Path, pairs: Path, tmp_path: Path, asked: list, no_copy: None
) -> None:
    kept = tmp_path / "kept"
    run(folders, pairs, tmp_path / "one", adapter=adapter, reference_draws=3, reference_cache=kept)
    validation = 2 * 2 * 2  # two pairs, two draws, two pictures
    assert looked(asked) == 6 * 3 * 2 + validation * 3  # all pairs at three draws; held-out ones beforehand, at start and end
    assert sum(n for n, learning in asked if learning) == 3 * 2 * 2
    asked.clear()
    run(folders, pairs, tmp_path / "two", adapter=adapter, reference_draws=3, reference_cache=kept, beta=500, learning_rate=1e-4)
    run(folders, pairs, tmp_path / "ipo", "ipo", adapter=adapter, reference_draws=3, reference_cache=kept)
    assert looked(asked) == 2 * validation * 3  # another beta, another rate, another objective: only what is held out
    (start, *_) = metrics(tmp_path / "one", "validation")
    assert start["margin"] == pytest.approx(0, abs=2e-3) and start["loss"] == pytest.approx(0.6931, abs=1e-3)
    first = metrics(tmp_path / "one", "train")[0]
    assert first["margin"] == pytest.approx(0, abs=2e-3)  # the policy is still the reference: these are its own draws


def test_it_is_asked_many_at_a_time_and_how_many_makes_no_other_errors(
    folders: Path, pairs: Path, tmp_path: Path, asked: list
) -> None:
    """Six pairs at three draws each, all in one shard; winners and losers in one call."""
    for name, how, sizes in (
        ("default", {"encode_batch": 1}, [8, 8, 2]),
        ("told", {"reference_batch": 5}, [5, 5, 5, 3]),
        ("recomputing", {"gradient_checkpointing": True, "encode_batch": 6}, [3] * 6),
    ):
        asked.clear()
        run(folders, pairs, tmp_path / name, reference_draws=3, reference_cache=tmp_path / f"{name}-kept", steps=1, **how)
        assert [n for n, _ in asked][: len(sizes)] == [2 * size for size in sizes], name
    kept = [np.load(tmp_path / f"{name}-kept/errors.npy") for name in ("default", "told")]
    np.testing.assert_allclose(kept[0], kept[1], rtol=1e-5)
    asked.clear()
    run(folders, pairs, tmp_path / "again", reference_draws=3, reference_cache=tmp_path / "told-kept", steps=1, batch_size=3)
    assert looked(asked) == 2 * 2 * 2 * 3  # what is held out alone


@pytest.mark.parametrize(
    ("options", "pairs_at_once"),
    [
        ({}, 8),
        ({"batch_size": 12}, 12),
        ({"reference_batch": 3, "batch_size": 12}, 3),
        ({"gradient_checkpointing": True}, 4),
        ({"gradient_checkpointing": True, "batch_size": 6, "encode_batch": 1}, 6),
        ({"gradient_checkpointing": True, "encode_batch": 1}, 1),
    ],
)
def test_how_many_are_asked_at_a_time(options: dict, pairs_at_once: int, tmp_path: Path) -> None:
    given = {"model": "m", "pairs": "p", "output": tmp_path, "prompts": None, "reference_draws": 1, **options}
    assert reference_errors.pairs_at_once(settings_of("diffusion-dpo", None, given)) == pairs_at_once


def test_draws_beyond_the_visits_are_remarked_on(
    folders: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Three steps of two pairs visit four pairs 1.5 times. What is cached already costs nothing any more."""
    told = "reference_draws 3, and each pair is visited 1.5 times: beforehand the reference is asked 2.0 times as often"
    for draws, kept, said in ((1, "few", False), (3, "many", True), (3, "many", False)):
        how = {"reference_draws": draws, "reference_cache": tmp_path / kept}
        given = {"model": on_disk("stable_diffusion", folders).folder, "pairs": pairs, "output": "never", "prompts": None}
        settings = settings_of("diffusion-dpo", None, {**given, "validation_pairs": 2, "steps": 3, "batch_size": 2, **how})
        assert any(told in remark for remark in dry_run.look(settings).remarks) == said
        capsys.readouterr()
        run(folders, pairs, tmp_path / f"{kept}-{said}", **how)
        assert (told in capsys.readouterr().out) == said


def test_encoded_pairs_are_no_cached_errors(folders: Path, pairs: Path, tmp_path: Path) -> None:
    run(folders, pairs, tmp_path / "plain", steps=1)
    named = r"holds encoded pairs, not cached reference errors: name another folder \(--reference-cache\)"
    with pytest.raises(UserError, match=named):
        run(folders, pairs, tmp_path / "out", reference_draws=2, reference_cache=folders / "stable_diffusion-cache", steps=1)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_validation_is_that_of_a_run_with_its_reference(adapter: str, folders: Path, pairs: Path, tmp_path: Path) -> None:
    """The draws of held-out pairs are the same, and both runs begin at the same weights."""
    run(folders, pairs, tmp_path / "known", adapter=adapter, beta=10, reference_draws=2, reference_cache=tmp_path / "kept")
    run(folders, pairs, tmp_path / "asked", adapter=adapter, beta=10)
    known, by_network = (metrics(tmp_path / name, "validation")[0] for name in ("known", "asked"))
    for name in ("loss", "margin", "winner_error", "loser_error"):
        assert known[name] == pytest.approx(by_network[name], abs=1e-6), name


def test_the_reference_lies_below_a_lora_that_training_goes_on_from(folders: Path, pairs: Path, tmp_path: Path) -> None:
    run(folders, pairs, tmp_path / "first", learning_rate=1e-2)
    how = {"start_lora": tmp_path / "first"}
    run(folders, pairs, tmp_path / "known", reference_draws=2, reference_cache=tmp_path / "kept", **how)
    run(folders, pairs, tmp_path / "asked", **how)
    known, by_network = (metrics(tmp_path / name, "validation")[0] for name in ("known", "asked"))
    assert abs(by_network["margin"]) > 0.1  # the first LoRA has moved the policy
    for name in ("loss", "margin", "winner_drift"):
        assert known[name] == pytest.approx(by_network[name], rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_resumed_run_is_the_whole_one(adapter: str, folders: Path, pairs: Path, tmp_path: Path) -> None:
    how = {"adapter": adapter, "reference_draws": 2, "reference_cache": tmp_path / "kept"}
    run(folders, pairs, tmp_path / "whole", **how)
    run(folders, pairs, tmp_path / "cut", **how)
    last = tmp_path / "cut" / "checkpoints" / "checkpoint-00000003"
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    run(folders, pairs, tmp_path / "cut", resume=True, **how)
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    with pytest.raises(UserError, match="cached_errors"):
        run(folders, pairs, tmp_path / "cut", resume=True, adapter=adapter)


@pytest.mark.parametrize("name", ["sft", "mapo"])
def test_who_never_asks_has_no_copy(name: str, folders: Path, pairs: Path, tmp_path: Path, asked: list, no_copy: None) -> None:
    run(folders, pairs, tmp_path / "out", name, adapter="full")
    assert looked(asked) == 3 * 2 * 2 * 2  # what is held out: beforehand, at start and end
    first = metrics(tmp_path / "out", "validation")[0]
    assert first["margin"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_other_families(family: str, folders: Path, pairs: Path, tmp_path: Path, asked: list) -> None:
    how = {"family": family, "reference_draws": 2, "reference_cache": tmp_path / "kept", "validation_pairs": 0}
    run(folders, pairs, tmp_path / "out", **how)
    assert looked(asked) == 6 * 2 * 2
    assert metrics(tmp_path / "out", "train")[0]["margin"] == pytest.approx(0, abs=5e-3)


def test_other_circumstances_are_refused(folders: Path, pairs: Path, tmp_path: Path) -> None:
    how = {"reference_draws": 2, "reference_cache": tmp_path / "kept"}
    run(folders, pairs, tmp_path / "out", **how)
    for changed, named in (
        ({"reference_draws": 3}, "draws.count was 2 and is now 3"),
        ({"reference_seed": 1}, "draws.seed was 0 and is now 1"),
        ({"prompt_dropout": 0.5}, "draws.prompt_dropout was 0.2 and is now 0.5"),
        ({"error_as": "v_prediction"}, "schedule.error_as was"),
    ):
        with pytest.raises(StaleCacheError, match=named):
            run(folders, pairs, tmp_path / f"out-{named[:9]}", **{**how, **changed})


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("smpo", {"smoothing": "label"}, "needs pairs that are only noised"),
        ("seppo", {}, "needs pairs that are only noised"),
        ("kto", {"baseline": "mismatched"}, "mismatched prompts"),
        ("diffusion-dpo", {"round_reference": "round", "round_every": 1}, "round_reference is round"),
    ],
    ids=["smpo", "seppo", "kto", "rounds"],
)
def test_what_nobody_can_know_beforehand_is_refused_at_once(
    name: str, options: dict, words: str, pairs: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"reference.reference_draws: .*{words}"):
        align(name, model="nowhere", pairs=str(pairs), output=tmp_path / "out", reference_draws=4, **options)
    assert not (tmp_path / "out").exists()
