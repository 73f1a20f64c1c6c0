"""The options that name judges: how they are parsed, what is loaded, and what is said of mistakes."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import reward_models
from diffalign.errors import UserError
from pipelines import judge_options


def parsed(*words: str, default: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    judge_options.add_judge_options(parser, default)
    judge_options.add_scoring_options(parser)
    return parser.parse_args(words)


def test_judges_come_in_the_order_asked_and_by_the_names_given() -> None:
    judges = judge_options.judges_from(parsed("--judges", "oracle, small=jpeg,jpeg-incompressibility"))
    assert {label: judge.info.name for label, judge in judges.items()} == {
        "oracle": "oracle",
        "small": "jpeg",
        "jpeg-incompressibility": "jpeg-incompressibility",
    }
    assert list(judges) == ["oracle", "small", "jpeg-incompressibility"]


def test_options_reach_the_judge_they_name() -> None:
    args = parsed("--judges", "jpeg,per=jpeg", "--judge-options", "per.per_megapixel=true")
    judges = judge_options.judges_from(args)
    assert judges["jpeg"].made_of["per_megapixel"] is False
    assert judges["per"].made_of["per_megapixel"] is True


def test_the_judge_ends_at_the_last_dot_before_the_sign() -> None:
    told = judge_options.parse_judge_options(
        ["hps-v2.1.weights=./a.b/c=d.pt", "hps-v2.1.antialias=False", "my.own.x=1"], {"hps-v2.1": "hps-v2.1", "my.own": "clip"}
    )
    assert told == {"hps-v2.1": {"weights": "./a.b/c=d.pt", "antialias": False}, "my.own": {"x": 1}}


@pytest.mark.parametrize(
    "text, value",
    [
        ("7", 7),
        ("-3", -3),
        ("0.5", 0.5),
        ("1e-3", 1e-3),
        ("2.", 2.0),
        ("true", True),
        ("FALSE", False),
        ("nan", "nan"),
        ("1_000", "1_000"),
        ("main", "main"),
        ("", ""),
        ("'1234567'", "1234567"),
        ('"true"', "true"),
        ("12e4abc", "12e4abc"),
    ],
)
def test_values_have_the_type_they_look_like(text: str, value: object) -> None:
    told = judge_options.parse_judge_options([f"clip.x={text}"], {"clip": "clip"})["clip"]["x"]
    assert told == value and type(told) is type(value)


def test_the_device_reaches_those_that_have_one(clip_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told, load = {}, reward_models.load
    monkeypatch.setattr(reward_models, "load", lambda name, **how: told.update({name: how}) or load(name, **how))
    words = ["--judges", "clip,jpeg", "--device", "cpu", "--judge-options", f"clip.weights={clip_file}"]
    judge_options.judges_from(parsed(*words))
    assert told == {"clip": {"device": "cpu", "weights": str(clip_file)}, "jpeg": {}}


def test_a_judges_own_device_comes_first(clip_file: Path) -> None:
    words = ["--judges", "clip", "--device", "no-such-thing", "--judge-options", f"clip.weights={clip_file}", "clip.device=cpu"]
    assert judge_options.judges_from(parsed(*words))["clip"].score(Image.new("RGB", (8, 8)), "red").shape == (1,)


def test_several_lists_of_options_add_up() -> None:
    args = parsed(
        "--judges", "a=jpeg,b=jpeg", "--judge-options", "a.per_megapixel=true", "--judge-options", "b.per_megapixel=true"
    )
    assert [judge.made_of["per_megapixel"] for judge in judge_options.judges_from(args).values()] == [True, True]
    assert parsed("--judges", "jpeg").judge_options == []  # the list of an earlier parse is not this one's


def test_options_and_judges_are_parted_by_spaces_or_commas() -> None:
    words = ["--judges", "a=jpeg,b=jpeg", "--judge-options", "a.per_megapixel=true,b.per_megapixel=true"]
    assert [judge.made_of["per_megapixel"] for judge in judge_options.judges_from(parsed(*words)).values()] == [True, True]
    told = judge_options.parse_judge_options(["ask.question=red, or blue?,ask.seed=1"], {"ask": "vlm-yes-no"})
    assert told == {"ask": {"question": "red, or blue?", "seed": 1}}  # a comma that begins no other option is the value's own
    parser = argparse.ArgumentParser()
    judge_options.add_judge_options(parser, apart=True)
    assert parser.parse_args(["--judges", "oracle", "jpeg"]).judges == "oracle,jpeg"


def test_cache_is_the_users_own_unless_told_otherwise() -> None:
    wanted = [([], True), (["--no-cache"], False), (["--cache", "here.sqlite"], Path("here.sqlite"))]
    for words, cache in wanted:
        args = parsed("--judges", "jpeg", *words, "--batch-size", "4")
        assert judge_options.scoring_arguments(args) == {"cache": cache, "batch_size": 4}
    with pytest.raises(SystemExit):
        parsed("--judges", "jpeg", "--no-cache", "--cache", "here.sqlite")


def test_a_command_may_have_a_default(capsys: pytest.CaptureFixture) -> None:
    assert parsed(default="oracle").judges == "oracle"
    with pytest.raises(SystemExit):
        parsed()
    assert "--judges" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["orcle"], r"^--judges: there is no judge called 'orcle'. Did you mean 'oracle'\? The judges are: .*jpeg"),
        ([" , "], "expected at least one, as in pickscore,clip"),
        (["jpeg,jpeg"], "'jpeg' is asked for twice; give one of them a name of its own, as in mine=jpeg"),
        (["a=jpeg,a=oracle"], "'a' is asked for twice"),
        (["a="], "found 'a='; expected NAME or LABEL=NAME"),
        (["a b=jpeg"], "found 'a b=jpeg'"),
        (["hps-v2,hps-v2.1"], "hps-v2 and hps-v2.1 are not comparable and do not go into one table"),
        (["hps-v2,new=hps-v2.1"], "not comparable"),
        (["jpeg,oracle", "--judge-options", "clip.dtype=x"], "for the judge 'clip', but --judges asks for jpeg, oracle"),
        (["hps-v2.1", "--judge-options", "hps-v2.weights=x"], "for the judge 'hps-v2', but --judges asks for hps-v2.1"),
        (["jpeg", "--judge-options", "per_megapixel=true"], "found 'per_megapixel=true'; expected JUDGE.OPTION=VALUE"),
        (["jpeg", "--judge-options", "jpeg.per_megapixel"], "expected JUDGE.OPTION=VALUE"),
        (["jpeg", "--judge-options", "jpeg.per_megapixels=true"], "no option 'per_megapixels'. Did you mean 'per_megapixel'"),
        (["clip", "--judge-options", "clip.weights=/no/where.pt"], "weights of the judge 'clip' should be in /no/where.pt"),
        (["clip", "--device", "gpu"], "^--device gpu cannot be used: .*gpu"),
    ],
)
def test_mistakes_are_told(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        judge_options.judges_from(parsed("--judges", *words))


OWN = """
from dataclasses import dataclass

