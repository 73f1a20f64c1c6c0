"""Every form of preference data gives the same pairs; what is wrong with a row is said with its place."""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import shutil
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from itertools import permutations
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, features

from diffalign.data import layouts, readers
from diffalign.data.layouts import pick_a_pic as pick_a_pic_layout
from diffalign.data.open import open_pairs
from diffalign.data.pairs import SIDEWAYS, ImageSource, RowProblem, UnreadableImage
from diffalign.data.readers import _files, listing
from diffalign.data.readers._dataset import DatasetRows
from diffalign.data.readers.parquet import ROWS_AT_ONCE
from diffalign.data.validate import check, contact_sheet
from diffalign.errors import UserError
from pipelines.commands import data as command
from pipelines.tiny import scenes

N = 6


def png(seed: int, size: tuple[int, int] = (24, 20)) -> bytes:
    """A small picture of noise; another seed gives another picture."""
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def rows(n: int = N) -> list[dict]:
    """Pair i prefers picture 2i over picture 2i + 1."""
    return [{"prompt": f"prompt {i}", "chosen": png(2 * i), "rejected": png(2 * i + 1)} for i in range(n)]


def pick_a_pic(labels: list[float], **more: list) -> pa.Table:
    n = len(labels)
    columns = {"jpg_0": [png(2 * i) for i in range(n)], "jpg_1": [png(2 * i + 1) for i in range(n)]}
    return pa.table(columns | {"label_0": labels, "caption": [f"prompt {i}" for i in range(n)]} | more)


def write_pictures(root: Path, names: list[tuple[str, str]]) -> None:
    for row, (win, lose) in zip(rows(), names, strict=True):
        for name, content in ((win, row["chosen"]), (lose, row["rejected"])):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)


def as_parquet(root: Path) -> Path:
    pq.write_table(pick_a_pic([1.0] * N), root / "pairs.parquet")
    return root / "pairs.parquet"


def as_parquet_shards(root: Path) -> Path:
    table = pick_a_pic([1.0] * N)
    (root / "data").mkdir()
    pq.write_table(table.slice(0, 4), root / "data/train-00000-of-00002.parquet", row_group_size=3)
    pq.write_table(table.slice(4), root / "data/train-00001-of-00002.parquet")
    pq.write_table(table.slice(0, 1), root / "data/test-00000-of-00001.parquet")
    return root


def as_arrow_shards(root: Path) -> Path:
    for k, part in enumerate((rows()[:2], rows()[2:])):
        datasets.Dataset.from_list(part).save_to_disk(root / f"s{k}")
        os.replace(root / f"s{k}/data-00000-of-00001.arrow", root / f"data-{k:05d}.arrow")
        for leftover in (root / f"s{k}").iterdir():
            leftover.unlink()
    return root


def as_saved_with_image_features(root: Path) -> Path:
    features = datasets.Features({"prompt": datasets.Value("string"), "chosen": datasets.Image(), "rejected": datasets.Image()})
    cells = [{k: {"bytes": v, "path": None} if k != "prompt" else v for k, v in row.items()} for row in rows()]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(cells, features=features)}).save_to_disk(root / "saved")
    return root / "saved"


def as_jsonl(root: Path) -> Path:
    write_pictures(root, [(f"img/{i}a.png", f"img/{i}b.png") for i in range(N)])
    lines = [json.dumps({"prompt": f"prompt {i}", "chosen": f"img/{i}a.png", "rejected": f"img/{i}b.png"}) for i in range(N)]
    (root / "pairs.jsonl").write_text("\n\n".join(lines))
    return root / "pairs.jsonl"


def as_csv(root: Path, suffix: str = ".csv", delimiter: str = ",") -> Path:
    write_pictures(root, [(f"{i}a.png", f"{i}b.png") for i in range(N)])
    with (root / f"pairs{suffix}").open("w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.writer(stream, delimiter=delimiter)
        writer.writerow(["caption", "winner", "loser"])
        writer.writerows([f"prompt {i}", f"{i}a.png", f"{i}b.png"] for i in range(N))
    return root / f"pairs{suffix}"


def as_tsv(root: Path) -> Path:
    return as_csv(root, ".tsv", "\t")


def as_pair_folders(root: Path) -> Path:
    write_pictures(
        root, [(f"p{i}/{'win' if i % 2 else 'chosen'}.png", f"p{i}/{'lose' if i % 2 else 'rejected'}.png") for i in range(N)]
    )
    for i in range(N):
        (root / f"p{i}/prompt.txt").write_text(f"prompt {i}\n")
    return root


def as_two_folders(root: Path) -> Path:
    write_pictures(root, [(f"w/n{i}.png", f"l/n{i}.png") for i in range(N)])
    for i in range(N):
        (root / ("w" if i % 2 else ".") / f"n{i}.txt").write_text(f"prompt {i}")
    return root


def as_pictures(root: Path) -> Path:
    """Single pictures: the winners, each with its caption."""
    (root / "set").mkdir()
    for i, row in enumerate(rows()):
        (root / f"set/{i}.png").write_bytes(row["chosen"])
        (root / f"set/{i}.txt").write_text(f"prompt {i}")
    return root / "set"


FORMS = [
    as_parquet,
    as_parquet_shards,
    as_arrow_shards,
    as_saved_with_image_features,
    as_jsonl,
    as_csv,
    as_tsv,
    as_pair_folders,
    as_two_folders,
]


@pytest.mark.parametrize("write", FORMS, ids=lambda f: f.__name__)
def test_every_form_gives_the_same_pairs_in_any_order(write, tmp_path):
    table = open_pairs(write(tmp_path))
    assert len(table) == N
    for i in (3, 0, 5, 1, 4, 2):
        pair = table[i]
        assert (pair.prompt, pair.label, pair.weight) == (f"prompt {i}", 1.0, 1.0)
        assert (pair.winner.read_bytes(), pair.loser.read_bytes()) == (png(2 * i), png(2 * i + 1))
    assert len({table.origin(i) for i in range(N)}) == N
    assert len(table.fingerprint) == 64


@pytest.mark.parametrize("write", [as_parquet, as_jsonl, as_pair_folders, as_two_folders], ids=lambda f: f.__name__)
def test_the_fingerprint_is_stable_and_changes_with_the_data(write, tmp_path):
    place = write(tmp_path)
    before = open_pairs(place).fingerprint
    assert open_pairs(place).fingerprint == before
    if place.suffix == ".parquet":
        pq.write_table(pick_a_pic([1.0] * (N - 1) + [0.0]), place)
    else:
        next(p for p in sorted(tmp_path.rglob("*.png"))).write_bytes(png(99))
    assert open_pairs(place).fingerprint != before


def dataset_identity(data: datasets.Dataset) -> str:
    found = DatasetRows(data, "data", None).identity(["chosen", "rejected"], ["prompt"])
    return json.dumps(found, default=list)


@pytest.mark.parametrize("hashed", [1000, 2**20], ids=["large", "small"])
@pytest.mark.parametrize("prompts", ["others", "equal"])
def test_slices_of_a_split_are_different_data(hashed, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "HASHED_BYTES", hashed)
    table = [row | ({"prompt": "p"} if prompts == "equal" else {}) for row in rows()]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "p.parquet")
    how = {"data_files": str(tmp_path / "p.parquet"), "cache_dir": str(tmp_path / "cache")}
    slices = [datasets.load_dataset("parquet", split=split, **how) for split in ("train[:3]", "train[3:]", "train[:3]")]
    first, second, again = (dataset_identity(data) for data in slices)
    assert first == again != second


