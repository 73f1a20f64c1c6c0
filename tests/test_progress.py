"""The progress bar says where the work is, once per stage, and stays silent when asked to."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from pipelines.progress import Bar, TrainingBar


def test_nothing_shows_before_work_begins_and_each_stage_has_a_line(capsys: pytest.CaptureFixture) -> None:
    with Bar(unit="picture"):
        pass
    assert capsys.readouterr().err == ""
    with Bar(unit="picture") as bar:
        for stage in ("base", "tuned"):
            for done in (1, 2, 4):
                bar.advance(stage, done, 4)
    said = capsys.readouterr().err
    assert "base: 100%" in said and "tuned: 100%" in said and "4/4" in said


def test_a_resumed_run_begins_where_it_was(capsys: pytest.CaptureFixture) -> None:
    with TrainingBar(unit="step") as bar:
        bar.start(6, 10)
        for step in range(7, 11):
            bar.update(step, {"loss": 0.5, "accuracy": 0.75}, steps=10)
        assert bar._bar.initial == 6 and bar._bar.n == 10
    assert "10/10" in (said := capsys.readouterr().err) and "loss=0.5000" in said


def test_a_notebook_is_looked_at_as_a_terminal_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stderr says that it is no terminal; a log file's does, too, and there every refresh would be a line."""
    for shell, seconds in ((None, 15.0), (object(), 0.1)):
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda shell=shell: shell))
        with TrainingBar() as bar:
            bar.start(0, 2)
            assert bar._bar.mininterval == seconds


def test_a_counter_adds_up_and_silence_is_silence(capsys: pytest.CaptureFixture) -> None:
    with Bar(shown=False) as bar:
        more = bar.counter("sampling", 5)
        more(2)
        more(3)
    assert capsys.readouterr().err == ""
    with Bar() as bar:
        more = bar.counter("sampling", 5)
        more(2)
        more(3)
    assert "5/5" in capsys.readouterr().err
