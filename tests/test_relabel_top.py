"""``diffalign relabel --top``: the best different pictures by a judge, whatever people said, to be read as single pictures."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from test_relabel import listing, png, rows_of, sized

import reward_models
from diffalign.data.open import open_pairs
from diffalign.errors import UserError
from pipelines import cli, relabel_top
from pipelines.relabel import relabel
from pipelines.relabel_top import Best, write_best
from pipelines.tiny.model import pairs_path
from reward_models import oracle

N = 30


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of the tiny world, the first ten once more at the end."""
    path = tmp_path_factory.mktemp("tiny") / "pairs.parquet"
    first = pq.read_table(pairs_path()).slice(0, N)
    pq.write_table(pa.concat_tables([first, first.slice(0, 10)]), path)
    return path


def best(data: Path, out: Path, k: int, *judges: str, **how: object) -> Best:
    return write_best(open_pairs(data), {name: reward_models.load(name) for name in judges}, out, k, **how)


def by_hand(data: Path, scale: float = 1.0) -> list[tuple[float, str, bytes]]:
    """Every different picture with its prompt, the best first by the oracle."""
    shown = {(row["caption"], row[f"jpg_{k}"]) for row in rows_of(data) for k in (0, 1)}
    found = [(oracle.judge(Image.open(io.BytesIO(image)), prompt).utility, prompt, image) for prompt, image in shown]
    return sorted(found, key=lambda entry: -entry[0])


# ---------------------------------------------------------------------------------------------------------- what is written


def test_the_best_different_pictures_are_the_oracles(tiny: Path, tmp_path: Path) -> None:
    report = best(tiny, tmp_path / "top.parquet", 12, "jpeg", "oracle", by="oracle", batch_size=2)
    wanted = by_hand(tiny)
    rows = rows_of(tmp_path / "top.parquet")
    assert list(rows[0]) == ["prompt", "image", "score", "jpeg_score", "oracle_score", "origin"]
    assert [row["score"] for row in rows] == pytest.approx([score for score, *_ in wanted[:12]], abs=1e-6)
    assert wanted[11][0] > wanted[12][0] + 1e-6, "no tie at the border, so the set is the only right one"
    assert {(row["prompt"], row["image"]) for row in rows} == {(prompt, image) for _, prompt, image in wanted[:12]}
    for row in rows:
        assert row["oracle_score"] == row["score"] != row["jpeg_score"]
        number, column = int(row["origin"].split()[1]), row["origin"].split("(")[1][:-1]
        assert rows_of(tiny)[number][column] == row["image"] and number < N, "its first place"
    assert (report.different, report.rows, report.written) == (len(wanted), N + 10, 12) and len(wanted) > 2 * N - 5
    assert report.to_text().endswith(
        f"top.parquet: the 12 best by oracle, from {rows[0]['score']:.6g} to {rows[-1]['score']:.6g}"
    )


def test_what_is_written_reads_as_single_pictures(tiny: Path, tmp_path: Path) -> None:
    best(tiny, tmp_path / "top.parquet", 5, "oracle", "jpeg")
    rows = rows_of(tmp_path / "top.parquet")
    for judge, column in ((None, "score"), ("oracle", "oracle_score"), ("jpeg", "jpeg_score")):
        table = open_pairs(tmp_path / "top.parquet", scores=judge)
        assert (table.kind, len(table)) == ("pictures", 5)
        assert [found.scores for found in table] == [(row[column], row[column]) for row in rows]
        assert [(f.prompt, f.winner.data, f.label) for f in table] == [(row["prompt"], row["image"], 1.0) for row in rows]
    assert rows[0]["score"] == max(row["oracle_score"] for row in rows), "the first judge decides unless told otherwise"


def test_the_file_says_where_it_comes_from(tiny: Path, tmp_path: Path) -> None:
    best(tiny, tmp_path / "top.parquet", 3, "oracle", "jpeg", by="jpeg")
    facts = json.loads(pq.read_schema(tmp_path / "top.parquet").metadata[b"diffalign"])
    assert (facts["best"], facts["by"], list(facts["judges"])) == (3, "jpeg", ["oracle", "jpeg"])
    assert facts["of"] == open_pairs(tiny).fingerprint and str(tmp_path) not in json.dumps(facts)