@pytest.mark.parametrize("column", ["prompt", "chosen"])
def test_data_in_memory_are_known_by_their_content(column):
    changed = [row | {column: other[column]} for row, other in zip(rows(), reversed(rows()), strict=True)]
    first, second, again = (dataset_identity(datasets.Dataset.from_list(table)) for table in (rows(), changed, rows()))
    assert first == again != second


def test_a_split_is_chosen_by_file_name_and_an_unknown_one_is_refused(tmp_path):
    place = as_parquet_shards(tmp_path)
    assert len(open_pairs(place, split="test")) == 1
    with pytest.raises(UserError, match="no split 'validation'.*test, train"):
        open_pairs(place, split="validation")
    with pytest.raises(UserError, match="no split 'test'.*train"):
        open_pairs(as_saved_with_image_features(tmp_path / "x"), split="test")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("pickapic_validation.parquet", "validation"),
        ("pickapic-validation.parquet", "validation"),
        ("my-test-00000.parquet", "test"),
        ("Validation-00000.parquet", "validation"),
        ("eval.parquet", "eval"),
        ("pickapic_test_unique.parquet", "test_unique"),
        ("held/My_Test/00000.parquet", "test"),
        ("pairs_train_v2.parquet", "train"),
        ("TRAIN-00001.parquet", "train"),
        ("pairs-flux-dev.parquet", "train"),
        ("latest.parquet", "train"),
    ],
)
def test_rows_for_testing_do_not_become_training_data(name, split, tmp_path):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pick_a_pic([1.0] * 2), tmp_path / "train.parquet")
    pq.write_table(pick_a_pic([1.0]), tmp_path / name)
    table = open_pairs(tmp_path)
    assert len(table) == (3 if split == "train" else 2)
    assert len(open_pairs(tmp_path, split=split)) == (3 if split == "train" else 1)
    assert split == "train" or f"(split train, without {split})" in table.description


def test_the_cache_of_datasets_has_its_splits(tmp_path):
    names = ("train", "validation", "test_unique-00000-of-00001")
    for number, name in enumerate(names, 1):
        as_arrow(pick_a_pic([1.0] * number), tmp_path / f"my_test-{name}.arrow")
    assert [len(open_pairs(tmp_path, split=name.split("-")[0])) for name in names] == [1, 2, 3]


def test_parquet_reads_forwards_and_backwards_across_batches_and_row_groups(tmp_path):
    n = 3 * ROWS_AT_ONCE + 5
    table = pa.table({"prompt": [str(i) for i in range(n)], "chosen": [b"c"] * n, "rejected": [b"r"] * n})
    pq.write_table(table, tmp_path / "p.parquet", row_group_size=2 * ROWS_AT_ONCE)
    opened = open_pairs(tmp_path / "p.parquet")
    order = [0, ROWS_AT_ONCE, 2 * ROWS_AT_ONCE + 3, n - 1, 1, *range(n)]
    assert [opened[i].prompt for i in order] == [str(i) for i in order]
    assert [pair.prompt for pair in opened] == [str(i) for i in range(n)]


def test_label_zero_exchanges_the_sides_and_a_soft_label_is_kept(tmp_path):
    pq.write_table(pick_a_pic([0.0, 0.25, 1.0]), tmp_path / "p.parquet")
    first, soft, last = open_pairs(tmp_path / "p.parquet")
    assert first.label == 1.0 and first.winner.read_bytes() == png(1) and first.loser.read_bytes() == png(0)
    assert soft.label == 0.75 and soft.winner.read_bytes() == png(3)
    assert last.label == 1.0 and last.winner.read_bytes() == png(4)


def test_ties_are_kept_as_one_half_or_dropped_and_unlabelled_rows_are_left_out(tmp_path):
    table = pick_a_pic([1.0, 0.5, 0.0, 0.5], label_1=[0.0, 0.5, 1.0, 0.5], has_label=[True, True, False, True])
    pq.write_table(table, tmp_path / "p.parquet")
    keep, drop = (open_pairs(tmp_path / "p.parquet", ties=ties) for ties in ("keep", "drop"))
    assert [p.label for p in keep] == [1.0, 0.5, 0.5] and keep.left_out == {"ties": 0, "unlabelled": 1}
    assert [p.prompt for p in drop] == ["prompt 0"] and drop.left_out == {"ties": 2, "unlabelled": 1}
    assert keep.fingerprint != drop.fingerprint
    assert "2 ties left out" in drop.description


@pytest.mark.parametrize("said", [0, 0.0, "False", "false", "0"])
def test_a_pair_without_a_label_is_left_out_however_the_table_says_so(said, tmp_path):
    pq.write_table(pick_a_pic([1.0, 1.0], has_label=[said, type(said)(1) if said != "0" else "1"]), tmp_path / "p.parquet")
    table = open_pairs(tmp_path / "p.parquet")
    assert len(table) == 1 and table.left_out["unlabelled"] == 1


