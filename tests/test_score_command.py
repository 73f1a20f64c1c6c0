"""``diffalign score`` and ``rank``: tables, prompts, cut-off runs, several processes, and what goes wrong."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, PngImagePlugin

import reward_models
from diffalign.errors import UserError
from pipelines import cli, scoring
from pipelines.comparison import compare
from pipelines.counterparts import numbered
from pipelines.judge_options import load_judges
from pipelines.score_journal import ScoreJournal
from pipelines.scoring import read_table, score_table
from pipelines.tiny import scenes
from reward_models import jpeg
from reward_models._pictures import UnreadablePictureWarning
from reward_models.base import JudgeError

JUDGES = "tiny-pickscore,jpeg"


def draw(folder: Path, n: int, seed: int = 0) -> list[str]:
    """Scenes of the tiny world and their captions, listed in ``metadata.jsonl``."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    captions = []
    for i in range(n):
        scene, caption = scenes.draw_captioned(rng)
        scenes.render(scene).save(folder / f"{i:04d}.png")
        captions.append(caption)
    rows = [json.dumps({"file_name": f"{i:04d}.png", "text": c, "category": "ab"[i % 2]}) for i, c in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return captions


def run(*words: str | Path) -> int:
    return cli.main([str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("scored") / "mine"
    draw(place, 12)
    return place


# ------------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("ending", scoring.FORMATS)
def test_a_table_in_every_format(ending: str, folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / f"scores{ending}"
    assert run("score", folder, "--judges", JUDGES, "--out", out) == 0
    table = read_table(out)
    captions = [json.loads(line)["text"] for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert table["prompt"].tolist() == captions
    assert table["picture"].tolist() == [str(folder / f"{i:04d}.png") for i in range(12)]
    assert table["category"].tolist() == ["a", "b"] * 6 and set(table["system"]) == {"mine"}
    expected = reward_models.load("tiny-pickscore").score(folder, captions)
    assert table["tiny-pickscore"].to_numpy() == pytest.approx(expected.numpy(), abs=1e-4)
    assert table.attrs["judges"]["tiny-pickscore"]["sharpness"] == 1.0
    told = json.loads((tmp_path / "scores.provenance.json").read_text())
    assert told["provenance"]["tiny-pickscore"]["weights"].startswith("sha256:")
    assert told["versions"]["torch"] == metadata.version("torch")
    printed = capsys.readouterr().out
    assert "| tiny-pickscore |" in printed.replace("tiny-pickscore  ", "tiny-pickscore ") and "12 pictures" in printed
    assert list(tmp_path.iterdir()) and not ScoreJournal(out).parts


def test_the_mean_over_one_prompt_has_no_interval(tmp_path: Path, capsys) -> None:
    place = noise(tmp_path / "one", {f"{i}.png": i for i in range(4)})
    (place / "prompts.txt").write_text("a red star\n")
    assert run("score", place, "--judges", "jpeg", "--out", tmp_path / "s.csv") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| jpeg"))
    assert [cell.strip() for cell in line.split("|")][3] == "-"


def test_several_folders_are_compared(folder: Path, tmp_path: Path, capsys) -> None:
    other = tmp_path / "other"
    captions = draw(other, 12)
    for i in range(12):
        Image.new("RGB", (64, 64), "grey").save(other / f"{i:04d}.png")
    words = ["--plot", tmp_path / "w.png", "--report", tmp_path / "r.md"]
    assert run("score", folder, other, "--judges", JUDGES, "--out", tmp_path / "t.csv", *words) == 0
    table = read_table(tmp_path / "t.csv")
    assert table["system"].tolist() == ["mine"] * 12 + ["other"] * 12
    assert table["prompt_id"].tolist()[:12] == table["prompt_id"].tolist()[12:]
    assert len(set(captions)) == table["prompt_id"].nunique()
    assert "other against mine" in capsys.readouterr().out and "| jpeg" in (tmp_path / "r.md").read_text()
    assert Image.open(tmp_path / "w.png").width > 300


def test_pictures_in_the_hand_need_a_list_of_prompts(folder: Path) -> None:
    pictures = [Image.open(p) for p in sorted(folder.glob("*.png"))]
    captions = [json.loads(line)["text"] for line in (folder / "metadata.jsonl").read_text().splitlines()]
    table = score_table({"a": pictures, "b": torch.zeros(12, 3, 64, 64)}, captions, ["tiny-pickscore"], categories=["x"] * 12)
    assert table["picture"].tolist() == list(range(12)) * 2 and set(table["category"]) == {"x"}
    from_folder = score_table([folder], None, ["tiny-pickscore"])
    together = table["tiny-pickscore"][:12].tolist()  # in batches with the others, which may change the last digit
    assert together == pytest.approx(from_folder["tiny-pickscore"].tolist(), abs=1e-4)
    with pytest.raises(UserError, match="12 pictures and 3 prompts; each picture needs one"):
        score_table({"a": pictures}, captions[:3], ["jpeg"])
    with pytest.raises(UserError, match="A judge reads prompts, and there are none for 12 pictures"):
        score_table({"a": pictures}, None, ["oracle"])
    with pytest.raises(UserError, match="12 pictures and 2 categories"):
        score_table({"a": pictures}, captions, ["jpeg"], categories=["x", "y"])
    with pytest.raises(UserError, match="'a'.*need a list of prompts|need a list of prompts; got 'parti'"):
        score_table({"a": pictures}, "parti", ["jpeg"])


def test_judges_without_prompts_pair_pictures_by_their_place(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (8, 8), (level,) * 3) for level in range(3)]
    table = score_table({"a": pictures, "b": pictures}, None, ["jpeg"])
    assert table["prompt_id"].tolist() == [0, 1, 2, 0, 1, 2] and table["sample"].tolist() == [0] * 6


def noise(folder: Path, names: dict[str, int]) -> Path:
    """Pictures that JPEG tells apart; equal numbers are equal pictures."""
    folder.mkdir()
    for name, seed in names.items():
        levels = np.random.default_rng(seed).integers(0, 256, (24 + seed, 24, 3), dtype=np.uint8)
        Image.fromarray(levels).save(folder / name)
    return folder


def against(a: Path, b: Path, judge: str = "jpeg", **options) -> tuple[list[int], tuple[str, ...]]:
    """Wins, ties and losses of ``b``, and the notes."""
    found = compare(score_table([a, b], None, [judge], **options), n_boot=50)
    return found.win_rates.iloc[0][["wins", "ties", "losses"]].tolist(), found.notes


def test_a_picture_that_is_missing_shifts_no_other_pair(tmp_path: Path) -> None:
    a = noise(tmp_path / "a", {f"{i}.png": i for i in range(6)})
    b = noise(tmp_path / "b", {f"{i}.png": i for i in (0, 1, 3, 4, 5)})
    told, notes = against(a, b)
    assert told == [0, 5, 0]
    assert any(note.startswith("b: 0 pictures without partner in a, and 1 of a without") for note in notes)
    for folder in (a, b):  # four pictures of either prompt
        rows = [{"file_name": p.name, "prompt": "xy"[int(p.stem) // 4]} for p in folder.glob("*.png")]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    told, notes = against(a, b)
    assert told == [0, 5, 0] and not any("by their order" in note for note in notes)


def test_seeds_come_before_names_where_all_pictures_of_a_prompt_have_their_own(tmp_path: Path) -> None:
    a = noise(tmp_path / "a", {"0.png": 1, "1.png": 2, "2.png": 3})
    b = noise(tmp_path / "b", {"0.png": 3, "1.png": 1})
    for folder, seeds in ((a, (1, 2, 2**64 - 1)), (b, (2**64 - 1, 1))):
        rows = [{"file_name": f"{i}.png", "prompt": "x", "seed": seed} for i, seed in enumerate(seeds)]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert against(a, b)[0] == [0, 2, 0]
    rows = [{"file_name": f"{i}.png", "prompt": "x", "seed": 1} for i in range(2)]
    (b / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    told, notes = against(a, b)  # one seed for all tells nothing: 0 against 0, 1 against 1
    assert told[1] == 0 and sum(told) == 2 and any("come from different seeds" in note for note in notes)


def test_names_that_are_numbers_count_as_numbers(tmp_path: Path) -> None:
    a = noise(tmp_path / "a", {f"{i}.png": i for i in range(12)})
    b = noise(tmp_path / "b", {f"{i:03d}.png": i for i in range(12)})
    told, notes = against(a, b)
    assert told == [0, 12, 0] and not any("by their order" in note for note in notes)
    noise(tmp_path / "both", {"7.png": 1, "007.png": 2, "7.bmp": 3})
    noise(tmp_path / "less", {"007.png": 2, "7.png": 1})
    assert against(tmp_path / "both", tmp_path / "less")[0] == [0, 2, 0]  # by their whole names


def test_pictures_with_no_name_in_common_are_paired_by_order_and_the_notes_say_so(tmp_path: Path) -> None:
    a = noise(tmp_path / "a", {f"base_{i}.png": i for i in range(12)})
    b = noise(tmp_path / "b", {f"tuned_{i}.png": i for i in range(12)})
    told, notes = against(a, b)
    assert told == [0, 12, 0]
    assert any(note.startswith("b: 12 of 12 pairs share neither seed nor name; they are paired by their order") for note in notes)
    for folder in (a, b):  # one picture of each prompt: nothing is left to choose
        rows = [{"file_name": p.name, "prompt": p.stem.split("_")[1]} for p in folder.glob("*.png")]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    told, notes = against(a, b)
    assert told == [0, 12, 0] and not any("by their order" in note for note in notes)


def test_a_third_system_is_paired_with_what_either_of_the_others_has(tmp_path: Path) -> None:
    rows = [
        ("a", "1.png", None),
        ("a", "2.png", None),
        ("b", "2.png", 5),
        ("b", "3.png", 6),
        ("c", "x.png", 6),
        ("c", "y.png", 5),
    ]
    told = numbered([{"system": s, "picture": name, "prompt": "p", "seed": seed} for s, name, seed in rows])
    assert told == [(0, 0), (0, 1), (0, 1), (0, 2), (0, 2), (0, 1)]


def test_pictures_without_a_prompt_are_no_part_of_another_ones_prompt(tmp_path: Path) -> None:
    mixed = noise(tmp_path / "mixed", {f"{i}.png": i for i in range(5)})
    for i in (0, 2):
        (mixed / f"{i}.txt").write_text("a cat")
    table = score_table([mixed], None, ["jpeg"])
    assert table["prompt_id"].tolist() == [0, 1, 0, 2, 3] and table["sample"].tolist() == [0, 0, 1, 0, 0]


def test_pictures_of_one_prompt_are_numbered(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (8, 8), (level,) * 3) for level in range(4)]
    table = score_table({"a": pictures}, ["x", "y", "x", "y"], ["jpeg"])
    assert table["prompt_id"].tolist() == [0, 1, 0, 1] and table["sample"].tolist() == [0, 0, 1, 1]


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    names = scoring.named_systems([tmp_path / "one" / "images", tmp_path / "two" / "images"])
    assert list(names) == ["one/images", "two/images"]
    with pytest.raises(UserError, match="is given twice"):
        scoring.named_systems([tmp_path, tmp_path])
    with pytest.raises(UserError, match="Systems in a list are folders"):
        scoring.named_systems([Image.new("RGB", (8, 8))])


# ------------------------------------------------------------------------------------------------------------------ prompts


def test_prompts_beside_and_inside_the_pictures(folder: Path, tmp_path: Path) -> None:
    captions = [json.loads(line)["text"] for line in (folder / "metadata.jsonl").read_text().splitlines()]
    beside, inside = tmp_path / "beside", tmp_path / "inside"
    for place in (beside, inside):
        place.mkdir()
    for i, caption in enumerate(captions):
        image = Image.open(folder / f"{i:04d}.png")
        image.save(beside / f"{i:04d}.png")
        (beside / f"{i:04d}.txt").write_text(caption + "\n")
        text = PngImagePlugin.PngInfo()
        text.add_text(
            "parameters", f"{caption}\nNegative prompt: blurry, clutter\nSteps: 20, Sampler: Euler a, Seed: {i}, Size: 64x64"
        )
        image.save(inside / f"{i:04d}.png", pnginfo=text)
    (tmp_path / "list.tsv").write_text("prompt\n" + "\n".join(captions) + "\n")
    expected = score_table([folder], None, ["tiny-pickscore"])["tiny-pickscore"].tolist()
    for words in (
        [beside],
        [beside, "--prompts", "txt"],
        [inside],
        [inside, "--prompts", "png"],
        [folder, "--prompts", tmp_path / "list.tsv"],
    ):
        assert run("score", *words, "--judges", "tiny-pickscore", "--out", tmp_path / "s.csv", "--overwrite") == 0
        assert read_table(tmp_path / "s.csv")["tiny-pickscore"].tolist() == pytest.approx(expected, abs=1e-5)
    assert run("score", inside, "--judges", "jpeg", "--out", tmp_path / "s.csv", "--overwrite") == 0
    assert read_table(tmp_path / "s.csv")["seed"].tolist() == list(range(12))


def test_a_data_set_of_pictures_and_prompts(folder: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from datasets import Image as ImageFeature

    captions = [json.loads(line)["text"] for line in (folder / "metadata.jsonl").read_text().splitlines()]
    paths = [str(p) for p in sorted(folder.glob("*.png"))]
    rows = Dataset.from_dict({"jpg": paths, "said": captions}).cast_column("jpg", ImageFeature())
    rows.to_parquet(tmp_path / "set.parquet")
    words = ["--image-column", "jpg", "--column", "said", "--judges", "tiny-pickscore", "--out", tmp_path / "s.csv"]
    assert run("score", tmp_path / "set.parquet", *words) == 0
    expected = score_table([folder], None, ["tiny-pickscore"])["tiny-pickscore"].tolist()
    assert read_table(tmp_path / "s.csv")["tiny-pickscore"].tolist() == pytest.approx(expected, abs=1e-5)


def test_rows_without_a_picture_are_named_and_counted(folder: Path, tmp_path: Path) -> None:
    cells = [str(folder / "0000.png"), "", None, 5, "http://x/y.png", "gone.png"]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps({"image": cell, "prompt": "x"}) + "\n" for cell in cells))
    with pytest.warns(UnreadablePictureWarning) as caught:
        assert run("score", tmp_path / "list.jsonl", "--judges", "jpeg", "--out", tmp_path / "s.csv") == 0
    told = str(next(w.message for w in caught if w.category is UnreadablePictureWarning))
    assert told.startswith("5 of 6 pictures cannot be read and score NaN: ") and "gone.png" in told
    for row, why in ((2, "there is no picture"), (4, "expected a path or bytes, found int"), (5, "http://x/y.png is an address")):
        assert f"list.jsonl:line {row}, image ({why}" in told
    table = read_table(tmp_path / "s.csv")
    assert table["jpeg"].isna().tolist() == [False] + [True] * 5 and table.attrs["unreadable"] == 5


def test_pictures_of_subfolders_are_not_passed_over_in_silence(tmp_path: Path) -> None:
    place = noise(tmp_path / "top", {"0.png": 0, "1.avif": 1})
    noise(place / "more", {"2.png": 2})
    with pytest.warns(UserWarning, match=r"top has subfolders with pictures, which are not scored \(.*more\)"):
        assert len(score_table([place], None, ["jpeg"])) == 2


# ----------------------------------------------------------------------------------------------------------- cut off, shared


def thousand(place: Path) -> Path:
    """1,000 pictures, 20 of them broken in four ways."""
    captions = draw(place / "pictures", 100)
    rows = []
    for i in range(1000):
        path = place / "pictures" / f"{i:04d}.png"
        if i >= 100:
            path.write_bytes((place / "pictures" / f"{i % 100:04d}.png").read_bytes())
        rows.append(json.dumps({"file_name": path.name, "text": captions[i % 100]}))
    (place / "pictures" / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    for k, i in enumerate(range(25, 1000, 50)):
        path = place / "pictures" / f"{i:04d}.png"
        whole = path.read_bytes()
        path.write_bytes((b"", b"this is no picture", whole[: len(whole) // 2], whole[:40])[k % 4])
    return place / "pictures"


def words(pictures: Path, out: Path) -> list[str]:
    return ["score", str(pictures), "--judges", JUDGES, "--out", str(out), "--no-cache", "--device", "cpu"]


def done(out: Path) -> int:
    """Batches in the journals."""
    return sum(max(0, part.read_bytes().count(b"\n") - 1) for part in ScoreJournal(out).parts)


def test_a_thousand_pictures_killed_half_way_give_the_same_table(tmp_path: Path) -> None:
    pictures = thousand(tmp_path)
    with pytest.warns(UnreadablePictureWarning, match="20 of 1000 pictures cannot be read and score NaN.*0025.png"):
        assert run(*words(pictures, tmp_path / "whole.parquet")) == 0
    out = tmp_path / "killed.parquet"
    process = subprocess.Popen([sys.executable, "-m", "pipelines.cli", *words(pictures, out)], stderr=subprocess.DEVNULL)
    while done(out) < 31:  # of 63 batches
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = done(out)
    assert 31 <= before < 63 and not out.exists()
    with pytest.warns(UnreadablePictureWarning, match="20 of 1000 pictures cannot be read and score NaN"):
        assert run(*words(pictures, out)) == 0
    one, two = read_table(tmp_path / "whole.parquet"), read_table(out)
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    assert one["tiny-pickscore"].isna().sum() == 20 and one.attrs["unreadable"] == 20
    assert not ScoreJournal(out).parts


def test_what_was_done_is_not_done_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out, seen, real = tmp_path / "s.csv", [], jpeg.kilobytes

    def watched(image):
        seen.append(image)
        if len(seen) == 9:
            raise KeyboardInterrupt
        return real(image)

    monkeypatch.setattr(jpeg, "kilobytes", watched)
    assert run("score", folder, "--judges", "jpeg", "--out", out, "--batch-size", "4", "--no-cache") == 130
    assert "Interrupted. The same command goes on where it stopped;" in capsys.readouterr().err
    assert done(out) == 2
    seen[:] = [None] * 9
    assert run("score", folder, "--judges", "jpeg", "--out", out, "--batch-size", "4", "--no-cache") == 0
    assert len(seen) == 9 + 4
    assert read_table(out)["jpeg"].tolist() == pytest.approx(reward_models.load("jpeg").score(folder).tolist(), abs=1e-6)


def test_a_line_that_was_cut_off_does_not_count(tmp_path: Path) -> None:
    journal = ScoreJournal(tmp_path / "t.csv")
    journal.begin("p", 0)
    journal.add(0, [[1.5, float("nan")]], {1: "no picture"})
    journal.add(1, [[2.5, 3.5]], {})
    (part,) = journal.parts
    part.write_bytes(part.read_bytes()[:-5])
    again = ScoreJournal(tmp_path / "t.csv")
    known = again.begin("p", 0)
    assert list(known) == [0] and known[0][0][0][0] == 1.5 and np.isnan(known[0][0][0][1]) and known[0][1] == {1: "no picture"}
    again.add(1, [[2.5, 3.5]], {})
    assert list(again.read()) == [0, 1]


def test_a_journal_of_something_else_is_not_gone_on_with(folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "s.csv"
    journal = ScoreJournal(out)
    journal.begin("another purpose", 0)
    journal.add(0, [[1.0] * 12], {})
    assert run("score", folder, "--judges", "jpeg", "--out", out) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert (
        "s.csv.part-0.jsonl is what is left of a scoring of other pictures, prompts or judges" in told and "--overwrite" in told
    )
    assert run("score", folder, "--judges", "jpeg", "--out", out, "--overwrite") == 0
    assert read_table(out)["jpeg"].max() < 0


def test_work_cut_off_does_not_go_on_with_other_pictures_of_a_data_set(folder: Path, tmp_path: Path) -> None:
    """Written anew to the same file, with the same prompts: a second checkpoint's samples."""
    files = [path.read_bytes() for path in sorted(folder.glob("*.png"))[:2]]
    data, judges, purposes = tmp_path / "samples.parquet", [reward_models.load("jpeg")], []
    for pictures in (files, files, files[::-1]):
        pd.DataFrame({"prompt": ["a", "b"], "image": pictures}).to_parquet(data)
        purposes.append(scoring._purpose(scoring.sheet_of([data]), judges, 16))
    opened = [scoring.sheet_of({"mine": [Image.open(io.BytesIO(file))]}, ["a"]) for file in files]
    purposes += [scoring._purpose(sheet, judges, 16) for sheet in opened]
    assert purposes[0] == purposes[1] and len(set(purposes)) == 4


def test_work_cut_off_does_not_go_on_with_another_judge_of_that_name(folder: Path, tmp_path: Path) -> None:
    """Of one's own, which does not say what it is made of."""
    code = "import torch\nfrom reward_models import PointwiseJudge, RewardInfo\nclass Mine(PointwiseJudge):\n"
    code += "    info = RewardInfo('mine', needs_prompt=False)\n"
    code += "    def score_prepared(self, prepared, prompts):\n        return torch.tensor([{} * p.width for p in prepared])\n"
    purposes = []
    for number, factor in enumerate((1.0, 1.0, 2.0)):
        (tmp_path / f"mine{number}.py").write_text(code.format(factor))
        (judge,) = load_judges(f"{tmp_path}/mine{number}.py:Mine", typed=True).values()
        purposes.append(scoring._purpose(scoring.sheet_of([folder]), [judge], 16))
        assert score_table([folder], None, {"mine": judge}).attrs["provenance"]["mine"]["code"]
    assert purposes[0] == purposes[1] != purposes[2]


def test_two_processes_share_the_pictures_and_one_table_comes_out(folder: Path, tmp_path: Path) -> None:
    words = ["-m", "pipelines.cli", "score", str(folder), "--judges", JUDGES, "--no-cache", "--batch-size", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    both = [*torchrun, *words, "--out", str(tmp_path / "two.parquet")]
    done_by_two = subprocess.run(both, capture_output=True, text=True, env=env, timeout=300)
    assert done_by_two.returncode == 0, done_by_two.stderr[-2000:]
    assert done_by_two.stdout.count("12 pictures") == 1
    assert run(*words[2:], "--out", tmp_path / "one.parquet") == 0
    one, two = read_table(tmp_path / "one.parquet"), read_table(tmp_path / "two.parquet")
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    assert not ScoreJournal(tmp_path / "two.parquet").parts


def test_every_batch_has_one_process(folder: Path, tmp_path: Path) -> None:
    panel = {"jpeg": reward_models.load("jpeg")}
    sheet = scoring.sheet_of([folder])
    taken = []
    for rank in (1, 2, 0):  # the first makes the table, so it goes last here; the others' barriers are passed at once
        journal = ScoreJournal(tmp_path / "t.csv")
        journal.begin(scoring._purpose(sheet, list(panel.values()), 2), rank)
        table = scoring.score_sheet(sheet, panel, journal=_Blind(journal), share=(rank, 3), batch_size=2) if rank else None
        taken.append(table)
    journal = ScoreJournal(tmp_path / "t.csv")
    table = scoring.score_sheet(sheet, panel, journal=_Blind(journal), share=(0, 3), batch_size=2)
    assert taken == [None] * 3
    assert table["jpeg"].tolist() == reward_models.load("jpeg").score(folder).tolist()


class _Blind:
    """A journal that begins before any other process has written, as the barrier sees to."""

    def __init__(self, journal: ScoreJournal) -> None:
        self._journal = journal

    def begin(self, purpose: str, rank: int) -> dict:
        self._journal.begin(purpose, rank)
        return {}

    def __getattr__(self, name: str):
        return getattr(self._journal, name)


# ------------------------------------------------------------------------------------------------------ what tables can hold


@pytest.mark.parametrize("ending", scoring.FORMATS)
def test_names_and_prompts_come_back_as_they_were(ending: str, tmp_path: Path) -> None:
    names = ["null", "007", "NA"]
    folders = [noise(tmp_path / name, {f"{i}.png": i for i in range(5)}) for name in names]
    prompts = ["None", "nan", "a\rb", 'a "b"\r\n, c', "12"]
    table = score_table(folders, prompts, ["jpeg"], categories=["None", "1", "", "null", "x\ry"])
    scoring.write_table(table, tmp_path / f"s{ending}")
    back = read_table(tmp_path / f"s{ending}")
    for column in ("system", "picture", "prompt", "sample", "prompt_id", "seed"):
        assert back[column].dropna().tolist() == table[column].dropna().tolist(), column
    assert [c or None for c in back["category"].fillna("")] == ["None", "1", None, "null", "x\ry"] * 3
    assert compare(back, n_boot=20).win_rates[["system", "ties"]].values.tolist() == [["007", 5], ["NA", 5]]


@pytest.mark.parametrize("ending", scoring.FORMATS)
def test_names_of_files_that_are_no_text_are_spelt_out(ending: str, tmp_path: Path) -> None:
    place = noise(tmp_path / "a", {"ok.png": 0, "zz.png": 1})
    odd = os.fsencode(place) + b"/\xff.png"
    try:
        os.rename(place / "zz.png", odd)
    except OSError:
        pytest.skip("this file system takes no such name")
    with Image.open(io.BytesIO((place / "ok.png").read_bytes())) as picture:
        picture.load()
    out = tmp_path / f"s{ending}"
    scoring.write_table(score_table({"a": place, "in the hand": [picture, picture]}, None, ["jpeg"]), out)
    assert read_table(out)["picture"].astype(str).tolist() == [str(place / "ok.png"), str(place / r"\udcff.png"), "0", "1"]
    assert run("rank", place, "--judges", "jpeg") == 0


def test_half_a_character_in_a_prompt_is_refused_by_name(tmp_path: Path, capsys) -> None:
    place = noise(tmp_path / "a", {"0.png": 0, "1.png": 1})
    (place / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "x"}\n{"file_name": "1.png", "text": "half \\ud83d"}\n')
    assert run("score", place, "--judges", JUDGES, "--out", tmp_path / "s.csv") == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "1.png" in told or "line 2" in told
    with pytest.raises(UserError, match=r"the prompt of picture 1 has half a character in it.*'half \\ud83d'; write the whole"):
        score_table({"a": torch.zeros(2, 3, 8, 8)}, ["x", "half \ud83d"], ["jpeg"])
    with pytest.raises(JudgeError, match=r"prompt 2 of 2 has half a character"):
        reward_models.load("tiny-pickscore").score(place, ["x", "half \ud83d"], cache=tmp_path / "c.sqlite")


# --------------------------------------------------------------------------------------------------------------------- rank


def test_rank_prints_the_best_first(folder: Path, tmp_path: Path, capsys) -> None:
    words = ["--judges", "jpeg", "--best", "3", "--out", tmp_path / "r.csv", "--sheet", tmp_path / "r.png"]
    assert run("rank", folder, *words) == 0
    scores = reward_models.load("jpeg").score(folder)
    order = scores.argsort(descending=True)[:3].tolist()
    ranked = read_table(tmp_path / "r.csv")
    assert ranked["picture"].tolist() == [str(folder / f"{i:04d}.png") for i in order]
    assert ranked["rank"].tolist() == [1, 2, 3]
    lines = [line for line in capsys.readouterr().out.splitlines() if ".png" in line and line.startswith("|")]
    assert [f"{i:04d}.png" in line for i, line in zip(order, lines, strict=True)] == [True] * 3
    assert Image.open(tmp_path / "r.png").width > 500


def test_names_that_stdouts_encoding_lacks_are_escaped(tmp_path: Path) -> None:
    """A pipe's is the code page of the country on Windows."""
    place = noise(tmp_path / "a", {"日本.png": 0, "café.png": 1})
    words = [sys.executable, "-m", "pipelines.cli", "rank", str(place), "--judges", "jpeg", "--no-cache"]
    done = subprocess.run(words, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0 and b"\\u65e5\\u672c.png" in done.stdout and "café.png".encode("cp1252") in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="Windows makes links for developers alone")
def test_rank_names_what_cannot_be_judged(tmp_path: Path, capsys) -> None:
    place = noise(tmp_path / "a", {"0.png": 0, "1.png": 1})
    (place / "2.png").symlink_to(tmp_path / "gone.png")
    with pytest.warns(UnreadablePictureWarning):
        assert run("rank", place, "--judges", "jpeg") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert [cell.strip() for cell in last.strip("|").split("|")] == ["-", "nan", str(place / "2.png")]


def test_rank_for_one_prompt_and_per_prompt(folder: Path, tmp_path: Path) -> None:
    words = ["--judges", "tiny-pickscore,jpeg", "--out", tmp_path / "r.parquet", "--overwrite"]
    assert run("rank", folder, "--prompt", "a red circle", *words) == 0
    whole = read_table(tmp_path / "r.parquet")
    assert whole["rank"].tolist() == sorted(whole["rank"]) and len(whole) == 12
    places = whole["tiny-pickscore"].rank(ascending=False) + whole["jpeg"].rank(ascending=False)
    assert places.tolist() == sorted(places)
    rows = [json.dumps({"file_name": f"{i:04d}.png", "text": "a blue star" if i < 7 else "a red circle"}) for i in range(12)]
    (tmp_path / "two.jsonl").write_text("\n".join(rows))
    assert run("rank", folder, "--prompts", tmp_path / "two.jsonl", "--per-prompt", "--best", "2", *words) == 0
    best = read_table(tmp_path / "r.parquet")
    assert best["prompt"].tolist() == ["a blue star"] * 2 + ["a red circle"] * 2
    assert best["rank"][0] == best["rank"][2] == 1 and set(best["rank"]) <= {1, 2}


# ------------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--judges", "pikscore"], "there is no judge called 'pikscore'. Did you mean 'pickscore'"),
        (["--judges", "hps-v2,hps-v2.1"], "hps-v2 and hps-v2.1 are not comparable and do not go into one table"),
        (
            ["--judges", "jpeg", "--out", "scores.txt"],
            "A table of scores ends in one of .parquet, .csv, .jsonl; got 'scores.txt'",
        ),
        (["--judges", "jpeg", "--judge-options", "jpeg.quality=3"], "'jpeg' has no option 'quality'"),
        (["--judges", "oracle", "--prompts", "WITHOUT"], "12 of 12 pictures in"),
        (["--judges", "prompt=jpeg"], "A judge cannot be called 'prompt': the table has a column of that name"),
        (
            ["--judges", "clip", "--judge-options", "clip.weights=nowhere.safetensors"],
            "should be in nowhere.safetensors; there is no such",
        ),
    ],
)
def test_what_a_user_gets_wrong_is_said_in_a_paragraph(words, expected, folder, tmp_path, capsys) -> None:
    words = [str(tmp_path / "none.jsonl") if word == "WITHOUT" else word for word in words]
    (tmp_path / "none.jsonl").write_text('{"file_name": "other.png", "text": "a red circle"}\n')
    words = words if "--out" in words else [*words, "--out", str(tmp_path / "s.csv")]
    assert run("score", folder, *words) == 2
    assert expected in " ".join(capsys.readouterr().err.split())


def test_which_pictures_are_of_one_prompt_is_said(folder: Path, tmp_path: Path, capsys) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    for file in folder.glob("*.png"):
        (mine / file.name).write_bytes(file.read_bytes())
    (tmp_path / "p.txt").write_text("a red star\na blue circle\n")
    words = ["score", mine, "--prompts", tmp_path / "p.txt", "--judges", "jpeg", "--out", tmp_path / "s.csv"]
    assert run(*words) == 2 and "say so: --n-per-prompt 6" in " ".join(capsys.readouterr().err.split())
    assert run(*words, "--n-per-prompt", "6") == 0
    assert "mine: 6 pictures of each of 2 prompts; 0000.png, 0001.png," in capsys.readouterr().out


def test_one_prompt_for_all_pictures(folder: Path, tmp_path: Path, capsys) -> None:
    words = [folder, "--judges", "tiny-pickscore", "--out", tmp_path / "s.csv", "--overwrite"]
    for prompt in ("a red star", ""):
        assert run("score", *words, "--prompt", prompt) == 0 and run("rank", folder, *words[1:3], "--prompt", prompt) == 0
        assert set(read_table(tmp_path / "s.csv")["prompt"].fillna("")) == {prompt}
    assert run("score", *words, "--prompt", "a star", "--prompts", "parti") == 2
    capsys.readouterr()
    assert run("score", *words, "--prompts", "a red star") == 2
    assert "a single prompt is given by --prompt" in " ".join(capsys.readouterr().err.split())


def test_words_left_over_name_the_comma(folder: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        run("score", folder, "--judges", "jpeg", "oracle", "--out", tmp_path / "s.csv")
    said = " ".join(capsys.readouterr().err.split())
    assert "usage: diffalign score" in said and "unknown arguments: oracle. Most options take one value" in said


def test_missing_weights_name_the_file_the_command_and_the_option(folder: Path, tmp_path: Path, capsys) -> None:
    assert run("score", folder, "--judges", "pickscore", "--out", tmp_path / "s.csv") == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "model.safetensors of yuvalkirstain/PickScore_v1" in told
    assert "`hf download yuvalkirstain/PickScore_v1 model.safetensors`" in told
    assert "--judge-options pickscore.weights=PATH" in told


def test_a_table_that_is_there_is_not_replaced_unasked(folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "s.csv").write_text("mine")
    assert run("score", folder, "--judges", "jpeg", "--out", tmp_path / "s.csv") == 2
    assert "is there already. Name another, or add --overwrite" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "s.csv").read_text() == "mine"


def test_no_file_on_the_command_line_is_replaced_unasked(folder: Path, tmp_path: Path, capsys) -> None:
    mine = tmp_path / "mine.png"
    mine.write_text("mine")
    words = ["--judges", "jpeg", "--out", tmp_path / "s.csv"]
    for asked in (
        ["rank", folder, "--judges", "jpeg", "--sheet", mine],
        ["score", folder, folder.parent, *words, "--plot", mine],
        ["score", folder, folder.parent, *words, "--report", mine],
        ["data", "check", folder, "--sheet", mine],
        ["data", "check", folder, "--json", mine],
        ["world", "captions", "--n", "2", "--out", mine],
        ["world", "pairs", "--n", "2", "--out", mine],
        ["world", "check", "--n", "2", "--out", tmp_path],
    ):
        assert run(*asked) == 2, asked
        assert "--overwrite" in capsys.readouterr().err and mine.read_text() == "mine", asked
    assert run("world", "captions", "--n", "2", "--out", mine, "--overwrite") == 0 and len(mine.read_text().splitlines()) == 2


def test_reading_what_is_no_table_of_scores(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="is no table of scores: it has no column 'system', 'picture'"):
        read_table(tmp_path / "x.csv")
    with pytest.raises(UserError, match="There is no table of scores"):
        read_table(tmp_path / "y.csv")
