"""The training curves as a picture, from ``metrics.jsonl``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of ``metrics.jsonl`` by kind (``train``, ``validation``), in order of steps."""
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        rows[row["kind"]].append(row)
    return rows


def draw_curves(metrics: Path, picture: Path) -> Path | None:
    """Loss, accuracy, drifts and accuracy by timestep as one PNG; None if nothing was logged."""
    from matplotlib.figure import Figure

    rows = read_metrics(metrics)
    if not rows["train"]:
        return None
    figure = Figure(figsize=(15, 3.2), layout="constrained")
    panels = figure.subplots(1, 4)
    _loss(panels[0], rows)
    _validation(panels[1], rows, {"accuracy": "accuracy"}, "implicit accuracy (validation)")
    _validation(panels[2], rows, {"winner_drift": "winner", "loser_drift": "loser"}, "error minus the reference's (validation)")
    _by_timestep(panels[3], rows)
    figure.savefig(picture, dpi=110)
    return picture


def _loss(panel: Any, rows: dict[str, list[dict[str, Any]]]) -> None:
    steps, losses = [r["step"] for r in rows["train"]], [r["loss"] for r in rows["train"]]
    panel.plot(steps, losses, color="0.8", linewidth=0.8)
    panel.plot(steps, _smooth(losses), label="training, smoothed")
    if rows["validation"]:
        panel.plot([r["step"] for r in rows["validation"]], [r["loss"] for r in rows["validation"]], "o-", label="validation")
    panel.axhline(0.6931, color="0.5", linestyle=":", linewidth=0.8)
    panel.set(title="loss (dotted: ln 2)", xlabel="optimizer step")
    panel.legend(frameon=False)


def _smooth(values: list[float], keep: float = 0.9) -> list[float]:
    out, average = [], values[0]
    for value in values:
        average = keep * average + (1 - keep) * value
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