@pytest.mark.parametrize(("said", "n"), [("0.0", 1), ("FALSE", 1), ("", 2), ("no", 2)])
def test_labels_of_csv_are_understood_or_refused_but_not_guessed_at(said, n, tmp_path):
    write_pictures(tmp_path, [(f"{i}a.png", f"{i}b.png") for i in range(N)])
    lines = ["0a.png,0b.png,TRUE,,p,1", f"1a.png,1b.png,False,,p,{said}"]
    (tmp_path / "p.csv").write_text("\n".join(["jpg_0,jpg_1,label_0,label_1,caption,has_label", *lines]))
    table = open_pairs(tmp_path / "p.csv")
    assert len(table) == n and table[0].winner.read_bytes() == png(0)
    if said == "no":
        with pytest.raises(RowProblem, match="has_label is 'no', not a number"):
            table[1]


@pytest.mark.parametrize("label", ["1" + "0" * 400, "1" * 5000, "[" * 100_000])
def test_an_absurd_cell_is_a_problem_of_its_row(label, tmp_path):
    place = as_jsonl(tmp_path)
    line = '{"prompt": "p", "chosen": "img/0a.png", "rejected": "img/0b.png", "label": ' + label + "}"
    place.write_text(place.read_text() + "\n" + line)
    assert check(open_pairs(place)).usable == N


@pytest.mark.parametrize("start", ["", "data:image/png;base64,", "https://"])
def test_a_picture_as_text_is_not_repeated_in_messages(start, tmp_path):
    place = as_jsonl(tmp_path)
    place.write_text(json.dumps({"prompt": "p", "chosen": start + "iVBORw0KGgo" * 10_000, "rejected": "img/0b.png"}))
    (problem,) = check(open_pairs(place)).unreadable
    assert problem.side == "winner" and len(str(problem)) < 400


def test_each_kind_of_label_is_looked_at_once_not_each_row(tmp_path, monkeypatch):
    rows, asked = 3000, []
    pictures = {"jpg_0": [png(0)] * rows, "jpg_1": [png(1)] * rows, "caption": ["p"] * rows}
    pq.write_table(pa.table({**pictures, "label_0": [1.0, 0.5, 0.0] * (rows // 3)}), tmp_path / "p.parquet")
    plain = pick_a_pic_layout.probability
    monkeypatch.setattr(pick_a_pic_layout, "probability", lambda row: asked.append(row) or plain(row))
    table = open_pairs(tmp_path / "p.parquet", ties="drop")
    assert len(table) == 2000 and table.left_out["ties"] == 1000 and len(asked) == 3


def test_labels_that_cannot_be_remembered_are_looked_at(tmp_path):
    place = as_jsonl(tmp_path)
    base = {"prompt": "p", "chosen": "img/0a.png", "rejected": "img/0b.png"}
    place.write_text("\n".join(json.dumps(base | {"label": label}) for label in (1, [1.0], 0.5, 1.0)))
    table = open_pairs(place, ties="drop")
    assert len(table) == 3 and table.left_out["ties"] == 1 and table[2].label == 1.0
    with pytest.raises(RowProblem, match="line 2.*label"):
        table[1]


def test_labels_and_weights_of_a_listing_are_used(tmp_path):
    write_pictures(tmp_path, [(f"{i}a.png", f"{i}b.png") for i in range(N)])
    base = [{"prompt": str(i), "chosen": f"{i}a.png", "rejected": f"{i}b.png"} for i in range(3)]
    extra = [{"label": 0.1, "weight": 2}, {}, {"label": 0.5}]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(b | e) for b, e in zip(base, extra, strict=True)))
    pairs = list(open_pairs(tmp_path / "p.jsonl"))
    assert [(p.label, p.weight) for p in pairs] == [(0.9, 2.0), (1.0, 1.0), (0.5, 1.0)]
    assert pairs[0].winner.read_bytes() == png(1)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"label": 1.5}, r"label is 1.5; it must be in \[0, 1\]"),
        ({"label": float("nan")}, "label is nan"),
        ({"label": "yes"}, "label is 'yes', not a number"),
        ({"weight": -1}, "weight is -1; it must be finite and at least 0"),
        ({"chosen": None}, "there is no picture"),
        ({"rejected": "https://x/y.png"}, "is an address"),
        ({"prompt": ["a"]}, "prompt is list, not text"),
        ({"prompt": "half \ud83d"}, "prompt holds half of a surrogate pair, which is no character"),
    ],
)
def test_a_row_that_makes_no_sense_is_named_and_the_others_stay(line, reason, tmp_path):
    place = as_jsonl(tmp_path)
    good = {"prompt": "p", "chosen": "img/0a.png", "rejected": "img/0b.png"}
    place.write_text("\n".join(json.dumps(r) for r in (good, good | line, good)))
    table = open_pairs(place, ties="drop")
    with pytest.raises(RowProblem, match=rf"pairs.jsonl:line 2.*{reason}"):
        table[1]
    assert table[2].prompt == "p"


@pytest.mark.parametrize("name", ["a\0.png", "a\ud83d.png", "~nobody-of-this-name/a.png"])
def test_a_name_that_no_file_can_have_is_a_problem_of_its_row(name, tmp_path, capsys):
    place = as_jsonl(tmp_path)
    place.write_text(place.read_text() + "\n" + json.dumps({"prompt": "p", "chosen": name, "rejected": "img/0b.png"}))
    report = check(open_pairs(place))
    assert [(p.origin, p.side) for p in report.unreadable] == [("pairs.jsonl:line 12", "winner")] and report.usable == N
    assert run_check(str(place), "--json", str(tmp_path / "report.json")) == 1
    assert "cannot read" in capsys.readouterr().out


def test_a_name_that_begins_with_a_tilde_may_be_a_file(tmp_path):
    place = as_jsonl(tmp_path)
    (tmp_path / "~pic.png").write_bytes(png(7))
    place.write_text(json.dumps({"prompt": "p", "chosen": "~pic.png", "rejected": "img/0b.png"}))
    assert open_pairs(place)[0].winner.read_bytes() == png(7)


@pytest.mark.skipif(sys.platform != "linux", reason="file names of other systems are text")
@pytest.mark.parametrize("write", [as_pair_folders, as_pictures, as_two_folders], ids=lambda f: f.__name__)
def test_names_of_files_that_are_not_utf8_can_be_written_into_reports(write, tmp_path):
    place = write(tmp_path)
    for file in sorted(place.rglob("*"), reverse=True):
        if file.stem in ("p0", "0", "n0"):
            file.rename(file.with_name(os.fsdecode(b"\xe9") + file.suffix))
    table = open_pairs(place)
    report = check(table)
    assert report.usable == N and any(table.origin(i).endswith((r"\udce9", r"\udce9.png")) for i in range(N))
    (place / "broken.png").write_bytes(b"")
    json.dumps(report.to_dict(), ensure_ascii=False).encode()


