"""The training curves: a panel for everything that was measured, and none for what was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffalign.errors import UserError
from pipelines.curves import draw_curves, read_metrics

TRAIN = {"kind": "train", "loss": 0.6931}
BINS = [{"t_from": 100 * i, "t_to": 100 * i + 100, "accuracy": 0.5 + 0.03 * i} for i in range(10)]
HELD_OUT = {"kind": "validation", "loss": 0.69, "accuracy": 0.6}
DRIFTS = {"winner_drift": 0.001, "loser_drift": 0.002}


def drawn(tmp_path: Path, *rows: dict[str, Any]) -> Path | None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({**row, "step": step}) + "\n" for step, row in enumerate(rows)))
    return draw_curves(metrics, tmp_path / "curves.png")


@pytest.mark.parametrize(
    ("rows", "panels"),
    [
        ([TRAIN], 1),
        ([HELD_OUT | DRIFTS | {"bins": BINS}, TRAIN, TRAIN], 4),
        ([HELD_OUT | {"winner_ratio": 0.1, "loser_ratio": -0.1}, TRAIN], 3),
        ([{"kind": "validation", "loss": 0.69, "winner_log_p": -1.2}, TRAIN], 2),
        ([TRAIN | {"reward": 0.3, "clipped": 0.0}, TRAIN | {"reward": 0.4, "clipped": 0.0}], 3),
        ([TRAIN | {"reward": None}, TRAIN | {"reward": 0.4}, TRAIN | {"reward": None}], 2),
        ([TRAIN | {"reward": 0.3}, TRAIN], 1),
        ([{"kind": "validation", "loss": 0.69, "of_my_own": 1.0, "bins": [{"t_from": 0, "t_to": 100}]}, TRAIN], 1),
    ],
    ids=[
        "loss alone",
        "pairs",
        "ratios",
        "tokens",
        "on-line",
        "a reward that was infinite",
        "a reward now and then",
        "an objective of somebody's own",
    ],
)
def test_there_is_a_panel_for_what_was_measured(rows: list[dict], panels: int, tmp_path: Path) -> None:
    picture = Image.open(drawn(tmp_path, *rows))
    assert picture.size == (int(3.75 * panels * 110), int(3.2 * 110))
    assert len(np.unique(picture.convert("L"))) > 20


def test_a_run_that_logged_nothing_has_no_picture(tmp_path: Path) -> None:
    assert drawn(tmp_path, HELD_OUT) is None and not (tmp_path / "curves.png").exists()


def test_a_torn_last_line_is_not_drawn_and_another_broken_one_is_named(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    whole = json.dumps(TRAIN | {"step": 1}) + "\n"
    metrics.write_text(whole + '{"kind": "tr')
    assert read_metrics(metrics) == {"train": [TRAIN | {"step": 1}], "validation": []}
    assert draw_curves(metrics, tmp_path / "curves.png").is_file()
    metrics.write_text('{"kind": "tr\n' + whole)
    with pytest.raises(UserError, match=r"Line 1 of .*metrics\.jsonl is broken"):
        draw_curves(metrics, tmp_path / "curves.png")