def test_labels_play_no_part(tmp_path: Path) -> None:
    """Of losers, ties, rows without a label and rows with a wrong one, the pictures count like any other."""
    labels, has_label = [0.0, 0.5, 1.0, 7.0], [True, True, False, True]
    columns = {"jpg_0": [sized(i) for i in range(4)], "jpg_1": [sized(i + 4) for i in range(4)]}
    pq.write_table(pa.table(columns | {"label_0": labels, "has_label": has_label, "caption": ["x"] * 4}), tmp_path / "p.parquet")
    report = best(tmp_path / "p.parquet", tmp_path / "top.parquet", 8, "jpeg")
    assert [row["image"] for row in rows_of(tmp_path / "top.parquet")] == [sized(i) for i in range(8)]
    assert report.unusable == () and report.unreadable == ()


def test_where_lower_is_better_the_lowest_come_first(tmp_path: Path) -> None:
    judge = reward_models.load("jpeg-incompressibility")
    judge.info = replace(judge.info, higher_is_better=False)
    data = listing(tmp_path / "data")
    write_best(open_pairs(data), {"size": judge}, tmp_path / "a.parquet", 3, cache=False)
    best(data, tmp_path / "b.parquet", 3, "jpeg")
    first, second = rows_of(tmp_path / "a.parquet"), rows_of(tmp_path / "b.parquet")
    assert [row["score"] for row in first] == [-row["score"] for row in second] == sorted(row["score"] for row in first)
    assert [row["image"] for row in first] == [row["image"] for row in second]


def test_of_equals_the_first_are_kept_in_their_order(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}", "image": sized(1)} for i in range(6)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    best(tmp_path / "p.parquet", tmp_path / "top.parquet", 3, "jpeg")
    assert [row["prompt"] for row in rows_of(tmp_path / "top.parquet")] == ["0", "1", "2"]


