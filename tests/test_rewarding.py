"""Judges in training: people's own functions, several at once, which way is better, and pictures that nobody can judge."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from miniature import save_untrained, write_pairs
from threads import in_threads

import reward_models
from diffalign.data.open import open_pairs
from diffalign.errors import UserError
from diffalign.processes import OneProcess
from pipelines import own_judges, rewarding
from pipelines.rewarding import PictureJudge, direction, pair_scores, rewards_of, score_range
from pipelines.training import align
from reward_models.base import RewardInfo

PICTURES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "c"]


def redness(pictures: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return pictures[:, 0].mean(dim=(1, 2)) - pictures[:, 2].mean(dim=(1, 2))


def test_functions_and_judges_stand_side_by_side_in_their_order() -> None:
    jpeg = reward_models.load("jpeg")
    rewards = rewards_of({"red": redness, "jpeg": jpeg}, PICTURES, PROMPTS)
    assert rewards.shape == (3, 2) and rewards.dtype == torch.float64
    torch.testing.assert_close(rewards[:, 0], redness(PICTURES, PROMPTS).double())
    torch.testing.assert_close(rewards[:, 1], jpeg.score(list(PICTURES), PROMPTS).double())


def test_smaller_is_turned_into_larger() -> None:
    jpeg = reward_models.load("jpeg")
    before = rewards_of({"jpeg": jpeg}, PICTURES, PROMPTS)
    assert direction(jpeg) == 1.0 and direction(redness) == 1.0
    jpeg.info = RewardInfo(name="jpeg", needs_prompt=False, higher_is_better=False, description="the same, upside down")
    assert direction(jpeg) == -1.0
    torch.testing.assert_close(rewards_of({"jpeg": jpeg}, PICTURES, PROMPTS), -before)


@pytest.mark.parametrize(
    ("judge", "words"),
    [
        (lambda pictures, prompts: [1.0, 2.0], "should give 3 numbers, one for each picture; got \\[2\\]"),
        (lambda pictures, prompts: "very nice", "should give numbers; it gave str"),
        (lambda pictures, prompts: torch.zeros(3, 2), "got \\[3, 2\\]"),
    ],
)
def test_a_function_that_gives_something_else_is_told(judge, words: str) -> None:
    with pytest.raises(UserError, match=words):
        rewards_of({"mine": judge}, PICTURES, PROMPTS)


def test_a_picture_without_a_number_stops_training_with_its_prompt() -> None:
    judge = PictureJudge(
        lambda z: z, {"mine": lambda pictures, prompts: [math.nan if p == "b" else 0.0 for p in prompts]}, PROMPTS, batch=2
    )
    with pytest.raises(UserError, match="The judge mine gives no number for a picture of 'b'"):
        judge(PICTURES, [0, 1, 2])


def test_latents_are_decoded_a_few_at_a_time_and_keep_their_order() -> None:
    seen = []

    def decode(latents: torch.Tensor) -> torch.Tensor:
        seen.append(len(latents))
        return latents.clamp(0, 1)

    judge = PictureJudge(decode, {"red": redness}, PROMPTS, batch=2)
    torch.testing.assert_close(judge(PICTURES, [2, 0, 1])[:, 0], redness(PICTURES, PROMPTS).double())
    assert seen == [2, 1]


def test_the_range_of_scores_ignores_what_is_not_there() -> None:
    assert score_range(torch.tensor([[1.0, math.nan], [3.0, 2.0]])) == (1.0, 3.0)
    assert score_range(None) is None and score_range(torch.full((2, 2), 5.0)) is None
    assert score_range(torch.full((2, 2), math.nan)) is None


ONLINE = {"steps": 1, "batch_size": 4, "accumulation": 1, "round_pairs": 1, "rollout_steps": 2, "rank": 2, "prompts": "none"}


def test_a_function_of_ones_own_rewards_training(tmp_path: Path) -> None:
    model = save_untrained(tmp_path / "model")
    shown = []

    def mine(pictures: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        shown.append((tuple(pictures.shape[:2]), float(pictures.min()) >= 0 and float(pictures.max()) <= 1, sorted(set(prompts))))
        return redness(pictures, prompts)

    common = {"model": str(model), "train_prompts": str(write_captions(tmp_path)), "progress": False, **ONLINE}
    summary = align("d3po", judge=mine, output=str(tmp_path / "run"), **common)
    assert shown and shown[0][0] == (2, 3) and shown[0][1] and set(shown[0][2]) <= {"a red circle", "a blue star"}
    assert summary["steps"] == 1 and "mine" in (tmp_path / "run" / "config.yaml").read_text()
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert math.isfinite(line["reward"])


def test_pairs_are_judged_once_by_all_processes_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And on whatever run comes next not at all; by another judge anew."""
    monkeypatch.setattr(rewarding, "JUDGED_AT_ONCE", 3)
    table, opened = open_pairs(write_pairs(tmp_path / "data", 10)), []
    original = reward_models.score

    def counting(judge: dict, pictures: list, prompts: list[str], **how: object) -> dict:
        opened.append(len(pictures))
        return original(judge, pictures, prompts, **how)

    monkeypatch.setattr(reward_models, "score", counting)
    rows, jpeg = np.array([0, 1, 2, 4, 5, 6, 7, 9]), {"jpeg": reward_models.load("jpeg")}
    first, second = in_threads(2, lambda process: pair_scores(table, rows, jpeg, tmp_path / "cache", process))
    sides = [(table[int(row)].winner, table[int(row)].loser) for row in rows]
    expected = torch.stack([jpeg["jpeg"].score([side.open() for side in both], ["", ""]) for both in sides])
    torch.testing.assert_close(first, expected.float())
    assert sum(opened) == 2 * len(rows)
    again = pair_scores(table, rows, jpeg, tmp_path / "cache", OneProcess())
    assert torch.equal(first, second) and torch.equal(first, again) and sum(opened) == 2 * len(rows)
    oracle = {"oracle": reward_models.load("oracle")}
    assert not torch.equal(pair_scores(table, rows, oracle, tmp_path / "cache", OneProcess()), first)


