"""``diffalign relabel``: the human's labels stay, what judges say is right, and what is written reads as it was read."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import reward_models
from diffalign.data.open import open_pairs
from diffalign.data.pairs import RowProblem
from diffalign.data.table import PairTable
from diffalign.errors import UserError
from diffalign.evaluate import win_rate
from pipelines import cli, relabel, relabel_files, relabel_report, relabel_top, relabel_verdict
from pipelines.commands import relabel as command
from pipelines.tiny.model import pairs_path
from reward_models import oracle

N = 40


def png(seed: int, side: int = 16) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def sized(seed: int) -> bytes:
    """The greater the seed, the greater the picture, and the worse by the judge ``jpeg``."""
    return png(seed, 8 + 8 * seed)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first pairs of the tiny world, in two row groups."""
    path = tmp_path_factory.mktemp("tiny") / "pairs.parquet"
    pq.write_table(pq.read_table(pairs_path()).slice(0, N), path, row_group_size=25)
    return path


def rejudged(data: Path | PairTable, out: Path, *judges: str, **how: object) -> relabel.Relabelled:
    table = data if isinstance(data, PairTable) else open_pairs(data)
    panel = {name: reward_models.load(name) for name in judges}
    return relabel.relabel(table, panel, out, **how)


def rows_of(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def assert_same_pairs(one: PairTable, other: PairTable) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert (a.prompt, a.label, a.weight) == (b.prompt, b.label, b.weight)
        assert (a.winner.read_bytes(), a.loser.read_bytes()) == (b.winner.read_bytes(), b.loser.read_bytes())


def by_hand(row: dict, number: int) -> float:
    return oracle.judge(Image.open(io.BytesIO(row[f"jpg_{number}"])), row["caption"]).utility


# ------------------------------------------------------------------------------------------------------- what judges said


@pytest.fixture(scope="module")
def judged(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[relabel.Relabelled, Path]:
    out = tmp_path_factory.mktemp("judged") / "relabelled.parquet"
    return rejudged(tiny, out, "oracle", "jpeg", batch_size=2), out  # parts of 16 pairs: three of them


def test_the_same_pairs_labels_and_order_are_read_again(tiny: Path, judged: tuple[relabel.Relabelled, Path]) -> None:
    assert_same_pairs(open_pairs(tiny), open_pairs(judged[1]))


def test_every_column_stays_as_it_was(tiny: Path, judged: tuple[relabel.Relabelled, Path]) -> None:
    before, after = pq.read_table(tiny), pq.read_table(judged[1])
    added = [f"{judge}_{what}" for judge in ("oracle", "jpeg") for what in ("0", "1", "margin", "conflict")]
    assert after.column_names == [*before.column_names, *added]
    assert after.select(before.column_names).equals(before)


def test_scores_margins_and_conflicts_are_the_oracles(judged: tuple[relabel.Relabelled, Path]) -> None:
    rows = rows_of(judged[1])
    for row in rows:
        scores = [by_hand(row, number) for number in (0, 1)]
        assert [row["oracle_0"], row["oracle_1"]] == pytest.approx(scores, abs=1e-6)
        if row["label_0"] == 0.5:
            assert row["oracle_margin"] is None and row["oracle_conflict"] is None
            continue
        ahead = scores[0] - scores[1] if row["label_0"] == 1.0 else scores[1] - scores[0]
        assert row["oracle_margin"] == pytest.approx(ahead, abs=1e-6)
        assert row["oracle_conflict"] is (ahead < 0)
    seen = [(row["label_0"], row["oracle_conflict"]) for row in rows]
    assert {(0.5, None), (1.0, True), (1.0, False), (0.0, True), (0.0, False)} == set(seen)


def test_the_report_counts_what_the_file_shows(judged: tuple[relabel.Relabelled, Path]) -> None:
    report, out = judged
    rows = rows_of(out)
    decided = [row for row in rows if row["label_0"] != 0.5]
    assert (report.pairs, report.written, report.ties) == (N, N, N - len(decided))
    for agreement in report.agreements:
        name = agreement.judge
        margins = [row[f"{name}_margin"] for row in decided]
        wanted = win_rate(
            [0.0] * len(decided), margins, groups=[row["caption"] for row in decided], n_boot=relabel_report.REPLICATES
        )
        assert agreement.rate == wanted
        assert agreement.judged == N
        assert wanted.losses == sum(row[f"{name}_conflict"] for row in decided)
        assert [sum(q[k] for q in agreement.quarters) for k in (2, 3)] == [len(decided), wanted.losses]
        for low, high, pairs, conflicts in agreement.quarters:
            inside = [m for m in margins if low - 1e-6 <= abs(m) <= high + 1e-6]
            assert (len(inside), sum(m < 0 for m in inside)) == (pairs, conflicts)
    text = report.to_text()
    first = report.agreements[0].rate
    assert f"{first.rate:.1%} | {first.low:.1%} to {first.high:.1%} | {first.losses} |" in " ".join(text.split())
    assert text.endswith(f"{out}: {N} of {N} pairs")


def test_quarters_are_cut_by_the_size_of_the_margin() -> None:
    assert relabel_report._quarters(np.array([-1.0, 2.0, -3.0, 4.0, 5.0, 6.0, -7.0, 8.0])) == (
        (1.0, 2.0, 2, 1),
        (3.0, 4.0, 2, 1),
        (5.0, 6.0, 2, 0),
        (7.0, 8.0, 2, 1),
    )
    assert relabel_report._quarters(np.array([1.0, -1.0, 1.0])) == ((1.0, 1.0, 3, 1),)
    assert relabel_report._quarters(np.array([1.0, -1.0, 1.0, 1.0, -5.0])) == ((1.0, 1.0, 4, 1), (5.0, 5.0, 1, 1))
    assert relabel_report._quarters(np.array([-2.0])) == ((2.0, 2.0, 1, 1),)


def test_where_lower_is_better_the_lower_agrees(tiny: Path, tmp_path: Path) -> None:
    judge = reward_models.load("jpeg-incompressibility")
    judge.info = replace(judge.info, higher_is_better=False)
    how = {"min_margin": 0.1, "drop_conflicts": True}
    other = relabel.relabel(open_pairs(tiny), {"size": judge}, tmp_path / "a.parquet", cache=False, **how)
    report = rejudged(tiny, tmp_path / "b.parquet", "jpeg", **how)
    assert replace(other.agreements[0], judge="jpeg") == report.agreements[0]
    first, second = rows_of(tmp_path / "a.parquet"), rows_of(tmp_path / "b.parquet")
    assert 0 < len(second) == len(first) == report.written < N
    for a, b in zip(first, second, strict=True):
        assert (a["size_0"], a["size_margin"], a["size_conflict"]) == (-b["jpeg_0"], b["jpeg_margin"], b["jpeg_conflict"])


def test_a_picture_is_judged_once_for_its_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty pairs of three pictures under two prompts, in parts of eight."""
    pictures = [png(i) for i in range(3)]
    rows = [
        {"jpg_0": pictures[i % 3], "jpg_1": pictures[(i + 1) % 3], "label_0": 1.0, "caption": f"prompt {i % 2}"}
        for i in range(30)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    judge, seen = reward_models.load("jpeg"), []
    score = judge.score_prepared
    monkeypatch.setattr(judge, "score_prepared", lambda images, prompts: seen.extend(prompts) or score(images, prompts))
    how = {"batch_size": 1, "cache": tmp_path / "cache.sqlite"}
    relabel.relabel(open_pairs(tmp_path / "pairs.parquet"), {"jpeg": judge}, tmp_path / "a.parquet", **{**how, "cache": False})
    assert sorted(seen) == ["prompt 0"] * 3 + ["prompt 1"] * 3
    relabel.relabel(open_pairs(tmp_path / "pairs.parquet"), {"jpeg": judge}, tmp_path / "b.parquet", **how)
    del seen[:]
    relabel.relabel(open_pairs(tmp_path / "pairs.parquet"), {"jpeg": judge}, tmp_path / "c.parquet", **how)
    assert seen == []
    assert rows_of(tmp_path / "a.parquet") == rows_of(tmp_path / "b.parquet") == rows_of(tmp_path / "c.parquet")


def test_progress_goes_from_the_first_pair_to_the_last(tiny: Path, tmp_path: Path) -> None:
    told = []
    rejudged(tiny, tmp_path / "out.parquet", "jpeg", batch_size=2, progress=lambda *state: told.append(state))
    done = [state[1] for state in told]
    assert done == sorted(done) and len(done) > 10
    assert told[-1] == ("judging", N, N)
    rows = [{"jpg_0": png(0), "jpg_1": png(1), "label_0": 1.0, "caption": "x"}] * 20
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    rejudged(tmp_path / "pairs.parquet", tmp_path / "b.parquet", "jpeg", batch_size=1, progress=lambda *state: told.append(state))
    assert told[-3:] == [("judging", 8, 20), ("judging", 16, 20), ("judging", 20, 20)]


# ------------------------------------------------------------------------------------------------------ cleaning and labels


def test_conflicts_are_dropped_and_nothing_else(judged: tuple[relabel.Relabelled, Path], tiny: Path, tmp_path: Path) -> None:
    report = rejudged(tiny, tmp_path / "out.parquet", "oracle", "jpeg", drop_conflicts=True)
    wanted = [row for row in rows_of(judged[1]) if not row["oracle_conflict"]]
    assert rows_of(tmp_path / "out.parquet") == wanted
    assert report.dropped == {"conflicts": N - len(wanted), "too close": 0, "not judged": 0}
    assert any(row["jpeg_conflict"] for row in wanted) and any(row["label_0"] == 0.5 for row in wanted)
    assert report.agreements == judged[0].agreements  # of all pairs, whatever is written
    assert report.to_text().endswith(f"{len(wanted)} of {N} pairs (dropped: {N - len(wanted)} conflicts)")


def test_pairs_that_the_first_judge_sees_close_together_are_dropped(
    judged: tuple[relabel.Relabelled, Path], tiny: Path, tmp_path: Path
) -> None:
    report = rejudged(tiny, tmp_path / "out.parquet", "oracle", "jpeg", min_margin=0.05)
    wanted = [row for row in rows_of(judged[1]) if abs(row["oracle_0"] - row["oracle_1"]) >= 0.05]
    assert 0 < len(wanted) < N and rows_of(tmp_path / "out.parquet") == wanted
    assert any(row["label_0"] == 0.5 for row in rows_of(judged[1]) if row not in wanted)  # ties have a distance, too
    assert report.dropped["too close"] == N - len(wanted)


def test_flipped_labels_agree_with_the_judge_and_ties_stay(tiny: Path, tmp_path: Path) -> None:
    report = rejudged(tiny, tmp_path / "out.parquet", "oracle", labels="flip")
    rows, before = rows_of(tmp_path / "out.parquet"), rows_of(tiny)
    for row, human in zip(rows, before, strict=True):
        better = 1.0 if row["oracle_0"] > row["oracle_1"] else 0.0
        assert row["label_0"] == (0.5 if human["label_0"] == 0.5 else better)
        assert row["label_1"] == 1.0 - row["label_0"]
        assert row["human_label"] == human["label_0"]
        assert row["oracle_conflict"] is (None if row["label_0"] == 0.5 else row["label_0"] != row["human_label"])
    changed = sum(row["label_0"] != row["human_label"] for row in rows)
    assert report.changed == changed > 0
    assert f"{changed} labels changed (the human's are in human_label)" in report.to_text()
    for pair, row in zip(open_pairs(tmp_path / "out.parquet"), rows, strict=True):
        assert pair.winner.read_bytes() == row["jpg_0" if row["label_0"] >= 0.5 else "jpg_1"]


@pytest.fixture
def trained(tiny_towers: None, tmp_path: Path) -> object:
    """A judge with probabilities of its own: HPSv2.1 on two random layers."""
    import towers

    path = tmp_path / "hps.pt"
    torch.save({"state_dict": towers.original().state_dict()}, path)
    return reward_models.load("hps-v2.1", weights=path)


def test_soft_labels_are_the_judges_probability(trained: object, tiny: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.parquet"
    pq.write_table(pq.read_table(tiny).slice(4, 12), few)
    out = tmp_path / "out.parquet"
    relabel.relabel(open_pairs(few), {"hps-v2.1": trained}, out, labels="soft", cache=False)
    rows = rows_of(out)
    pictures = [[Image.open(io.BytesIO(row[f"jpg_{k}"])) for row in rows] for k in (0, 1)]
    chances = trained.prefer(*pictures, [row["caption"] for row in rows]).tolist()
    for row, human, chance in zip(rows, rows_of(few), chances, strict=True):
        assert row["label_0"] == pytest.approx(chance, abs=1e-5)
        assert row["label_0"] + row["label_1"] == 1.0
        assert row["human_label"] == human["label_0"]
        assert row["hps-v2.1_probability"] == pytest.approx(row["label_0"], abs=1e-8)
        assert (row["label_0"] > 0.5) is (row["hps-v2.1_0"] > row["hps-v2.1_1"])
    assert 0.5 not in [row["label_0"] for row in rows] and 0.5 in [row["human_label"] for row in rows]
    assert [pair.label for pair in open_pairs(out)] == [max(row["label_0"], row["label_1"]) for row in rows]
    facts = json.loads(pq.read_schema(out).metadata[b"diffalign"])
    assert facts["labels"] == "soft" and facts["judges"]["hps-v2.1"] == json.loads(json.dumps(trained.provenance()))
    assert str(tmp_path) not in json.dumps(facts)


# ------------------------------------------------------------------------------------------------- what cannot be used


def test_pictures_that_cannot_be_read_are_named_and_their_pairs_stay(tmp_path: Path) -> None:
    whole = png(0)
    rows = [{"jpg_0": sized(i), "jpg_1": sized(i + 1), "label_0": 1.0, "caption": "x"} for i in range(5)]
    rows[1]["jpg_1"], rows[3]["jpg_0"] = b"no picture", whole[: len(whole) // 2]
    data, out = tmp_path / "pairs.parquet", tmp_path / "out.parquet"
    pq.write_table(pa.Table.from_pylist(rows), data)
    report = rejudged(data, out, "jpeg")
    assert [place for place, _ in report.unreadable] == ["pairs.parquet:row 1 (jpg_1)", "pairs.parquet:row 3 (jpg_0)"]
    assert "not a picture in a format that Pillow knows" in report.unreadable[0][1]
    assert "Pictures that cannot be read (2):\n  pairs.parquet:row 1 (jpg_1): the picture of 10 bytes" in report.to_text()
    assert report.agreements[0].judged == 3 and report.agreements[0].rate.excluded == 0
    again = rows_of(out)
    assert [row["jpg_0"] for row in again] == [row["jpg_0"] for row in rows]
    assert [(r["jpeg_0"] is None, r["jpeg_1"] is None, r["jpeg_margin"] is None, r["jpeg_conflict"] is None) for r in again] == [
        (False, False, False, False),
        (False, True, True, True),
        (False, False, False, False),
        (True, False, True, True),
        (False, False, False, False),
    ]
    report = rejudged(data, out, "jpeg", overwrite=True, labels="flip", min_margin=1e-9)
    assert report.dropped == {"conflicts": 0, "too close": 0, "not judged": 2}
    rejudged(data, out, "jpeg", overwrite=True, labels="flip")
    assert rows_of(out)[1]["label_0"] == rows_of(out)[1]["human_label"] == 1.0


def test_rows_that_cannot_be_used_are_named_and_left_out(tmp_path: Path) -> None:
    rows = [{"jpg_0": png(0), "jpg_1": png(1), "label_0": label, "caption": f"{label}"} for label in (1.0, 7.0, 0.0)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    report = rejudged(tmp_path / "pairs.parquet", tmp_path / "out.parquet", "jpeg")
    assert report.unusable == (("pairs.parquet:row 1", "label_0 is 7; it must be in [0, 1]"),)
    assert report.pairs == report.written == 2
    assert [row["caption"] for row in rows_of(tmp_path / "out.parquet")] == ["1.0", "0.0"]


def test_all_ties_leave_nothing_to_agree_on(tmp_path: Path) -> None:
    rows = [{"jpg_0": png(0), "jpg_1": png(1), "label_0": 0.5, "caption": ""}] * 3
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    report = rejudged(tmp_path / "pairs.parquet", tmp_path / "out.parquet", "jpeg", drop_conflicts=True)
    assert (report.ties, report.written, report.agreements[0].rate) == (3, 3, None)
    assert "| jpeg  | 3      | 0" in report.to_text()


def test_an_unlabelled_row_stays_out_as_the_reader_says(tmp_path: Path) -> None:
    rows = [{"jpg_0": png(0), "jpg_1": png(1), "label_0": 1.0, "caption": "x", "has_label": has} for has in (True, False)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    report = rejudged(tmp_path / "pairs.parquet", tmp_path / "out.parquet", "jpeg")
    assert len(rows_of(tmp_path / "out.parquet")) == 1 and "1 unlabelled left out" in report.to_text()


# --------------------------------------------------------------------------------------------------- other forms of data


def listing(root: Path, name: str = "pairs.jsonl") -> Path:
    """Six pairs by path; the first picture is the smaller one, and ``chosen`` is not always preferred."""
    rows = []
    for i, label in enumerate((None, 1.0, 0.0, 0.5, 0.3, 1.0)):
        for side in (0, 1):
            (root / "pics").mkdir(parents=True, exist_ok=True)
            (root / "pics" / f"{i}, {side}.png").write_bytes(sized(i + side))
        row = {"prompt": f'a "quoted", prompt\n{i}', "chosen": f"pics/{i}, 0.png", "rejected": f"pics/{i}, 1.png", "label": label}
        rows.append(row | {"note": "" if i else "kept"})
    path = root / name
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("source", [".jsonl", ".csv", ".tsv"])
def test_lists_of_paths_are_read_again_from_wherever_they_are_written(source: str, ending: str, tmp_path: Path) -> None:
    data = listing(tmp_path / "data", f"pairs{source}")
    for place in (tmp_path / "data" / f"out{ending}", tmp_path / "elsewhere" / f"out{ending}"):
        rejudged(data, place, "jpeg")
        assert_same_pairs(open_pairs(data), open_pairs(place))


def with_prompt(root: Path, prompt: str) -> Path:
    """The six pairs of ``listing``; the prompt of the second is another."""
    path = listing(root)
    first, second, *others = map(json.loads, path.read_text().splitlines())
    path.write_text("".join(json.dumps(row) + "\n" for row in (first, second | {"prompt": prompt}, *others)))
    return path


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
@pytest.mark.parametrize("prompt", ["a\rb", "a\r\nb", "a\tb", "a\tb\rc"])
def test_prompts_with_bare_carriage_returns_and_tabs_are_read_again(prompt: str, ending: str, tmp_path: Path) -> None:
    data = with_prompt(tmp_path, prompt)
    rejudged(data, tmp_path / f"out{ending}", "jpeg")
    assert_same_pairs(open_pairs(data), open_pairs(tmp_path / f"out{ending}"))


def test_a_prompt_that_no_tsv_can_hold_is_told(tmp_path: Path) -> None:
    data = with_prompt(tmp_path, "a\tb\nc")
    with pytest.raises(UserError, match=r"a tab and a line break.*'a\\tb\\nc'; write .csv or .jsonl"):
        rejudged(data, tmp_path / "out.tsv", "jpeg")
    assert not (tmp_path / "out.tsv").exists()
    rejudged(data, tmp_path / "out.csv", "jpeg")
    assert_same_pairs(open_pairs(data), open_pairs(tmp_path / "out.csv"))


def test_scores_follow_the_columns_and_conflicts_the_preference(tmp_path: Path) -> None:
    data = listing(tmp_path)
    rejudged(data, tmp_path / "out.jsonl", "jpeg")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert all(row["jpeg_chosen"] > row["jpeg_rejected"] for row in rows)
    assert [row["jpeg_conflict"] for row in rows] == [False, False, True, None, True, False]
    assert [row["label"] for row in rows] == [None, 1.0, 0.0, 0.5, 0.3, 1.0]
    assert [row["chosen"] for row in rows] == [f"pics/{i}, 0.png" for i in range(6)]  # beside the list, as before
    rejudged(data, tmp_path / "out" / "far.csv", "jpeg", labels="flip")
    with (tmp_path / "out" / "far.csv").open(newline="") as file:
        far = list(csv.DictReader(file))
    assert far[0]["chosen"] == str(tmp_path / "pics" / "0, 0.png")
    assert [row["label"] for row in far] == ["1.0", "1.0", "1.0", "0.5", "0.7", "1.0"]
    assert [row["human_label"] for row in far] == ["1.0", "1.0", "0.0", "0.5", "0.3", "1.0"]
    assert [row["jpeg_conflict"] for row in far] == ["false", "false", "true", "", "true", "false"]
    assert far[0]["note"] == "kept"


def test_columns_may_go_by_other_names(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(sized(1))
    (tmp_path / "b.png").write_bytes(sized(2))
    row = {"words": "x", "good": "b.png", "bad": "a.png"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    table = open_pairs(tmp_path / "pairs.jsonl", columns={"prompt": "words", "chosen": "good", "rejected": "bad"})
    rejudged(table, tmp_path / "out.jsonl", "jpeg", labels="flip")
    again = json.loads((tmp_path / "out.jsonl").read_text())
    assert {key: again[key] for key in row} == row
    assert (again["label"], again["human_label"], again["jpeg_conflict"]) == (0.0, 1.0, True)


@pytest.mark.parametrize("form", ["arrow", "saved", "pair folders", "two folders"])
def test_other_forms_become_one_file(form: str, tmp_path: Path) -> None:
    data, contents = tmp_path / "data", [(sized(i + 1), sized(i)) for i in range(3)]
    if form in ("arrow", "saved"):
        cells = {side: [{"bytes": pair[k], "path": None} for pair in contents] for k, side in enumerate(("chosen", "rejected"))}
        features = datasets.Features(
            {"chosen": datasets.Image(), "rejected": datasets.Image(), "prompt": datasets.Value("string")}
        )
        dataset = datasets.Dataset.from_dict({**cells, "prompt": ["a", "b", "c"]}, features=features)
        dataset.save_to_disk(data)
        data = next(data.glob("*.arrow")) if form == "arrow" else data
    for i, pair in enumerate(contents) if "folders" in form else ():
        names = (
            (f"{i}/win.png", f"{i}/lose.png", f"{i}/prompt.txt")
            if form == "pair folders"
            else (f"w/{i}.png", f"l/{i}.png", f"{i}.txt")
        )
        for name, content in zip(names, (*pair, f"prompt {i}".encode()), strict=True):
            (data / name).parent.mkdir(parents=True, exist_ok=True)
            (data / name).write_bytes(content)
    rejudged(data, tmp_path / "out.parquet", "jpeg")
    assert_same_pairs(open_pairs(data), open_pairs(tmp_path / "out.parquet"))
    assert all(row["jpeg_conflict"] for row in rows_of(tmp_path / "out.parquet"))
    if "folders" in form:
        rejudged(data, tmp_path / "out.csv", "jpeg")
        assert_same_pairs(open_pairs(data), open_pairs(tmp_path / "out.csv"))


def test_columns_of_mixed_values_become_text(tmp_path: Path) -> None:
    data = listing(tmp_path)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row, extra in zip(rows, (1, "two", None, [3], 4.5, True), strict=True):
        row["extra"] = extra
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rejudged(data, tmp_path / "out.parquet", "jpeg")
    assert [row["extra"] for row in rows_of(tmp_path / "out.parquet")] == ["1", "two", None, "[3]", "4.5", "true"]
    assert_same_pairs(open_pairs(data), open_pairs(tmp_path / "out.parquet"))


def test_a_missing_file_is_told_and_its_pair_stays(tmp_path: Path) -> None:
    data = listing(tmp_path)
    (tmp_path / "pics" / "1, 0.png").unlink()
    for ending in ("jsonl", "parquet"):
        report = rejudged(data, tmp_path / f"out.{ending}", "jpeg")
        assert [place for place, _ in report.unreadable] == ["pairs.jsonl:line 2 (chosen)"]
        assert "No such file" in report.unreadable[0][1]
        assert report.written == 6
    with pytest.raises(RowProblem, match=r"row 1 \(winner\): there is no picture"):
        open_pairs(tmp_path / "out.parquet")[1]


def test_groups_of_rows_are_written_when_they_are_large(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relabel_files, "_ROW_GROUP", 40_000)
    rejudged(tiny, tmp_path / "out.parquet", "jpeg", batch_size=1)
    assert pq.ParquetFile(tmp_path / "out.parquet").num_row_groups > 1
    assert_same_pairs(open_pairs(tiny), open_pairs(tmp_path / "out.parquet"))


# -------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "judges, out, how, message",
    [
        (["jpeg"], "out.txt", {}, "the ending says how the data are written; it is one of .parquet, .jsonl"),
        (["jpeg"], "", {}, "is a folder; it should be a file|the ending says"),
        (["jpeg"], "out.csv", {}, r"the pictures are inside of .*pairs.parquet.*, but a list holds paths; use .parquet"),
        (["jpeg"], "there.parquet", {}, "there.parquet exists. Name another file, or add --overwrite"),
        (["jpeg"], "out.parquet", {"labels": "hard"}, "labels is one of human, flip, soft; got 'hard'"),
        (["jpeg"], "out.parquet", {"labels": "flip", "drop_conflicts": True}, r"turned round \(--labels flip\) or dropped"),
        (["jpeg"], "out.parquet", {"min_margin": -1.0}, "smallest margin is a number, at least 0; got -1.0"),
        (["jpeg"], "out.parquet", {"min_margin": math.nan}, "got nan"),
        (
            ["jpeg"],
            "out.parquet",
            {"labels": "soft"},
            "the judge 'jpeg' was not trained on preferences; its scores have an order",
        ),
        (["jpeg"], "out.parquet", {"min_margin": 1e9}, "No pair of 40 is left: 40 too close. Nothing was written."),
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
        rejudged(tiny, tmp_path / out, *judges, **how)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["no.sqlite", "there.parquet"]
    assert (tmp_path / "there.parquet").read_bytes() == b"mine"


def test_a_column_that_is_there_already_is_not_written_over(judged: tuple[relabel.Relabelled, Path], tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="has a column oracle_0 already. Call the judge something else, as in --judges again=oracle"
    ):
        rejudged(judged[1], tmp_path / "out.parquet", "oracle")
    judge = reward_models.load("oracle")
    relabel.relabel(open_pairs(judged[1]), {"again": judge}, tmp_path / "out.parquet", labels="flip", cache=False)
    assert all(row["again_0"] == row["oracle_0"] for row in rows_of(tmp_path / "out.parquet"))
    with pytest.raises(UserError, match="has a column human_label already: its labels are not the human's any more"):
        relabel.relabel(open_pairs(tmp_path / "out.parquet"), {"new": judge}, tmp_path / "x.parquet", labels="flip", cache=False)


def test_prompts_that_a_judge_cannot_judge_by_are_told(tmp_path: Path) -> None:
    rows = [{"jpg_0": png(0), "jpg_1": png(1), "label_0": 1.0, "caption": "a corgi in a spaceship"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    with pytest.raises(UserError, match="pairs.parquet cannot be judged: .*'a corgi in a spaceship'"):
        rejudged(tmp_path / "pairs.parquet", tmp_path / "out.parquet", "oracle")


def test_an_interrupted_run_leaves_what_was_there(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.parquet"
    rejudged(tiny, out, "jpeg", drop_conflicts=True)
    before, work, done = out.read_bytes(), relabel._Work.judge, []

    def stops(self, numbers, *args, **how):
        if numbers.start:
            raise KeyboardInterrupt
        done.append(numbers)
        return work(self, numbers, *args, **how)

    monkeypatch.setattr(relabel._Work, "judge", stops)
    with pytest.raises(KeyboardInterrupt):
        rejudged(tiny, out, "jpeg", overwrite=True, batch_size=1)
    assert done and out.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["out.parquet"]


# ------------------------------------------------------------------------------------------------------------ the command


def test_the_command_writes_and_reports(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out.parquet"
    words = [
        "relabel",
        str(tiny),
        "--judges",
        "oracle,size=jpeg",
        "--judge-options",
        "size.per_megapixel=true",
        "--out",
        str(out),
    ]
    words += ["--labels", "flip", "--min-margin", "0.05", "--batch-size", "8"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    rows = rows_of(out)
    assert f"{out}: {len(rows)} of {N} pairs (dropped: {N - len(rows)} too close), " in said
    sizes = [pytest.approx(-kilobytes(row["jpg_0"]) / (64 * 64 / 1e6), rel=1e-6) for row in rows]
    assert [row["size_0"] for row in rows] == sizes
    assert cli.main(words) == 2
    assert "exists. Name another file, or add --overwrite" in " ".join(capsys.readouterr().err.split())
    assert cli.main([*words, "--overwrite", "--no-cache"]) == 0
    assert rows_of(out) == rows


def kilobytes(content: bytes) -> float:
    from reward_models.jpeg import kilobytes

    return kilobytes(Image.open(io.BytesIO(content)))


def test_the_command_offers_the_labels_there_are() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert tuple(next(a for a in parser._actions if a.dest == "labels").choices) == relabel_verdict.LABELS


@pytest.mark.parametrize(
    "words, message",
    [
        (["{data}", "--judges", "jpeg", "--out", "{data}"], "is the data that are read; name another file"),
        (["{folder}", "--judges", "jpeg", "--out", "{folder}/new.parquet"], "would be taken for a part of it from then on"),
        (["{data}", "--judges", "jepg", "--out", "{out}"], "no judge called 'jepg'. Did you mean 'jpeg'"),
        (["{data}", "--judges", "jpeg", "--out", "{out}", "--columns", "caption"], "expected ROLE=NAME"),
        (["{data}", "--judges", "jpeg", "--out", "{out}", "--split"], None),
        (["{folder}", "--judges", "jpeg", "--out", "{out}", "--split", "test"], "has no split 'test'"),
        (["nowhere.parquet", "--judges", "jpeg", "--out", "{out}"], "There is no file or folder nowhere.parquet"),
        (["{data}", "--judges", "pickscore", "--out", "there.csv"], "the pictures are inside of"),
    ],
)
def test_the_command_tells_mistakes_in_one_paragraph(
    words: list[str], message: str | None, tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    data = folder / "pairs.parquet"
    data.write_bytes(tiny.read_bytes())
    words = [word.format(data=data, folder=folder, out=tmp_path / "out.parquet") for word in words]
    if message is None:
        with pytest.raises(SystemExit):
            cli.main(["relabel", *words])
        return
    assert cli.main(["relabel", *words, "--overwrite"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith("diffalign relabel: ") and message in error
    assert [p.name for p in tmp_path.iterdir()] == ["data"] and data.read_bytes() == tiny.read_bytes()


# ------------------------------------------------------------------------------------------------------ where lower is better


class Bright(reward_models.PointwiseJudge):
    """Likes dark pictures: its score is how bright they are."""

    info = reward_models.RewardInfo(name="bright", needs_prompt=False, higher_is_better=False)
    sharpness = 0.05

    def score_prepared(self, prepared, prompts):
        return torch.tensor([np.asarray(picture.convert("RGB")).mean() for picture in prepared])


@pytest.fixture
def shades(tmp_path: Path) -> Path:
    """Rows whose winner, the second picture in every other row, is dark, bright, dark, bright."""
    rows = []
    for number, (chosen, rejected) in enumerate([(40, 90), (200, 30), (10, 60), (150, 140)]):
        for side, shade in (("chosen", chosen), ("rejected", rejected)):
            Image.new("RGB", (8, 8), (shade, shade, shade)).save(tmp_path / f"{number}{side}.png")
        rows.append(
            {"prompt": "a", "chosen": f"{number}chosen.png", "rejected": f"{number}rejected.png", "label": 1 - number % 2}
        )
    (tmp_path / "shades.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "shades.jsonl"


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_scores_are_turned_round_where_lower_is_better(shades: Path, ending: str) -> None:
    out = shades.parent / f"judged.{ending}"
    relabel.relabel(open_pairs(shades), {"bright": Bright()}, out, cache=False)
    table = open_pairs(out, scores="bright")
    assert [pair.scores for pair in table] == [(-40, -90), (-30, -200), (-10, -60), (-140, -150)]
    own = {"score_chosen": "bright_chosen", "score_rejected": "bright_rejected"}
    assert open_pairs(out, columns=own)[0].scores == (40, 90)
    with pytest.raises(UserError, match="bright_"):
        relabel.relabel(open_pairs(out), {"bright": Bright()}, shades.parent / "twice.jsonl", cache=False)


def test_probabilities_are_of_darker_pictures_where_lower_is_better(shades: Path) -> None:
    judge, black, white = Bright(), Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), "white")
    assert judge.prefer([black, white], [white, black]) == pytest.approx([1 / (1 + math.exp(-0.05 * 255)), 0], abs=1e-5)
    assert judge.rank([white, black]).places[0].probability == pytest.approx(judge.prefer([black], [white]).item())
    out = shades.parent / "soft.parquet"
    relabel.relabel(open_pairs(shades), {"bright": judge}, out, labels="soft", cache=False)
    for row in rows_of(out):
        agrees = (row["label"] > 0.5) == (row["human_label"] > 0.5)
        assert agrees != row["bright_conflict"] and row["label"] == pytest.approx(row["bright_probability"])


def test_a_sharpness_is_above_zero() -> None:
    judge = Bright()
    judge.sharpness = -1.0
    with pytest.raises(reward_models.JudgeError, match="above zero"):
        judge.prefer([Image.new("RGB", (8, 8))], [Image.new("RGB", (8, 8))])


def test_judges_of_parts_must_not_depend_on_them(shades: Path) -> None:
    """Data are judged part by part: what is standardised by its neighbours would depend on how many fit into one."""
    table, out = open_pairs(shades), shades.parent / "z.jsonl"
    for write in (relabel.relabel, lambda *given, **how: relabel_top.write_best(*given, 2, **how)):
        with pytest.raises(UserError, match="standardised by the pictures judged together"):
            write(table, {"z": Bright().z()}, out, cache=False)
        with pytest.raises(UserError, match="given by names"):
            write(table, [Bright()], out, cache=False)
    assert not out.exists()