def test_the_same_picture_under_another_prompt_is_another(tmp_path: Path) -> None:
    rows = [{"prompt": prompt, "image": png(0)} for prompt in ("a", "b", "a ", "a")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    report = best(tmp_path / "p.parquet", tmp_path / "top.parquet", 9, "jpeg")
    assert (report.different, report.written) == (2, 2)
    assert "the 2 best by jpeg (9 were asked for), from " in report.to_text()


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("where", ["data", "elsewhere"])
def test_lists_name_the_pictures_from_wherever_they_are_written(tmp_path: Path, ending: str, where: str) -> None:
    data = listing(tmp_path / "data")
    best(data, tmp_path / where / f"top{ending}", 4, "jpeg")
    table = open_pairs(tmp_path / where / f"top{ending}")
    assert [found.winner.read_bytes() for found in table] == [sized(0), sized(1), sized(1), sized(2)]
    assert [found.prompt[-1] for found in table] == ["0", "0", "1", "1"]
    scores = [found.scores[0] for found in table]
    assert scores == sorted(scores, reverse=True)


def test_single_pictures_have_a_best_too(tmp_path: Path) -> None:
    rows = [{"text": f"{i}", "image": sized(i), "label": i % 2} for i in (3, 1, 2, 0)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    best(tmp_path / "p.parquet", tmp_path / "top.parquet", 2, "jpeg")
    assert [row["prompt"] for row in rows_of(tmp_path / "top.parquet")] == ["0", "1"]
    best(tmp_path / "top.parquet", tmp_path / "again.parquet", 1, "jpeg")
    (row,) = rows_of(tmp_path / "again.parquet")
    assert row["image"] == sized(0) and row["origin"] == "top.parquet:row 0 (image)"
    judge = {"jpeg": reward_models.load("jpeg")}
    with pytest.raises(
        UserError, match=r"prompt, image, 4 pictures: a single picture has no other one.*--top K writes the K best"
    ):
        relabel(open_pairs(tmp_path / "p.parquet"), judge, tmp_path / "x.parquet")
    assert not (tmp_path / "x.parquet").exists()


# -------------------------------------------------------------------------------------------------- once, and only what is new


def test_a_picture_is_judged_once_for_its_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [png(i) for i in range(3)]
    rows = [
        {"jpg_0": pictures[i % 3], "jpg_1": pictures[(i + 1) % 3], "label_0": 1.0, "caption": f"prompt {i % 2}"}
        for i in range(30)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    judge, seen = reward_models.load("jpeg"), []
    score = judge.score_prepared
    monkeypatch.setattr(judge, "score_prepared", lambda images, prompts: seen.extend(prompts) or score(images, prompts))
    table = open_pairs(tmp_path / "pairs.parquet")
    report = write_best(table, {"jpeg": judge}, tmp_path / "a.parquet", 6, batch_size=1, cache=False)
    assert sorted(seen) == ["prompt 0"] * 3 + ["prompt 1"] * 3 and report.different == 6


def test_an_interrupted_run_goes_on_from_its_scores(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge, seen = reward_models.load("jpeg"), []
    score = judge.score_prepared

    def stops(images: object, prompts: list[str]) -> object:
        seen.extend(prompts)
        if len(seen) > limit:
            raise KeyboardInterrupt
        return score(images, prompts)

    monkeypatch.setattr(judge, "score_prepared", stops)
    how, out = {"batch_size": 2, "cache": tmp_path / "scores.sqlite"}, tmp_path / "out" / "top.parquet"
    limit = 40
    with pytest.raises(KeyboardInterrupt):
        write_best(open_pairs(tiny), {"jpeg": judge}, out, 5, **how)
    assert not out.parent.exists()
    before, limit = len(seen), 10_000
    report = write_best(open_pairs(tiny), {"jpeg": judge}, out, 5, **how)
    assert 0 < len(seen) - before < report.different - 20
    best(tiny, tmp_path / "whole.parquet", 5, "jpeg", cache=False)
    assert rows_of(out) == rows_of(tmp_path / "whole.parquet")


def test_progress_counts_rows(tiny: Path, tmp_path: Path) -> None:
    told = []
    best(tiny, tmp_path / "top.parquet", 5, "jpeg", batch_size=1, progress=lambda *state: told.append(state))
    done = [state[1] for state in told]
    assert done == sorted(done) and len(done) > 10 and told[-1] == ("judging", N + 10, N + 10)


# ------------------------------------------------------------------------------------------------------------------- mistakes


def test_what_cannot_be_judged_is_named(tmp_path: Path) -> None:
    rows = [{"jpg_0": sized(i), "jpg_1": sized(i + 4), "label_0": 1.0, "caption": "x"} for i in range(4)]
    rows[1]["jpg_1"], rows[2]["jpg_0"] = b"no picture", None
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    report = best(tmp_path / "pairs.parquet", tmp_path / "top.parquet", 100, "jpeg")
    assert [place for place, _ in report.unreadable] == ["pairs.parquet:row 1 (jpg_1)"]
    assert report.unusable == (("pairs.parquet:row 2 (jpg_0)", "there is no picture"),)
    assert (report.written, report.different, report.unscored) == (6, 7, 1)
    text = report.to_text()
    assert "pairs.parquet: 4 rows, 7 different pictures with their prompts, 1 of them without a score by jpeg" in text
    assert "Pictures that cannot be read (1):\n  pairs.parquet:row 1 (jpg_1): the picture of 10 bytes" in text
    assert "Rows that cannot be used (1):\n  pairs.parquet:row 2 (jpg_0): there is no picture" in text


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    data = listing(tmp_path)
    (tmp_path / "pics" / "1, 0.png").unlink()
    report = best(data, tmp_path / "top.jsonl", 100, "jpeg")
    assert [place for place, _ in report.unreadable] == ["pairs.jsonl:line 2 (chosen)"] and report.written == 11
    assert "No such file" in report.unreadable[0][1]


def test_nothing_with_a_score_is_an_error(tmp_path: Path) -> None:
    rows = [{"prompt": "x", "image": b"no picture"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    with pytest.raises(
        UserError, match=r"has a score by jpeg \(the first of 1 problems: p\.parquet:row 0 \(image\): the picture of"
    ):
        best(tmp_path / "p.parquet", tmp_path / "top.parquet", 5, "jpeg")
    assert [p.name for p in tmp_path.iterdir()] == ["p.parquet"]


def test_scores_that_are_infinite_are_no_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They could not be read again, and nothing can be learned from them."""
    rows = [{"prompt": f"{i}", "image": sized(i)} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    judge = reward_models.load("jpeg")
    score = judge.score_prepared
    monkeypatch.setattr(
        judge, "score_prepared", lambda images, prompts: score(images, prompts) / torch.tensor([float(p) for p in prompts])
    )
    report = write_best(open_pairs(tmp_path / "p.parquet"), {"jpeg": judge}, tmp_path / "top.parquet", 9, cache=False)
    assert (report.unscored, report.unreadable) == (1, ()) and "1 of them without a score by jpeg" in report.to_text()
    assert sorted(row["prompt"] for row in rows_of(tmp_path / "top.parquet")) == ["1", "2"]


@pytest.mark.parametrize(
    ("judges", "out", "how", "message"),
    [
        (["jpeg"], "out.txt", {}, "the ending says how the data are written"),
        (["jpeg"], "out.csv", {}, "the pictures are inside of .*, but a list holds paths; use .parquet"),
        (["jpeg"], "there.parquet", {}, "there.parquet exists. Name another file, or add --overwrite"),
        (["jpeg"], "out.parquet", {"by": "clip"}, "--by clip: --judges asks for jpeg; the judge that decides is one of them"),
        (["jpeg"], "out.parquet", {"k": 0}, "--top 0: the number of pictures to keep is at least 1"),
        ([], "out.parquet", {}, "at least one judge; got none"),
        (["jpeg"], "no.sqlite/out.parquet", {}, "no.sqlite/out.parquet could not be written: "),
        (["jpeg"], "out.parquet", {"cache": "no.sqlite/x"}, "--cache: .*cannot be used as a cache of scores"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(
    judges: list, out: str, how: dict, message: str, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "there.parquet").write_bytes(b"mine")
    (tmp_path / "no.sqlite").write_bytes(b"a file")
    if "cache" in how:
        how = {"cache": tmp_path / how["cache"]}
    with pytest.raises(UserError, match=message):
        best(tiny, tmp_path / out, how.get("k", 5), *judges, **{name: value for name, value in how.items() if name != "k"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["no.sqlite", "there.parquet"]
    assert (tmp_path / "there.parquet").read_bytes() == b"mine"


# ----------------------------------------------------------------------------------------------------------------- the command


def test_the_command_writes_and_reports(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "experts.parquet"
    words = ["relabel", str(tiny), "--judges", "jpeg,taste=oracle", "--by", "taste", "--top", "7", "--out", str(out)]
    assert cli.main(words) == 0
    assert f"{out}: the 7 best by taste, from " in capsys.readouterr().out
    rows = rows_of(out)
    assert [row["score"] for row in rows] == pytest.approx([score for score, *_ in by_hand(tiny)[:7]], abs=1e-6)
    assert cli.main(words) == 2 and "add --overwrite" in " ".join(capsys.readouterr().err.split())
    assert cli.main([*words, "--overwrite"]) == 0 and rows_of(out) == rows
    assert cli.main(["data", "check", str(out), "--scores", "taste"]) == 0
    assert "pictures     7 (7 usable)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--by", "jpeg"], "--by says which judge decides what --top keeps; add --top K, or leave --by out."),
        (["--top", "3", "--by", "clip"], "--by clip: --judges asks for jpeg"),
        (["--top", "3", "--labels", "flip"], "and --labels is about pairs; got both"),
        (["--top", "3", "--drop-conflicts", "--min-margin", "1"], "and --drop-conflicts, --min-margin is about pairs"),
    ],
)
def test_options_that_make_no_sense_together(
    words: list[str], message: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["relabel", str(tiny), "--judges", "jpeg", "--out", str(tmp_path / "out.parquet"), *words]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith("diffalign relabel: ") and message in error
    assert list(tmp_path.iterdir()) == []


def test_the_number_is_a_whole_one(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cli.main(["relabel", str(tiny), "--judges", "jpeg", "--out", str(tmp_path / "out.parquet"), "--top", "0"])
    assert "--top" in capsys.readouterr().err


def test_only_the_best_are_held(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, take = [], relabel_top._Search._take

    def watched(self: object, candidate: object) -> None:
        take(self, candidate)
        held.append(len(self._heap))

    monkeypatch.setattr(relabel_top._Search, "_take", watched)
    best(tiny, tmp_path / "top.parquet", 4, "jpeg")
    assert max(held) == 4 and len(held) > 50


def test_the_shipped_pairs_go_by_their_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "experts.parquet"
    assert cli.main(["relabel", "tiny", "--judges", "jpeg", "--top", "3", "--out", str(out), "--no-cache"]) == 0
    assert pq.read_table(out).num_rows == 3
    assert cli.main(["data", "check", "tiny"]) == 0
    assert "1000" in capsys.readouterr().out