@pytest.mark.parametrize(
    ("judges", "reason"),
    [
        ({"judge": redness}, "A function rewards what is sampled"),
        ({"reward": ["jpeg", "oracle"]}, "scored by one judge; --reward names 2: jpeg, oracle"),
    ],
)
def test_what_cannot_score_pairs_is_refused_before_anything_is_loaded(judges: dict, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason):
        align("smpo", recipe="tiny", model="nowhere", output=str(tmp_path / "run"), steps=1, prompts="none", **judges)


class Bright(reward_models.PointwiseJudge):
    """Likes dark pictures: its score is how bright they are."""

    info = RewardInfo(name="bright", needs_prompt=False, higher_is_better=False)

    def score_prepared(self, prepared: list, prompts: list[str]) -> torch.Tensor:
        return torch.tensor([np.asarray(picture.convert("RGB")).mean() for picture in prepared])


def test_a_judge_of_ones_own_rewards_what_is_sampled_and_scores_pairs(tmp_path: Path) -> None:
    common = {"model": str(save_untrained(tmp_path / "model")), "progress": False, "prompts": "none", "rank": 2, "steps": 1}
    online = {**common, **ONLINE, "train_prompts": str(write_captions(tmp_path))}
    for name, judge in (("itself", Bright()), ("a function", Bright().as_callable())):
        align("d3po", judge=judge, output=str(tmp_path / name), **online)
    rewards = [reward_of(tmp_path / name) for name in ("itself", "a function")]
    assert rewards[0] == pytest.approx(rewards[1]) and rewards[0] < 0  # lower is better
    align(
        "smpo",
        judge=Bright(),
        pairs=str(write_pairs(tmp_path / "data", 6)),
        inversion_steps=2,
        output=str(tmp_path / "s"),
        **common,
    )
    assert "bright" in (tmp_path / "s" / "config.yaml").read_text()
    assert [p.name[:7] for p in (tmp_path / "s" / "cache").glob("scores-*")] == ["scores-"]