def test_contradictory_pick_a_pic_labels_are_a_problem_of_the_row(tmp_path):
    pq.write_table(pick_a_pic([1.0, 1.0], label_1=[0.0, 1.0]), tmp_path / "p.parquet")
    with pytest.raises(RowProblem, match="p.parquet:row 1: .*must add up to 1"):
        open_pairs(tmp_path / "p.parquet")[1]


def test_csv_with_line_breaks_in_captions_and_a_short_row(tmp_path):
    place = as_csv(tmp_path)
    place.write_text('caption,winner,loser\n"two\nlines",0a.png,0b.png\nshort,1a.png\nlast,2a.png,2b.png\n')
    table = open_pairs(place)
    assert table[0].prompt == "two\nlines" and table[2].prompt == "last" and table[2].winner.read_bytes() == png(4)
    with pytest.raises(RowProblem, match="pairs.csv:line 4: the header has 3 columns, this row has 2"):
        table[1]


def test_quotation_marks_in_a_tsv_are_read_as_they_were_meant(tmp_path):
    """As pandas writes them, and as they stand in lists that no CSV writer has seen; no row swallows another."""
    lines = ['"a ""red"" circle"', '"Hello" on a sign', 'a 24" screen', '"opened', 'second "', '"two\tcells"']
    (tmp_path / "p.tsv").write_text("prompt\tchosen\trejected\n" + "".join(f"{text}\t0.png\t1.png\n" for text in lines))
    meant = ['a "red" circle', '"Hello" on a sign', 'a 24" screen', '"opened', 'second "', "two\tcells"]
    assert [pair.prompt for pair in open_pairs(tmp_path / "p.tsv")] == meant


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "prompt,chosen,rejected\nfine,a,b\ncafé,a,b\n".encode("latin-1"), "line 3: byte 0xe9 is not UTF-8; save"),
        ("p.jsonl", '{"prompt": "a"}\n'.encode("utf-16"), "line 1: byte 0xff is not UTF-8; save"),
        ("p.csv", b'prompt,chosen,rejected\nfine,a,b\n"open,a,b\nc,a,b\n', "line 3: a quotation mark is opened here and never"),
        ("p.csv", b'prompt,chosen,rejected\n"a" b,a,b\n', "line 2: this is not valid CSV .*doubled"),
        ("p.csv", b"prompt,chosen,rejected\ra,0.png,1.png\r", "line 1: a line ends in CR alone.*save"),
        ("p.jsonl", b"\n\n", "p.jsonl is empty; it should be"),
        ("p.csv", b"", "p.csv is empty; it should be"),
        ("p.csv", b"prompt,chosen,rejected,label,label\na,0.png,1.png,1,0\n", "two columns called 'label'"),
    ],
    ids=["latin-1", "utf-16", "open", "marks", "cr", "blank", "empty", "twice"],
)
def test_a_list_that_cannot_be_read_names_the_line_and_the_cause(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_pairs(tmp_path / name)


def test_missing_columns_are_answered_with_what_is_there_and_what_is_needed(tmp_path):
    pq.write_table(pa.table({"text_a": ["x"], "good": [b"1"], "bad": [b"2"]}), tmp_path / "p.parquet")
    with pytest.raises(UserError) as caught:
        open_pairs(tmp_path / "p.parquet")
    message = str(caught.value)
    assert all(
        word in message
        for word in ("text_a, good, bad", "jpg_0", "label_0", "chosen", "rejected", "--columns prompt=PROMPT,chosen=")
    )
    named = open_pairs(tmp_path / "p.parquet", columns={"prompt": "text_a", "chosen": "good", "rejected": "bad"})
    assert named[0].winner.read_bytes() == b"1" and named[0].prompt == "x"
    with pytest.raises(UserError, match="has no column 'best'. It has: text_a"):
        open_pairs(tmp_path / "p.parquet", columns={"chosen": "best"})
    with pytest.raises(UserError, match="'winer' is not a role.*chosen"):
        open_pairs(tmp_path / "p.parquet", columns={"winer": "good"})


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            "Prompt,Chosen,Rejected,Label",
            "Capitals count; name the columns: --columns prompt=Prompt,chosen=Chosen,.*,label=Label",
        ),
        ("Prompt,Image", "--columns prompt=Prompt,image=Image"),
        ("prompt;chosen;rejected", "seems to be parted by semicolons, and a .csv file is read as parted by commas"),
        ("prompt\tchosen\trejected", "seems to be parted by tabs"),
    ],
)
def test_a_spreadsheet_by_other_customs_is_answered_with_what_to_do(header, message, tmp_path):
    (tmp_path / "p.csv").write_text(f"{header}\n")
    with pytest.raises(UserError, match=message):
        open_pairs(tmp_path / "p.csv")


def test_places_that_are_no_data_are_answered_with_the_accepted_forms(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no file or folder .*nowhere.parquet.*jsonl.*prompt.txt.*parquet shards"):
        open_pairs(tmp_path / "nowhere.parquet")
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UserError, match="none of the known forms"):
        open_pairs(tmp_path)
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="broken.parquet is not a readable parquet file"):
        open_pairs(tmp_path / "broken.parquet")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="no file or folder nobody/nothing.*hub.*could not be loaded"):
        open_pairs("nobody/nothing")


def as_parquet_file(table: pa.Table, place: Path) -> None:
    pq.write_table(table, f"{place}.parquet")


def as_arrow_file(table: pa.Table, place: Path) -> None:
    as_arrow(table, Path(f"{place}.arrow"))


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("write", [as_parquet_file, as_arrow_file], ids=["parquet", "arrow"])
def test_shards_that_do_not_have_the_same_columns_are_refused(write, odd, tmp_path):
    tables = [pick_a_pic([1.0]), pick_a_pic([1.0], weight=[5.0])]
    for number in (0, 1):
        write(tables[number ^ odd], tmp_path / f"train-{number}")
    with pytest.raises(UserError, match=rf"train-{odd}\..* lacks the columns weight, which train-{1 - odd}\..* has"):
        open_pairs(tmp_path)


@pytest.mark.parametrize("write", [as_parquet_file, as_arrow_file], ids=["parquet", "arrow"])
def test_two_columns_of_one_name_are_refused(write, tmp_path):
    table = pick_a_pic([1.0])
    write(table.append_column("caption", [["another"]]), tmp_path / "p")
    with pytest.raises(UserError, match="two columns called 'caption'; rename or remove"):
        open_pairs(tmp_path)