import torch

from reward_models import PointwiseJudge, RewardInfo


@dataclass
class Setting:
    power: float


class Red(PointwiseJudge):
    info = RewardInfo("red", needs_prompt=False)

    def __init__(self, power: float = 1.0, device: str | None = None) -> None:
        self.setting, self.device = Setting(power), device

    def score_prepared(self, prepared, prompts):
        return torch.tensor([(p.getpixel((0, 0))[0] / 255) ** self.setting.power for p in prepared])


class Needy(Red):
    def __init__(self, colour, **others):
        super().__init__(**others)


ready, nothing = Red(2.0), 7
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with judges of somebody's own, in a folder that Python finds."""
    (tmp_path / "my_own_judges.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("import torch\n\nnumber = 1 / 0\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_own_judges", None)


@pytest.mark.parametrize("where", ["my_own_judges", "my_own_judges.py", "./my_own_judges.py", "{}/my_own_judges.py"])
def test_a_judge_of_ones_own_is_named_by_its_place(where: str, own: Path) -> None:
    place = where.format(own)
    words = ["--judges", f"mine={place}:Red,{place}:ready,jpeg", "--device", "cpu", "--judge-options", "mine.power=3"]
    judges = judge_options.judges_from(parsed(*words))
    assert list(judges) == ["mine", "ready", "jpeg"] and judges["mine"].device == "cpu"
    picture = Image.new("RGB", (4, 4), (51, 0, 0))
    assert judges["mine"].score(picture).item() == pytest.approx(0.2**3)
    assert judges["ready"].score(picture).item() == pytest.approx(0.2**2)


@pytest.mark.parametrize(
    "words, message",
    [
        (["m=my_own_judge:Red"], "Python finds no module my_own_judge. Of a file .* mine=path/to/my_own_judge.py:NAME"),
        (["m=no/where.py:Red"], "there is no file no/where.py"),
        (["m=my_own_judges:Redd"], "my_own_judges has no Redd. Did you mean 'Red'"),
        (["m=open_clip:ViT-B-32"], "found 'open_clip:ViT-B-32'; a judge of your own is MODULE:NAME or FILE.py:NAME"),
        (["m=broken.py:Red"], r"broken.py cannot be imported: ZeroDivisionError: .*broken.py, line 3"),
        (["m=my_own_judges:nothing"], "my_own_judges:nothing is int; a judge of your own is a reward_models.PointwiseJudge"),
        (["m=my_own_judges:Setting", "--judge-options", "m.power=1"], "gave Setting; a judge of your own is a"),
        (["m=my_own_judges:Red", "--judge-options", "m.powr=1"], "has no option 'powr'. Did you mean 'power'"),
        (["m=my_own_judges:ready", "--judge-options", "m.power=1"], "is a judge already and takes no options"),
        (["m=my_own_judges:Needy"], r"is made with colour; give it by --judge-options LABEL.colour=VALUE"),
    ],
)
def test_mistakes_about_ones_own_are_told(words: list[str], message: str, own: Path) -> None:
    with pytest.raises(UserError, match=message):
        judge_options.judges_from(parsed("--judges", *words))


def test_code_is_imported_only_where_somebody_typed_its_place(own: Path) -> None:
    """Settings, which a recipe or a run folder may hold, go this way."""
    (own / "loud.py").write_text(f"open({str(own / 'ran')!r}, 'w').close()\n{OWN}")
    for call in (judge_options.judges_called, judge_options.load_judges):
        with pytest.raises(UserError, match=r"'loud.py:Red' is code of your own, which is imported only where --judges names it"):
            call("mine=loud.py:Red")
    assert not (own / "ran").exists()
    judge_options.load_judges("mine=loud.py:Red", typed=True)
    assert (own / "ran").exists()


def test_an_unknown_judge_is_told_before_any_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    monkeypatch.setattr(reward_models, "load", lambda name, **how: loaded.append(name))
    with pytest.raises(UserError, match="no judge called 'orcle'"):
        judge_options.judges_from(parsed("--judges", "jpeg,orcle"))
    assert loaded == []


def test_declaring_the_options_brings_nothing_heavy() -> None:
    code = (
        "import argparse, sys\nfrom pipelines import judge_options as j\np = argparse.ArgumentParser()\n"
        "j.add_judge_options(p)\nj.add_scoring_options(p)\nj.parse_judges('a=b')\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'pandas', 'PIL'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