def test_a_weighted_sum_of_judges_rewards_what_is_sampled_and_scores_pairs(tmp_path: Path) -> None:
    jpeg, common = reward_models.load("jpeg"), {"progress": False, "prompts": "none", "rank": 2, "steps": 1}
    common["model"] = str(save_untrained(tmp_path / "model"))
    own, other = 0.5 * jpeg + reward_models.load("oracle"), 0.4 * jpeg + reward_models.load("oracle")
    assert own_judges.judge_digest(own) != own_judges.judge_digest(other)
    online = {**common, **ONLINE, "train_prompts": str(write_captions(tmp_path))}
    align("d3po", judge=own, output=str(tmp_path / "sampled"), **online)
    assert math.isfinite(reward_of(tmp_path / "sampled"))
    with pytest.raises(UserError, match="another run.*judge was"):
        align("d3po", judge=other, output=str(tmp_path / "sampled"), resume=True, **online)
    pairs = write_pairs(tmp_path / "data", 6)
    align("smpo", judge=own, pairs=str(pairs), inversion_steps=2, output=str(tmp_path / "pairs"), **common)
    assert [*(tmp_path / "pairs" / "cache").glob(f"scores-{own_judges.judge_digest(own)}*")]


def write_captions(folder: Path) -> Path:
    (folder / "p.txt").write_text("a red circle\na blue star\n")
    return folder / "p.txt"


def reward_of(folder: Path) -> float:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["reward"]


@pytest.mark.parametrize(
    ("judge", "told"),
    [
        (Bright().score, "does not say whether higher is better: give the judge itself"),
        (Bright().z(), "standardised by the pictures judged together"),
    ],
    ids=["a method", "by its company"],
)
def test_judges_that_would_mislead_are_refused(judge, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        align("d3po", recipe="tiny", judge=judge, output=str(tmp_path / "run"))


def test_a_judge_is_known_by_what_it_does() -> None:
    def scaled(factor: float) -> own_judges.RewardFunction:
        return lambda pictures, prompts: [factor * float(x.mean()) for x in pictures]

    class Darker(Bright):
        def score_prepared(self, prepared: list, prompts: list[str]) -> torch.Tensor:
            return super().score_prepared(prepared, prompts) - 1

    class Calls:
        calls = 0

        def __call__(self, pictures: torch.Tensor, prompts: list[str]) -> list[float]:
            self.calls += 1
            return [0.0] * len(prompts)

    several = [scaled(1.0), scaled(-1.0), partial(redness), Bright(), Darker(), reward_models.load("jpeg"), Calls(), redness]
    digests = [own_judges.judge_digest(judge) for judge in several]
    assert len(set(digests)) == len(digests)
    assert [own_judges.judge_digest(judge) for judge in (scaled(1.0), Bright())] == [digests[0], digests[3]]
    several[6](PICTURES, PROMPTS)
    assert own_judges.judge_digest(several[6]) == digests[6]


def test_a_run_does_not_go_on_with_another_function(tmp_path: Path) -> None:
    common = {"model": str(save_untrained(tmp_path / "model")), "train_prompts": str(write_captions(tmp_path)), "progress": False}
    how = {**common, **ONLINE, "steps": 2, "output": str(tmp_path / "run")}
    align("d3po", judge=lambda pictures, prompts: pictures.mean(dim=(1, 2, 3)), **how)
    with pytest.raises(UserError, match='another run.*judge was "<lambda> [0-9a-f]{16}" and is now "<lambda> [0-9a-f]{16}"'):
        align("d3po", judge=lambda pictures, prompts: -1000 * pictures.mean(dim=(1, 2, 3)), resume=True, **how)
    align("d3po", judge=lambda pictures, prompts: pictures.mean(dim=(1, 2, 3)), resume=True, **how)
