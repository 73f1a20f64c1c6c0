"""Pairs as they are stored, for those who write the data again: every cell, the pictures in their order, the columns' types."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.data.open import open_pairs
from diffalign.data.pairs import RowProblem


def pick_a_pic(path: Path, *labels: float | None, **more: list) -> Path:
    """A row for each label, with the pictures ``first i`` and ``second i``."""
    n = len(labels)
    columns = {
        "jpg_0": [b"first %d" % i for i in range(n)],
        "jpg_1": [b"second %d" % i for i in range(n)],
        "label_0": [0.0 if label is None else label for label in labels],
        "has_label": [label is not None for label in labels],
        "caption": [f"prompt {i}" for i in range(n)],
    }
    pq.write_table(pa.table(columns | more), path)
    return path


def test_rows_that_are_left_out_do_not_shift_the_others(tmp_path: Path) -> None:
    table = open_pairs(pick_a_pic(tmp_path / "a.parquet", 0.5, None, 0.0, 1.0, note=list("abcd")), ties="drop")
    found = [table.stored(i) for i in range(len(table))]
    assert [(s.cells["note"], s.probability, s.pair.prompt) for s in found] == [("c", 0.0, "prompt 2"), ("d", 1.0, "prompt 3")]
    assert [[image.data for image in s.images] for s in found] == [[b"first 2", b"second 2"], [b"first 3", b"second 3"]]
    assert [s.pair for s in found] == list(table)
    assert set(found[0].cells) == set(table.rows.columns) and table.stored(-1) == found[-1]
    with pytest.raises(IndexError):
        table.stored(2)


def test_a_row_that_cannot_be_used_has_no_stored_pair_either(tmp_path: Path) -> None:
    table = open_pairs(pick_a_pic(tmp_path / "a.parquet", 1.0, 7.0))
    with pytest.raises(RowProblem, match=r"a\.parquet:row 1: label_0 is 7"):
        table.stored(1)


def test_columns_by_what_they_are_for(tmp_path: Path) -> None:
    one = open_pairs(pick_a_pic(tmp_path / "a.parquet", 1.0))
    assert (one.image_columns, one.sides, one.label_columns) == (("jpg_0", "jpg_1"), ("0", "1"), ("label_0",))
    two = open_pairs(pick_a_pic(tmp_path / "b.parquet", 1.0, label_1=[0.0]))
    assert two.label_columns == ("label_0", "label_1")
    (tmp_path / "list.jsonl").write_text(json.dumps({"words": "x", "good": "a.png", "bad": "b.png", "sure": 1.0}))
    by_name = {"prompt": "words", "chosen": "good", "rejected": "bad"}
    other = open_pairs(tmp_path / "list.jsonl", columns=by_name)
    assert (other.image_columns, other.sides) == (("good", "bad"), ("chosen", "rejected"))
    assert other.label_columns == ("label",)  # where it would be
    assert open_pairs(tmp_path / "list.jsonl", columns=by_name | {"label": "sure"}).label_columns == ("sure",)


def test_storage_that_knows_its_types_states_them(tmp_path: Path) -> None:
    """Of several shards, the types that hold all."""
    (tmp_path / "shards").mkdir()
    pick_a_pic(tmp_path / "shards" / "train-0.parquet", 1.0, rank=pa.array([1], pa.int8()))
    pick_a_pic(tmp_path / "shards" / "train-1.parquet", 1.0, rank=pa.array([1], pa.int32()))
    assert open_pairs(tmp_path / "shards").rows.schema().field("rank").type == pa.int32()
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "chosen": datasets.Value("string"), "rejected": datasets.Value("string")}
        | {"rank": datasets.Value("int16")}
    )
    data = {"prompt": ["a"], "chosen": ["a.png"], "rejected": ["b.png"], "rank": [3]}
    datasets.Dataset.from_dict(data, features=features).save_to_disk(tmp_path / "saved")
    for place in (tmp_path / "saved", next((tmp_path / "saved").glob("*.arrow"))):
        assert open_pairs(place).rows.schema().field("rank").type == pa.int16()


def test_storage_without_types_says_so(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("prompt,chosen,rejected\nx,a.png,b.png\n")
    names = {"folders": ("0/win.png", "0/lose.png", "0/prompt.txt"), "sides": ("w/0.png", "l/0.png", "0.txt")}
    for root, files in names.items():
        for file in files:
            (tmp_path / root / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / root / file).write_bytes(b"x")
    assert [open_pairs(tmp_path / place).rows.schema() for place in ("list.csv", *names)] == [None] * 3
