"""The registry of judges, and the two that need no weights."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import reward_models
from pipelines.scoring import score_table
from pipelines.tiny import scenes
from reward_models import jpeg, oracle
from reward_models.base import DetailedJudge, Judge, JudgeError, ParticularJudge


def flat(value: int = 128, size: int = 64) -> Image.Image:
    return Image.new("RGB", (size, size), (value, value, value))


def noisy(size: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))


def test_registry_lists_the_judges_without_importing_them():
    code = "import sys, reward_models; print(reward_models.names()); print('torch' in sys.modules, 'scipy' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert {"jpeg", "oracle"} <= set(eval(out[0]))
    assert out[1] == "False False"


def test_every_listed_judge_without_weights_keeps_the_protocol():
    for name in ("jpeg", "jpeg-incompressibility", "oracle"):
        judge = reward_models.load(name)
        assert isinstance(judge, Judge)
        assert judge.info.name == name
        score = judge.score([flat(), noisy()], "a red circle")
        assert score.shape == (2,) and score.dtype == torch.float32
        assert all(judge.info.range[0] <= s <= judge.info.range[1] for s in score.tolist())


def test_unknown_judge_names_the_nearest_and_all():
    with pytest.raises(reward_models.UnknownJudgeError, match=r"'oracel'. Did you mean 'oracle'\?.*jpeg.*, oracle"):
        reward_models.load("oracel")


def test_a_constant_called_name_must_be_a_string_at_the_top_level():
    assert reward_models._stated_names('NAME: str = "one"') == ("one",)
    assert reward_models._stated_names('NAMES = ("one", "two")') == ("one", "two")
    assert reward_models._stated_names('def f():\n    NAME = "one"\n') == ()
    assert reward_models._stated_names("NAME = other") == ()


def test_jpeg_score_is_minus_the_size_of_the_file():
    buffer = io.BytesIO()
    noisy().save(buffer, format="JPEG", quality=95)
    judge = reward_models.load("jpeg")
    assert judge.score([noisy()]).item() == pytest.approx(-len(buffer.getvalue()) / 1000)
    assert jpeg.kilobytes(flat()) < jpeg.kilobytes(noisy()) / 5


def test_incompressibility_is_the_other_way_round():
    pictures = [flat(), noisy()]
    there, back = (reward_models.load(name).score(pictures) for name in ("jpeg", "jpeg-incompressibility"))
    assert torch.equal(there, -back) and back[1] > back[0] > 0


def test_jpeg_scores_come_in_the_order_of_the_pictures():
    judge = reward_models.load("jpeg")
    there, back = judge.score([flat(), noisy()]), judge.score([noisy(), flat()])
    assert there.tolist() == back.tolist()[::-1]
    assert there[0] > there[1]


def test_jpeg_per_megapixel_divides_by_the_pixels():
    plain, relative = reward_models.load("jpeg"), reward_models.load("jpeg", per_megapixel=True)
    assert relative.score([noisy(100)]).item() == pytest.approx(plain.score([noisy(100)]).item() / 0.01, rel=1e-6)


def test_jpeg_takes_pictures_with_transparency():
    assert torch.isfinite(reward_models.load("jpeg").score([noisy().convert("RGBA")])).all()


def test_oracle_score_is_the_utility_of_its_verdict():
    rng = np.random.default_rng(3)
    drawn = [scenes.draw_captioned(rng) for _ in range(12)]
    images, captions = [scenes.render(scene) for scene, _ in drawn], [caption for _, caption in drawn]
    judge = reward_models.load("oracle")
    verdicts = [oracle.judge(i, c) for i, c in zip(images, captions, strict=True)]
    assert judge.score(images, captions).tolist() == pytest.approx([v.utility for v in verdicts])
    details = judge.details(images, captions)
    assert isinstance(judge, DetailedJudge)
    assert set(details) == {"faithfulness", "taste", "objects_found", "relation_kept"}
    assert details["taste"].tolist() == pytest.approx([v.taste for v in verdicts])
    without = np.array([v.relation_kept is None for v in verdicts])
    assert 0 < without.sum() < 12
    assert np.array_equal(np.isnan(details["relation_kept"]), without)


def test_one_prompt_serves_all_pictures_and_a_wrong_number_is_refused():
    judge = reward_models.load("oracle")
    image = scenes.render(scenes.draw_captioned(np.random.default_rng(0))[0])
    assert judge.score([image, image], "a red circle").shape == (2,)
    with pytest.raises(JudgeError, match="2 pictures and 1 prompts"):
        judge.score([image, image], ["a red circle"])
    with pytest.raises(JudgeError, match="2 pictures and 3 prompts"):
        reward_models.load("jpeg").score([flat(), flat()], ["a", "b", "c"])
    with pytest.raises(JudgeError, match="needs the prompts"):
        judge.score([image])


def test_oracle_says_beforehand_which_prompts_it_cannot_judge():
    judge = reward_models.load("oracle")
    assert isinstance(judge, ParticularJudge)
    judge.check_prompts(["a red circle", "a small blue star above a green cross"])
    with pytest.raises(JudgeError, match="'a corgi in a spaceship'"):
        judge.check_prompts(["a red circle", "a corgi in a spaceship"])


class Flat(reward_models.PointwiseJudge):
    """Gives every picture what it was told to give."""

    info = reward_models.RewardInfo(name="flat", needs_prompt=False)

    def __init__(self, given: object = 2.0) -> None:
        self.given = given

    def score_prepared(self, prepared, prompts):
        return torch.full((len(prepared),), self.given) if isinstance(self.given, float) else self.given


def test_judges_are_reckoned_with_like_numbers():
    two, jpeg, picture = Flat(), reward_models.load("jpeg"), Image.new("RGB", (8, 8), "red")
    size = jpeg.score([picture]).item()
    for reward, wanted in (
        (two / 4, 0.5),
        (-two, -2.0),
        (sum([two, jpeg]), 2.0 + size),
        (sum([two]), 2.0),
        (two - two * 3, -4.0),
    ):
        assert reward.score([picture], cache=False).item() == pytest.approx(wanted)
    for wrong in (lambda: 5 + two, lambda: two + 5, lambda: two - 5, lambda: 0.5 * two + 5):
        with pytest.raises(TypeError, match="unsupported operand"):
            wrong()


def test_what_is_no_judge_of_ours_or_gives_no_scores_is_told():
    class Bare:
        info = Flat.info

        def score(self, images, prompts=None):
            return torch.zeros(len(images))

    for judges in ([lambda images, prompts: [0.0]], {"mine": lambda images, prompts: [0.0]}):
        with pytest.raises(reward_models.JudgeError, match="is no judge: it has no info"):
            reward_models.score(judges, [Image.new("RGB", (8, 8))])
    assert isinstance(Bare(), reward_models.Judge)
    with pytest.raises(reward_models.JudgeError, match="is no reward_models.PointwiseJudge"):
        reward_models.score({"bare": Bare()}, [Image.new("RGB", (8, 8))])
    with pytest.raises(reward_models.JudgeError, match="is no reward_models.PointwiseJudge"):
        score_table({"some": []}, None, [Bare()])
    with pytest.raises(reward_models.JudgeError, match="'flat' gave NoneType; give a tensor"):
        Flat(None).score([Image.new("RGB", (8, 8))], cache=False)