@pytest.mark.parametrize("write", [as_parquet_shards, as_arrow_shards, as_two_folders], ids=lambda f: f.__name__)
def test_what_macos_puts_beside_copies_is_no_row(write, tmp_path):
    place = write(tmp_path)
    for file in list(tmp_path.rglob("*.*")):
        (file.parent / f"._{file.name}").write_bytes(b"\0\5\x16\7")
    assert len(list(open_pairs(place))) == N


def test_folders_that_lack_a_picture_or_caption_say_which(tmp_path):
    place = as_pair_folders(tmp_path / "a")
    (place / "p1/lose.png").unlink()
    (place / "p2/prompt.txt").unlink()
    table = open_pairs(place)
    with pytest.raises(RowProblem, match="a/p1 .*no picture called lose"):
        table[1]
    with pytest.raises(RowProblem, match="a/p2.*prompt.txt"):
        table[2]
    place = as_two_folders(tmp_path / "b")
    (place / "l/n3.png").unlink()
    with pytest.raises(RowProblem, match=r"b/n3 \(loser\).*n3"):
        open_pairs(place)[3]


def test_several_pictures_for_one_side_are_not_chosen_among(tmp_path):
    place = as_pair_folders(tmp_path / "a")
    shutil.copy(place / "p1/win.png", place / "p1/WINNER.PNG")
    with pytest.raises(RowProblem, match=r"a/p1 \(chosen\): 2 pictures could be meant: WINNER.PNG, win.png; keep one"):
        open_pairs(place)[1]
    place = as_two_folders(tmp_path / "b")
    shutil.copy(place / "l/n3.png", place / "l/n3.jpg")
    with pytest.raises(RowProblem, match=r"b/n3 \(loser\): 2 pictures could be meant: n3.jpg, n3.png; keep one"):
        open_pairs(place)[3]
    assert open_pairs(place)[4].prompt == "prompt 4"


def test_every_file_of_the_registries_is_a_reader_or_a_layout():
    for package, needed in ((readers, ("FORM", "claims", "open_rows")), (layouts, ("FORM", "REQUIRED", "probability"))):
        names = [p.stem for p in Path(package.__path__[0]).glob("[!_]*.py")]
        assert len(names) >= 2
        for name in names:
            module = sys.modules[f"{package.__name__}.{name}"]
            assert all(hasattr(module, attribute) for attribute in needed), name


# ------------------------------------------------------------------------------------------------- fingerprints of large data


