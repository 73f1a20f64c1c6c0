"""The training curves as a picture, from ``metrics.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from diffalign.metrics_file import read_rows

LOG_2 = math.log(2)
"""Value of a logistic loss at the start of training."""


HELD_OUT: list[tuple[dict[str, str], str]] = [
    ({"accuracy": "accuracy"}, "implicit accuracy (validation)"),
    ({"winner_drift": "winner", "loser_drift": "loser"}, "error minus the reference's (validation)"),
    ({"winner_ratio": "winner", "loser_ratio": "loser"}, "log-ratio to the reference (validation)"),
    ({"winner_log_p": "winner"}, "log p of a token (validation)"),
]
"""Panels of held-out pairs: what is drawn in each, by column of the metrics."""


def read_metrics(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of ``metrics.jsonl`` by kind (``train``, ``validation``), in order of steps, without a torn last one.

    Raises:
        UserError: another line is broken.
    """
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
    for row in read_rows(path):
        rows[row["kind"]].append(row)
    return rows


def draw_curves(metrics: Path, picture: Path) -> Path | None:
    """Loss and whatever else was measured, as one PNG; None if nothing was logged.

    With held-out pairs: accuracy, drifts and accuracy by timestep. Of on-line objectives: the reward, and how much was clipped.
    """
    from matplotlib.figure import Figure

    rows = read_metrics(metrics)
    if not rows["train"]:
        return None
    drawings = [_loss, *_others(rows)]
    figure = Figure(figsize=(3.75 * len(drawings), 3.2), layout="constrained")
    for panel, draw in zip(figure.subplots(1, len(drawings), squeeze=False)[0], drawings, strict=True):
        draw(panel, rows)
    figure.savefig(picture, dpi=110)
    return picture


def _others(rows: dict[str, list[dict[str, Any]]]) -> list[Callable[[Any, dict], None]]:
    """The panels after the loss that there are numbers for."""
    found: list[Callable[[Any, dict], None]] = []
    if rows["validation"]:
        measured = rows["validation"][-1]
        panels = [(columns, title) for columns, title in HELD_OUT if columns.keys() <= measured.keys()]
        found += [partial(_validation, columns=columns, title=title) for columns, title in panels]
        found += [_by_timestep] if any("accuracy" in b for b in measured.get("bins", [])) else []
    for name, title in (("reward", "reward of what is sampled"), ("clipped", "share of ratios outside the clip")):
        if all(name in row for row in rows["train"]):
            found.append(partial(_training, column=name, title=title))
    return found


def _training(panel: Any, rows: dict[str, list[dict[str, Any]]], column: str, title: str) -> None:
    steps, values = [r["step"] for r in rows["train"]], [r[column] for r in rows["train"]]
    drawn = [math.nan if value is None else value for value in values]
    panel.plot(steps, drawn, color="0.8", linewidth=0.8)
    panel.plot(steps, _smooth(values))
    panel.set(title=title, xlabel="optimizer step")
    if not any(values):
        panel.set_ylim(0, 1)  # a flat zero, not a magnified one


def _loss(panel: Any, rows: dict[str, list[dict[str, Any]]]) -> None:
    steps, losses = [r["step"] for r in rows["train"]], [r["loss"] for r in rows["train"]]
    panel.plot(steps, losses, color="0.8", linewidth=0.8)
    panel.plot(steps, _smooth(losses), label="training, smoothed")
    if rows["validation"]:
        panel.plot([r["step"] for r in rows["validation"]], [r["loss"] for r in rows["validation"]], "o-", label="validation")
    logistic = abs(losses[0] - LOG_2) < 0.01
    if logistic:
        panel.axhline(LOG_2, color="0.5", linestyle=":", linewidth=0.8)
    panel.set(title="loss (dotted: ln 2)" if logistic else "loss", xlabel="optimizer step")
    panel.legend(frameon=False)


def _smooth(values: list[float | None]) -> list[float]:
    """A running mean that passes over what was not finite (None in the file); NaN before the first number."""
    out, average = [], math.nan
    for value in values:
        if value is not None:
            average = value if math.isnan(average) else 0.9 * average + 0.1 * value
        out.append(average)
    return out


def _validation(panel: Any, rows: dict[str, list[dict[str, Any]]], columns: dict[str, str], title: str) -> None:
    for column, label in columns.items():
        panel.plot([r["step"] for r in rows["validation"]], [r[column] for r in rows["validation"]], "o-", label=label)
    panel.set(title=title, xlabel="optimizer step")
    if len(columns) > 1:
        panel.axhline(0, color="0.5", linestyle=":", linewidth=0.8)
        panel.legend(frameon=False)


def _by_timestep(panel: Any, rows: dict[str, list[dict[str, Any]]]) -> None:
    bins = rows["validation"][-1]["bins"] if rows["validation"] else []
    for b in bins:
        panel.bar((b["t_from"] + b["t_to"]) / 2, b["accuracy"], width=0.9 * (b["t_to"] - b["t_from"]), color="tab:blue")
    panel.axhline(0.5, color="0.5", linestyle=":", linewidth=0.8)
    panel.set(title="accuracy by timestep (last validation)", xlabel="t", ylim=(0, 1))
