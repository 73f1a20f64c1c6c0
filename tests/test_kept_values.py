"""Values of rows that are made once: by whom, what is kept, and what a torn or missing file costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from threads import Process, in_threads

from diffalign.data.kept_values import kept_values
from diffalign.processes import OneProcess

ROWS = 11


class Maker:
    """Two numbers for each row, and which rows were asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, rows: range) -> np.ndarray:
        self.asked += rows
        return np.array([[row, -row] for row in rows], dtype=np.float32)


EXPECTED = Maker()(range(ROWS))


@pytest.mark.parametrize("world", [1, 2, 5])
def test_each_row_is_made_by_one_process_and_only_once(world: int, tmp_path: Path) -> None:
    make = Maker()

    def values(process: Process) -> np.ndarray:
        return kept_values(make, ROWS, tmp_path / "kept", processes=process, at_once=3)

    for _ in range(2):
        for found in in_threads(world, values):
            np.testing.assert_array_equal(found, EXPECTED)
        assert sorted(make.asked) == list(range(ROWS))


def test_a_torn_file_and_one_of_other_rows_are_made_anew(tmp_path: Path) -> None:
    make, how = Maker(), {"processes": OneProcess(), "at_once": 3}
    kept_values(make, ROWS, tmp_path, **how)
    (tmp_path / "00001.npy").write_bytes((tmp_path / "00001.npy").read_bytes()[:70])
    np.save(tmp_path / "00003.npy", EXPECTED[:1])
    make.asked.clear()
    np.testing.assert_array_equal(kept_values(make, ROWS, tmp_path, **how), EXPECTED)
    assert make.asked == [3, 4, 5, 9, 10]


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    make = Maker()
    for times in (1, 2):
        found = kept_values(make, ROWS, tmp_path / "file" / "kept", processes=OneProcess(), at_once=4)
        np.testing.assert_array_equal(found, EXPECTED)
        assert len(make.asked) == times * ROWS