def plain_fingerprint(place: Path) -> str:
    """That of a list of few pairs, with all that it is made of in memory: caches that exist carry it."""
    records = [json.loads(line) for line in place.read_text().splitlines()]
    pictures = []
    for path in sorted({record[side] for record in records for side in ("chosen", "rejected")}):
        file = place.parent / path
        name = file.relative_to(place.parent).as_posix() if file.is_relative_to(place.parent) else file.as_posix()
        found = os.path.isfile(file)  # which a name that is too long does not stop
        pictures.append([name, file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()] if found else [name])
    listed = [place.name, place.stat().st_size, hashlib.sha256(place.read_bytes()).hexdigest()]
    roles = {name: name for name in ("prompt", "chosen", "rejected")}
    parts = [[[listed], pictures], roles, "keep", len(records)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize("relative", [False, True])
def test_the_fingerprint_of_a_list_names_its_pictures_as_pathlib_does(relative, tmp_path, monkeypatch):
    (tmp_path / "here/sub").mkdir(parents=True)
    for name in ("here/a.png", "here/sub/.b.png", "there.png"):
        (tmp_path / name).write_bytes(name.encode())
    paths = [
        "a.png",
        "./a.png",
        "sub/.b.png",
        "sub//.b.png",
        "sub/./.b.png",
        "sub/../a.png",
        "../there.png",
        "~/c.png",
        "sub/",
        ".",
    ]
    paths += [str(tmp_path / "here/a.png"), str(tmp_path / "there.png"), f"/{tmp_path}/there.png", f"{tmp_path}/./there.png"]
    paths += ["missing.png", "nul\0.png", "long" * 100, "a.png/b.png", "\u00e9.png", f"{tmp_path}/here/../here/a.png"]
    place = tmp_path / "here/pairs.jsonl"
    place.write_text("".join(json.dumps({"prompt": "p", "chosen": path, "rejected": "a.png"}) + "\n" for path in paths))
    monkeypatch.chdir(tmp_path / "here")
    place = Path("pairs.jsonl") if relative else place
    assert open_pairs(place).fingerprint == plain_fingerprint(place)


def long_list(root: Path, pairs: int) -> Path:
    """Pairs of pictures that need not exist."""
    row = '{{"prompt": "prompt {0}", "chosen": "img/{0}a.png", "rejected": "img/{0}b.png"}}\n'
    (root / "pairs.jsonl").write_text("".join(row.format(i) for i in range(pairs)))
    return root / "pairs.jsonl"


def test_the_fingerprint_of_a_list_looks_at_each_picture_once_and_reads_the_list_once(tmp_path, monkeypatch):
    table, looks, lines = open_pairs(long_list(tmp_path, 50)), Counter(), []
    stat, parse = os.stat, listing._json
    monkeypatch.setattr(os, "stat", lambda path, *more, **how: looks.update([str(path)]) or stat(path, *more, **how))
    monkeypatch.setattr(listing, "_json", lambda line: lines.append(line) or parse(line))
    assert len(table.fingerprint) == 64 and len(lines) == 50
    assert [looks[str(tmp_path / f"img/{i}{side}.png")] for i in range(50) for side in "ab"] == [1] * 100


def peak(work: Callable[[], Any]) -> int:
    """Bytes of Python's objects at once while it works."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_fingerprint_of_a_list_holds_the_names_of_its_pictures_and_little_more(tmp_path):
    pairs = 3000
    table = open_pairs(long_list(tmp_path, pairs))
    assert peak(lambda: table.fingerprint) < 400 * pairs + 2**18


def test_labels_are_read_a_part_at_a_time(tmp_path):
    n = 100_000
    pictures = {"jpg_0": pa.array([b"0"] * n), "jpg_1": pa.array([b"1"] * n), "caption": pa.array(["p"] * n)}
    pq.write_table(pa.table({**pictures, "label_0": np.arange(n) % 3 / 2}), tmp_path / "p.parquet", row_group_size=1000)
    open_pairs(tmp_path / "p.parquet")
    assert peak(lambda: open_pairs(tmp_path / "p.parquet", ties="drop")) < 30 * n


@pytest.mark.parametrize("hashed", [1000, 2**20], ids=["large", "small"])
@pytest.mark.parametrize("write", [*FORMS, as_pictures], ids=lambda f: f.__name__)
def test_data_are_the_same_when_copied_or_touched(write, hashed, tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "HASHED_BYTES", hashed)
    (tmp_path / "first").mkdir()
    place = write(tmp_path / "first")
    before = open_pairs(place).fingerprint
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    for file in tmp_path.rglob("*.*"):
        os.utime(file, (1, 1))
    assert open_pairs(place).fingerprint == before
    assert open_pairs(tmp_path / "copy" / place.relative_to(tmp_path / "first")).fingerprint == before


@pytest.mark.parametrize("write", [as_jsonl, as_two_folders, as_pictures], ids=lambda f: f.__name__)
def test_a_picture_of_the_same_size_is_noticed_where_all_are_few(write, tmp_path):
    place = write(tmp_path)
    before = open_pairs(place).fingerprint
    last = max(tmp_path.rglob("*.png"))
    last.write_bytes(last.read_bytes()[::-1])
    assert open_pairs(place).fingerprint != before


@pytest.mark.parametrize("write", [as_pair_folders, as_two_folders, as_pictures], ids=lambda f: f.__name__)
def test_what_no_row_is_read_from_makes_no_other_data(write, tmp_path):
    place = write(tmp_path)
    before = open_pairs(place).fingerprint
    for folder in (place, *(p for p in place.iterdir() if p.is_dir())):
        for name in ("Thumbs.db", ".DS_Store", "notes.md"):
            (folder / name).write_text("not data")
    assert open_pairs(place).fingerprint == before


def as_parquet_of_paths(table: pa.Table, root: Path) -> Path:
    pq.write_table(table, root / "pairs.parquet", row_group_size=4)
    return root / "pairs.parquet"


def as_arrow_of_paths(table: pa.Table, root: Path) -> Path:
    as_arrow(table, root / "pairs.arrow")
    return root / "pairs.arrow"


def as_saved_paths(table: pa.Table, root: Path) -> Path:
    datasets.Dataset(table).save_to_disk(root)
    return root


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize("write", [as_parquet_of_paths, as_arrow_of_paths, as_saved_paths], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", [pa.string(), pa.dictionary(pa.int32(), pa.string()), IMAGE], ids=str)
def test_a_picture_that_a_table_names_by_its_path_is_noticed(write, kind, tmp_path):
    write_pictures(tmp_path, [(f"{i}a.png", f"{i}b.png") for i in range(N)])
    cells = [f"{i}a.png" if kind != IMAGE else {"bytes": None, "path": f"{i}a.png"} for i in range(N)]
    rejected = [{"bytes": png(i), "path": "nowhere.png"} if i % 2 else {"bytes": None, "path": f"{i}b.png"} for i in range(N)]
    table = pa.table({"prompt": ["p"] * N, "chosen": pa.array(cells, kind), "rejected": pa.array(rejected, IMAGE)})
    place, found = write(table, tmp_path), []
    for changed in ("", "5a.png", "4b.png"):
        if changed:
            (tmp_path / changed).write_bytes(png(99 + len(found)))
        found.append(open_pairs(place).fingerprint)
    assert len(set(found)) == 3


def test_bytes_in_a_table_are_its_own_and_not_looked_for_beside_it(tmp_path):
    pictures = pa.array([{"bytes": png(i), "path": "beside.png"} for i in range(N)], IMAGE)
    for write in (as_parquet_of_paths, as_arrow_of_paths):
        place, found = write(pa.table({"prompt": ["p"] * N, "chosen": pictures, "rejected": pictures}), tmp_path), []
        for seed in range(2):
            (tmp_path / "beside.png").write_bytes(png(seed))
            found.append(open_pairs(place).fingerprint)
        assert found[0] == found[1]


def test_a_picture_of_a_list_that_lies_at_home_is_noticed(tmp_path, monkeypatch):
    place, found = as_jsonl(tmp_path), []
    place.write_text(json.dumps({"prompt": "p", "chosen": "~/img/0a.png", "rejected": "img/0b.png"}))
    for home in (tmp_path, tmp_path, tmp_path / "moved"):
        shutil.copytree(tmp_path / "img", tmp_path / "moved/img", dirs_exist_ok=True)
        monkeypatch.setenv("HOME", str(home))
        found.append(open_pairs(place).fingerprint)
        (tmp_path / "img/0a.png").write_bytes(png(99))
    assert found[0] != found[1] == found[2]


@pytest.mark.parametrize("write", [as_pair_folders, as_two_folders, as_pictures], ids=lambda f: f.__name__)
def test_a_caption_of_the_same_size_is_noticed_beside_however_many_pictures(write, tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "HASHED_BYTES", 1)
    place = write(tmp_path)
    before = open_pairs(place).fingerprint
    last = max(tmp_path.rglob("*.txt"))
    last.write_text(last.read_text().replace("prompt", "promtp"))
    assert open_pairs(place).fingerprint != before


def numbered(root: Path, sizes: list[int]) -> list[tuple[str, str]]:
    """Files of these sizes, as ``identities`` takes them."""
    for number, size in enumerate(sizes):
        (root / f"{number:02d}.png").write_bytes(bytes([number]) * size)
    return [(str(root / f"{number:02d}.png"), f"{number:02d}.png") for number in range(len(sizes))]


def test_of_many_pictures_the_first_are_read_whole_and_every_so_many_th_in_samples(tmp_path, monkeypatch):
    """100 bytes are the first two of 40 and no third; from there on every fourth is looked into, whole if it is small."""
    monkeypatch.setattr(_files, "HASHED_BYTES", 100)
    monkeypatch.setattr(_files, "ONE_IN", 4)
    monkeypatch.setattr(_files, "BLOCK", 8)
    places, opened, plain = numbered(tmp_path, [40, 40, 40, 5, 5, 5, 0, 0, 0, 0, 5]), [], Path.open
    monkeypatch.setattr(Path, "open", lambda path, *how, **more: opened.append(path.name) or plain(path, *how, **more))
    found = list(_files.identities(places))
    assert [len(one) for one in found] == [3, 3, 3, 2, 2, 2, 3, 2, 2, 2, 3]
    assert opened == ["00.png", "01.png", "02.png", "06.png", "10.png"]
    assert [one[:2] for one in found] == [[name, os.stat(path).st_size] for path, name in places]
    assert found[1][2] == hashlib.sha256(bytes([1]) * 40).hexdigest()

    def noticed(name: str, content: bytes) -> bool:
        (tmp_path / name).write_bytes(content)
        return list(_files.identities(places)) != found

    assert not noticed("03.png", b"other")  # what the docstring says goes unnoticed
    assert not noticed("02.png", bytes([2]) * 8 + b"x" + bytes([2]) * 31)
    assert noticed("10.png", b"other")
    assert not noticed("10.png", bytes([10]) * 5)
    assert noticed("02.png", bytes([2]) * 39 + b"x")
    assert not noticed("02.png", bytes([2]) * 40)
    assert noticed("03.png", b"longer")


def test_what_cannot_be_read_when_it_is_to_be_is_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "HASHED_BYTES", 100)
    places = numbered(tmp_path, [40, 40, 40, 40])
    (tmp_path / "a.folder").mkdir()
    os.mkfifo(tmp_path / "a.pipe")  # reading it would never end
    places += [(str(tmp_path / name), name) for name in ("a.folder", "a.pipe", "nowhere", "nul\0")]
    plain, gone = Path.open, {"01.png", "02.png"}

    def vanished(path: Path, *how: str) -> Any:
        if path.name in gone:
            raise FileNotFoundError(path)
        return plain(path, *how)

    monkeypatch.setattr(Path, "open", vanished)
    found = list(_files.identities(places))
    assert [len(one) for one in found] == [3, 1, 1, 2, 1, 1, 1, 1]
    assert found[1] == ["01.png"]


def as_arrow(table: pa.Table, place: Path) -> None:
    with pa.OSFile(str(place), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def as_plain_parquet(table: pa.Table, place: Path) -> None:
    pq.write_table(table, place, compression="none", use_dictionary=False)


def altered(table: pa.Table, column: str) -> pa.Table:
    """As many bytes: two cells change places; of pictures, each becomes another."""
    cells = table[column].to_pylist()
    if column.startswith("jpg"):
        cells = [b"x" * len(cell) for cell in cells]
    else:
        cells[1], cells[4] = cells[4], cells[1]
    field = table.schema.field(column)
    return table.set_column(table.column_names.index(column), field, pa.array(cells, field.type))


@pytest.mark.parametrize(("write", "suffix"), [(as_plain_parquet, "parquet"), (as_arrow, "arrow")], ids=["parquet", "arrow"])
@pytest.mark.parametrize("column", ["caption", "label_0", "weight", "jpg_0", "jpg_1"])
def test_another_value_in_a_large_file_is_noticed_though_its_size_stays(write, suffix, column, tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "HASHED_BYTES", 1000)
    monkeypatch.setattr(_files, "BLOCK", 1000 if column.startswith("jpg") else 8, raising=False)
    table, place, found = pick_a_pic([1.0, 0.0, 0.0, 1.0, 1.0, 0.0], weight=[1.0, 2, 3, 4, 5, 6]), tmp_path / f"p.{suffix}", []
    for version in (table, altered(table, column)):
        write(version, place)
        os.utime(place, (1, 1))
        found.append((open_pairs(place).fingerprint, place.stat().st_size))
    assert found[0][1] == found[1][1] and found[0][0] != found[1][0]


def test_a_large_list_is_the_same_when_touched_and_another_when_one_letter_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "HASHED_BYTES", 100)
    place = as_jsonl(tmp_path)
    before = open_pairs(place).fingerprint
    os.utime(place, (1, 1))
    assert open_pairs(place).fingerprint == before
    place.write_text(place.read_text().replace("prompt 3", "prompt 8"))
    os.utime(place, (1, 1))
    assert open_pairs(place).fingerprint != before


# ------------------------------------------------------------------------------------------------------------------ pictures


def test_exif_orientation_transparency_and_sixteen_bits_are_dealt_with():
    image, exif = Image.new("RGB", (8, 4), "red"), Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    image.save(stream, "JPEG", exif=exif)
    source = ImageSource(data=stream.getvalue())
    assert source.open().size == source.size() == (4, 8)
    stream = io.BytesIO()
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(stream, "PNG")
    assert ImageSource(data=stream.getvalue()).open().getpixel((0, 0)) == (255, 255, 255)
    stream = io.BytesIO()
    Image.fromarray(np.full((2, 2), 0x8000, dtype=np.uint16)).save(stream, "PNG")
    assert ImageSource(data=stream.getvalue()).open().getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_size_is_that_of_the_picture_as_it_is_shown(form, orientation):
    if form in ("WEBP", "AVIF") and not features.check(form.lower()):
        pytest.skip(f"this Pillow has no {form}")
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    how = {"tiffinfo": {274: orientation}} if form == "TIFF" else {"exif": exif}
    Image.new("RGB", (32, 16), "red").save(stream, form, **how)
    source = ImageSource(data=stream.getvalue())
    assert source.size() == source.open().size == ((16, 32) if orientation in SIDEWAYS else (32, 16))


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"not a picture", lambda b: b[:16]])
def test_damaged_pictures_raise(damage):
    with pytest.raises(UnreadableImage):
        ImageSource(data=damage(png(0, (64, 64)))).open()


# ---------------------------------------------------------------------------------------------------------------- validation


def flawed(tmp_path: Path) -> Path:
    """Eight rows: 0 good, 1 repeats 0, 2 contradicts 0, 3 tie, 4 truncated, 5 same picture twice, 6 no caption, 7 label 7."""
    cells = [
        ("a", png(0), png(1), 1.0),
        ("a", png(0), png(1), 1.0),
        ("a", png(0), png(1), 0.0),
        ("b", png(2), png(3), 0.5),
        ("c", png(4), png(5)[:200], 1.0),
        ("d", png(6), png(6), 1.0),
        ("", png(7, (32, 16)), png(8), 1.0),
        ("e", png(9), png(10), 7.0),
    ]
    columns = dict(zip(("caption", "jpg_0", "jpg_1", "label_0"), map(list, zip(*cells, strict=True)), strict=True))
    pq.write_table(pa.table(columns), tmp_path / "flawed.parquet")
    return tmp_path / "flawed.parquet"


def test_the_report_finds_every_planted_flaw(tmp_path):
    told = []
    report = check(open_pairs(flawed(tmp_path)), progress=lambda *args: told.append(args), workers=2)
    place = "flawed.parquet:row {}".format
    assert (report.pairs, report.usable, report.ties, report.unique_prompts) == (8, 6, 1, 5)
    assert report.duplicate_pairs == ((place(1), place(0)),)
    assert report.contradictions == ((place(2), place(0)),)
    assert [(p.origin, p.side) for p in report.unreadable] == [(place(4), "loser")]
    assert [(p.origin, p.reason) for p in report.bad_rows] == [(place(7), "label_0 is 7; it must be in [0, 1]")]
    assert report.identical_sides == (place(5),) and report.empty_captions == (place(6),)
    assert report.sizes == {"24 x 20": 12, "32 x 16": 1} and report.smallest_side == 16
    assert report.labels == {"0.5": 1, "1": 6} and report.unique_images == 8 and report.repeated_images == 3
    assert told[-1] == ("reading", 8, 8)
    text = report.to_text()
    assert all(place(i) in text for i in (1, 2, 4, 5, 6, 7)) and "8 (6 usable)" in text
    assert json.loads(json.dumps(report.to_dict()))["unusable"] == 2


def test_what_the_report_counts_does_not_depend_on_the_order_of_rows(tmp_path):
    cells = [(png(0), png(1), 0.5), (png(0), png(1), 1.0), (png(0), png(1), 0.0), (png(1), png(0), 0.0)]
    for order in permutations(cells):
        columns = dict(zip(("jpg_0", "jpg_1", "label_0"), map(list, zip(*order, strict=True)), strict=True))
        pq.write_table(pa.table({"caption": ["a"] * 4, **columns}), tmp_path / "p.parquet")
        report = check(open_pairs(tmp_path / "p.parquet"))
        assert (len(report.duplicate_pairs), len(report.contradictions)) == (2, 1)
        (later, first), said = report.contradictions[0], [a == png(0) if p else a != png(0) for a, _, p in order]
        rows = [int(place.rpartition(" ")[2]) for place in (later, first)]
        assert 0.5 not in [order[row][2] for row in rows] and said[rows[0]] != said[rows[1]]


def test_pictures_too_small_or_too_long_to_learn_from_are_counted_and_named(tmp_path):
    sizes = [(64, 64), (256, 64), (257, 64), (2000, 3), (1, 1), (63, 100)]
    pictures = [png(i, size) for i, size in enumerate(sizes)]
    pq.write_table(
        pa.table({"prompt": list("abc"), "chosen": pictures[::2], "rejected": pictures[1::2]}), tmp_path / "sizes.parquet"
    )
    report, place = check(open_pairs(tmp_path / "sizes.parquet")), "sizes.parquet:row {}".format
    assert [(p.origin, p.side, p.reason) for p in report.small] == [
        (place(1), "loser", "2000 x 3"),
        (place(2), "winner", "1 x 1"),
        (place(2), "loser", "63 x 100"),
    ]
    assert [(p.origin, p.side) for p in report.long] == [(place(1), "winner"), (place(1), "loser")]
    text = report.to_text()
    assert "No problems found." not in text and "Pictures with a side below 64 pixels (3):" in text
    assert f"Pictures with proportions beyond 4:1 (2):\n  {place(1)} (winner): 257 x 64\n" in text
    assert report.usable == 3 and len(report.to_dict()["small"]) == 3


def test_the_contact_sheet_marks_preferred_tied_and_skips_the_unreadable(tmp_path):
    table = open_pairs(flawed(tmp_path))
    sheet = contact_sheet(table, n=20)
    colours = {colour for _, colour in sheet.getcolors(2**24)}
    assert {(46, 139, 87), (217, 154, 43)} <= colours
    assert contact_sheet(table, n=2).width < sheet.width
    assert contact_sheet(table, n=3, seed=1).tobytes() == contact_sheet(table, n=3, seed=1).tobytes()
    with pytest.raises(UserError, match="n=0"):
        contact_sheet(table, n=0)


def run_check(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(["check", *arguments]))


def test_the_command_reports_and_its_status_follows_the_limit(tmp_path, capsys):
    place, sheet, report = str(flawed(tmp_path)), tmp_path / "out/sheet.png", tmp_path / "out/report.json"
    assert run_check(place, "--sheet", str(sheet), "--json", str(report)) == 1
    assert "2 of 8 pairs (25.00%) cannot be used" in capsys.readouterr().out
    assert json.loads(report.read_text())["pairs"] == 8 and Image.open(sheet).width > 300
    assert run_check(place, "--max-unreadable", "0.3", "--ties", "drop", "--columns", "caption=caption") == 0
    assert "1 ties" in capsys.readouterr().out
    roles = ("caption=caption", "jpg_0=jpg_0", "jpg_1=jpg_1")
    assert command.parse_columns(list(roles)) == command.parse_columns([",".join(roles)]) == dict(r.split("=") for r in roles)
    with pytest.raises(UserError, match="ROLE=NAME"):
        run_check(place, "--columns", "caption")
    with pytest.raises(UserError, match="from 1; got 0"):
        run_check(place, "--sheet", str(sheet), "--pairs", "0")


def test_drawn_scenes_make_a_data_set_that_passes(tmp_path, capsys):
    stream, cells = scenes.stream(0), []
    for _ in range(4):
        (first, caption), (second, _) = next(stream), next(stream)
        files = [io.BytesIO(), io.BytesIO()]
        scenes.render(first).save(files[0], "JPEG")
        scenes.render(second).save(files[1], "JPEG")
        cells.append({"prompt": caption, "chosen": files[0].getvalue(), "rejected": files[1].getvalue()})
    pq.write_table(pa.Table.from_pylist(cells), tmp_path / "scenes.parquet")
    assert run_check(str(tmp_path / "scenes.parquet")) == 0
    out = capsys.readouterr().out
    assert "64 x 64: 8" in out and "No problems found." in out


def test_files_are_in_one_order_on_every_system() -> None:
    """Windows' own order does not know capitals, and rows, seeds and fingerprints would be others there."""
    names = ["A.png", "b.png", "C.png", "a/b.png", "a-b.png"]
    ours, theirs = (sorted(map(kind, names), key=_files.in_order) for kind in (PurePosixPath, PureWindowsPath))
    assert (
        [path.as_posix() for path in theirs]
        == [str(path) for path in ours]
        == [str(p) for p in sorted(map(PurePosixPath, names))]
    )
