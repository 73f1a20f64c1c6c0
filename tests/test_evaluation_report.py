"""The whole evaluation on untrained miniatures: files, numbers that agree with each other, refusals."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import reward_models
from diffalign.errors import UserError
from pipelines import cli, evaluation, outputs, report_page, text_tables
from pipelines.evaluation import evaluate
from pipelines.generation import generate
from pipelines.prompts import Prompt
from pipelines.tiny import model, scenes
from reward_models.base import RewardInfo

PROMPTS = [
    Prompt("a red circle", "one"),
    Prompt("a blue star above a green cross", "two"),
    Prompt("a large <cyan square> & more", "one"),
]


def load(name: str):
    """An untrained miniature whose weights follow from its name."""
    if not name.startswith("net"):
        raise UserError(f"There is no model {name!r}.")
    torch.manual_seed(int(name.removeprefix("net")))
    tokenizer = model.build_tokenizer()
    pipe = model.assemble(tokenizer, model.build_text_encoder(tokenizer), model.build_vae(), model.build_unet())
    # "net9" decodes to one flat grey, which JPEG likes best; the others to faint noise, which the oracle reads quickly
    pipe.vae.decoder.conv_out.weight.data *= 0.0 if name == "net9" else 0.1
    return pipe


def test_a_carriage_return_in_a_prompt_ends_no_row_of_scores(tmp_path):
    outputs.write_csv(tmp_path / "s.csv", ["prompt", "score"], [["a\rb", 1.5], ['c "d", e', float("nan")]])
    with open(tmp_path / "s.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file, strict=True)) == [["prompt", "score"], ["a\rb", "1.5"], ['c "d", e', ""]]
    outputs.write_csv(tmp_path / "s.csv", ["prompt", "score"], [["a\nb", 1.5], ["c", None]])
    assert (tmp_path / "s.csv").read_text() == 'prompt,score\n"a\nb",1.5\nc,\n'


def test_one_prompt_is_reported_without_intervals_of_means(tmp_path):
    summary = evaluate("net1", "net9", PROMPTS[:1], ["jpeg"], tmp_path, load=load, steps=1, images_per_prompt=2)
    assert " (-) " in summary.to_text() and "nan" not in summary.to_text() + (tmp_path / "index.html").read_text()
    told = json.loads((tmp_path / "summary.json").read_text())["judges"]["jpeg"]
    assert told["base"]["low"] is told["difference"]["high"] is None and None not in told["win_rate_interval"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation") / "report"
    steps = []
    summary = evaluate(
        "net1", "net9", PROMPTS, ["oracle", "jpeg"], folder, load=load, steps=1, images_per_prompt=2, batch_size=4,
        progress=lambda *what: steps.append(what),
    )  # fmt: skip
    return summary, folder, steps


def test_files_are_all_there(report):
    _, folder, steps = report
    expected = {"summary.json", "scores.csv", "side_by_side.png", "best_and_worst.png", "index.html", "base", "tuned"}
    assert {p.name for p in folder.iterdir()} == expected
    for system in ("base", "tuned"):
        assert sorted(p.name for p in (folder / system).iterdir()) == [f"{i:05d}.png" for i in range(6)]
    assert steps == [("base", 4, 6), ("base", 6, 6), ("tuned", 4, 6), ("tuned", 6, 6)]


def test_summary_holds_what_is_promised(report):
    summary, folder, _ = report
    values = json.loads((folder / "summary.json").read_text())
    assert values == outputs.json_plain(summary.values)
    settings = {
        k: values[k] for k in ("base", "tuned", "prompts", "images_per_prompt", "steps", "guidance_scale", "seed", "sampler")
    }
    assert settings == {
        "base": "net1", "tuned": "net9", "prompts": 3, "images_per_prompt": 2, "steps": 1, "guidance_scale": 7.5, "seed": 0,
        "sampler": "ddim",
    }  # fmt: skip
    assert list(values["judges"]) == ["oracle", "jpeg"]
    assert values["seconds"] > 0 and values["versions"]["torch"]
    assert set(values["faithfulness"]) == {"base", "tuned"}
    assert any("below 50" in note for note in values["notes"])


def test_smooth_pictures_win_by_jpeg(report):
    """The tuned decoder gives one flat grey, so all six pairs are won, and by Wilson on 3 prompts low = 3 / (3 + z**2)."""
    jpeg = report[0].values["judges"]["jpeg"]
    assert (jpeg["wins"], jpeg["ties"], jpeg["losses"], jpeg["win_rate"]) == (6, 0, 0, 1.0)
    assert jpeg["win_rate_interval"] == pytest.approx([3 / (3 + 1.959964**2), 1.0], abs=1e-6)
    assert jpeg["sign_test_p"] == pytest.approx(2 / 2**3)
    assert jpeg["difference"]["mean"] == pytest.approx(jpeg["tuned"]["mean"] - jpeg["base"]["mean"])
    assert jpeg["base"]["low"] <= jpeg["base"]["mean"] <= jpeg["base"]["high"] < jpeg["tuned"]["mean"]


def test_scores_on_disk_agree_with_the_summary_and_with_the_pictures(report):
    summary, folder, _ = report
    with open(folder / "scores.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 * 2 * 2
    assert rows[0]["prompt"] == PROMPTS[0].text and rows[-1]["prompt"] == PROMPTS[2].text and rows[-1]["category"] == "one"
    for system in ("base", "tuned"):
        mine = [r for r in rows if r["system"] == system and r["judge"] == "jpeg"]
        assert np.mean([float(r["score"]) for r in mine]) == pytest.approx(summary.values["judges"]["jpeg"][system]["mean"])
        images = [Image.open(folder / system / f"{int(r['picture']):05d}.png") for r in mine]
        assert [float(r["score"]) for r in mine] == pytest.approx(reward_models.load("jpeg").score(images).tolist())
    oracle = [r for r in rows if r["judge"] == "oracle"]
    assert all((r["relation_kept"] == "") == (" above " not in r["prompt"]) for r in oracle)
    assert all(r["faithfulness"] == "" for r in rows if r["judge"] == "jpeg")
    seeds = {(r["picture"], r["system"]): r["seed"] for r in rows}
    assert all(seeds[str(i), "base"] == seeds[str(i), "tuned"] for i in range(6))
    assert len({seeds[str(i), "base"] for i in range(6)}) == 6


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.links += [value for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_needs_nothing_from_elsewhere_and_every_link_leads_to_a_file(report):
    _, folder, _ = report
    page = (folder / "index.html").read_text(encoding="utf-8")
    parser = _Links()
    parser.feed(page)
    assert parser.open == []
    assert "://" not in page and "<script" not in page
    assert all((folder / link).is_file() for link in parser.links)
    assert {f"{s}/{i:05d}.png" for s in ("base", "tuned") for i in range(6)} <= set(parser.links)
    assert "a large &lt;cyan square&gt; &amp; more" in page and "<cyan" not in page


def test_text_for_the_terminal_has_a_line_for_each_judge(report):
    summary, folder, _ = report
    text = summary.to_text()
    assert "net9 against net1: 3 prompts" in text and str(folder / "index.html") in text
    line = next(line for line in text.splitlines() if line.startswith("| jpeg"))
    assert "100.0 %" in line and "6 / 0 / 0" in line
    assert "oracle: faithfulness" in text


def test_model_against_itself_is_all_ties(tmp_path):
    summary = evaluate("net2", "net2", PROMPTS[:2], ["jpeg"], tmp_path / "same", load=load, steps=1)
    jpeg = summary.values["judges"]["jpeg"]
    assert (jpeg["wins"], jpeg["ties"], jpeg["losses"], jpeg["win_rate"], jpeg["sign_test_p"]) == (0, 2, 0, 0.5, 1.0)
    assert jpeg["difference"]["mean"] == 0.0
    assert json.loads((tmp_path / "same" / "summary.json").read_text())["judges"]["jpeg"]["difference"]["effect_size"] is None


class _Fussy:
    """Lower is better; refuses dark pictures of stars."""

    info = RewardInfo(name="fussy", needs_prompt=True, higher_is_better=False)

    def score(self, images, prompts=None):
        values = [np.nan if "star" in p else np.asarray(i).mean() for i, p in zip(images, prompts, strict=True)]
        return torch.tensor(values, dtype=torch.float32)


def test_judges_may_be_objects_lower_may_be_better_and_nan_is_left_out(tmp_path):
    summary = evaluate("net1", "net9", PROMPTS, [_Fussy()], tmp_path, load=load, steps=1)
    fussy = summary.values["judges"]["fussy"]
    assert fussy["excluded"] == 1 and fussy["wins"] + fussy["losses"] == 2
    assert (fussy["difference"]["mean"] > 0) == (fussy["win_rate"] < 0.5)
    assert any("1 pairs are left out" in note for note in summary.values["notes"])
    assert "not judged" in (tmp_path / "index.html").read_text()


def test_output_folder_that_holds_something_is_refused_and_overwrite_spares_strangers(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "base" / "00099.png").write_bytes(b"old")
    with pytest.raises(UserError, match="is not empty"):
        evaluate("net1", "net2", PROMPTS[:1], ["jpeg"], tmp_path, load=load, steps=1)
    assert (tmp_path / "base" / "00099.png").exists()
    evaluate("net1", "net2", PROMPTS[:1], ["jpeg"], tmp_path, load=load, steps=1, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert [p.name for p in (tmp_path / "base").iterdir()] == ["00000.png"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"judges": ["oracel"]}, "Did you mean 'oracle'"),
        ({"judges": ["jpeg", "jpeg"]}, "'jpeg' is asked for more than once"),
        ({"judges": []}, "at least one prompt and one judge"),
        ({"prompts": []}, "at least one prompt and one judge"),
        ({"prompts": ["a corgi"], "judges": ["oracle"]}, "no object in 'a corgi'"),
        ({"sampler": "plms"}, "no sampler 'plms'"),
        ({"tuned": "lost"}, "no model 'lost'"),
        ({"base": "lost"}, "no model 'lost'"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(tmp_path, change, message):
    asked = {"base": "net1", "tuned": "net2", "prompts": PROMPTS, "judges": ["jpeg"], "output": tmp_path / "out", **change}
    with pytest.raises(UserError, match=message):
        evaluate(**asked, load=load, steps=1)
    assert not (tmp_path / "out").exists()


def test_pictures_hidden_by_a_safety_checker_are_not_judged():
    hidden, shown = Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64), "white")
    hidden.info["flagged"] = True
    judged = evaluation._judged({"mine": reward_models.load("oracle")}, [hidden, shown], ["a red circle"] * 2)["mine"]
    assert np.isnan(judged.score).tolist() == [True, False]
    assert np.isnan(judged.details["taste"]).tolist() == [True, False]


def test_extremes_skip_what_was_not_judged():
    best, worst = evaluation._extremes(np.array([0.0, np.nan, 3.0, -2.0, 1.0]))
    assert (best, worst) == ([2, 4], [3, 0])
    assert evaluation._extremes(np.array([np.nan])) == ([0], [0])


def test_generate_writes_pictures_grid_and_record(tmp_path):
    record = generate("net1", PROMPTS, tmp_path / "out", load=load, images_per_prompt=2, steps=1, batch_size=4, seed=0)
    written = json.loads((tmp_path / "out" / "generation.json").read_text())
    assert written == record
    assert [p["prompt"] for p in written["pictures"]] == [p.text for p in PROMPTS for _ in range(2)]
    assert all((tmp_path / "out" / p["file"]).is_file() for p in written["pictures"])
    assert Image.open(tmp_path / "out" / "grid.png").width > 2 * 192
    with pytest.raises(UserError, match="is not empty"):
        generate("net1", PROMPTS, tmp_path / "out", load=load, steps=1)


def test_generate_and_evaluate_sample_the_same_pictures(report, tmp_path):
    generate("net1", PROMPTS, tmp_path / "out", load=load, images_per_prompt=2, steps=1, batch_size=3)
    for i in range(6):
        mine = np.asarray(Image.open(tmp_path / "out" / f"{i:05d}.png"), dtype=np.int16)
        theirs = np.asarray(Image.open(report[1] / "base" / f"{i:05d}.png"), dtype=np.int16)
        assert np.abs(mine - theirs).max() <= 1


def test_commands_evaluate_and_generate_run_from_folders(tmp_path, capsys):
    pipe = load("net3")
    pipe.save_pretrained(tmp_path / "model")
    prompts = tmp_path / "p.txt"
    prompts.write_text("\n".join(scenes.captions(3, seed=1)))
    model_folder, shared = str(tmp_path / "model"), ["--steps", "1", "--n", "2", "--device", "cpu"]
    asked = ["evaluate", "--base", model_folder, "--tuned", model_folder, "--prompts", str(prompts), "--judges", "oracle,jpeg"]
    assert cli.main([*asked, "--out", str(tmp_path / "report"), *shared]) == 0
    assert "| oracle" in capsys.readouterr().out
    assert json.loads((tmp_path / "report" / "summary.json").read_text())["prompts"] == 2
    asked = ["generate", "--model", model_folder, "--prompt", "a red circle", "--prompt", "a blue star"]
    assert cli.main([*asked, "--out", str(tmp_path / "pictures"), "--sampler", "as-saved", *shared]) == 0
    assert (tmp_path / "pictures" / "grid.png").is_file()


def test_commands_report_mistakes_in_one_paragraph(tmp_path, capsys):
    asked = ["evaluate", "--base", "a", "--tuned", "b", "--prompts", "parti", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="2"):
        cli.main([*asked, "--out", str(tmp_path), "--judge-s", "x"])
    assert "--judge-s" in capsys.readouterr().err
    assert cli.main([*asked[:-1], str(tmp_path / "r"), "--judges", "orcle"]) == 2
    assert "Did you mean 'oracle'?" in capsys.readouterr().err
    assert not list(Path(tmp_path).iterdir())


@pytest.mark.parametrize(
    ("x", "shown"), [(2.34e-4, "0.00023"), (-0.0051, "-0.0051"), (0.0, "0.000"), (0.0123, "0.012"), (12.3, "12.30")]
)
def test_a_difference_that_counts_is_not_written_as_nothing(x, shown):
    assert text_tables.change(x) == shown
    judged = {
        "description": "",
        "base": {"mean": 0.7},
        "tuned": {"mean": 0.7 + x},
        "win_rate": 0.5,
        "win_rate_interval": [0.4, 0.6],
    }
    judged |= {"difference": {"mean": x, "low": x, "high": x}, "wins": 1, "ties": 0, "losses": 1, "sign_test_p": 1.0}
    assert f"{shown} ({shown} to {shown})" in report_page._cells("judge", judged)
