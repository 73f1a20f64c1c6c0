"""A comparison of writers in words: Markdown of the lines that ``evaluation`` found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.semantics import Embedding
from pipelines.text_tables import interval, table_lines
from pipelines.writers.drift import Drift

if TYPE_CHECKING:
    from pipelines.writers.evaluation import Found, Line

SHOWN = 12
"""Prompts whose rewrites are printed, and whose pictures are in the picture."""


def report(lines: Sequence[Line], values: Mapping[str, Any], found: Sequence[Found], embedding: Embedding) -> str:
    """Markdown: scores, drift, the bound, and some rewrites to read.

    Args:
        values: what ``evaluation.json`` holds.
    """
    parts = [
        f"# Prompt writers on {values['prompts']} held-out prompts",
        "Scores are for the prompt that was typed. In brackets: 95 % interval over prompts; wins are against the plain prompt.",
        *(f"Note: {note}" for note in values["notes"]),
        *_left_out(values["left out"]),
        _score_table(lines),
        *_against_each_other(lines),
        "## How far rewrites went",
        "\n".join(_distance_table(lines, values["delta"])),
        *_promises(lines, found, embedding),
        "## Pictures\n\n![Plain prompts and rewrites, from the same noise](side_by_side.png)",
        "## Rewrites",
        "\n".join(table_lines([one.name for one in found], _examples(found))),
        "## What was compared",
        "\n".join(_compared(values)),
    ]
    return "\n\n".join(parts) + "\n"


def _score_table(lines: Sequence[Line]) -> str:
    names, parts = list(lines[0].judges), list(lines[0].parts)
    head = ["", *(h for name in names for h in (name, f"{name} wins")), *parts]
    rows = []
    for line in lines:
        cells = [line.name]
        for name in names:
            cells += [_interval(line.judges[name]), _percent(line.wins[name]) if line.wins else "-"]
        rows.append([*cells, *(f"{line.parts[name]:.3f}" for name in parts)])
    return "\n".join(table_lines(head, rows))


def _against_each_other(lines: Sequence[Line]) -> list[str]:
    """Each writer against those before it; nothing where there is only one."""
    plain, *writers = lines
    matches = [(line.name, other, match) for line in writers for other, match in line.against.items() if other != plain.name]
    if not matches:
        return []
    head = ["", *(h for name in plain.judges for h in (f"{name} wins", f"{name} difference"))]
    rows = []
    for name, other, match in matches:
        cells = [(_percent(match.wins[judge]), _interval(match.differences[judge])) for judge in plain.judges]
        rows.append([f"{name} against {other}", *(cell for both in cells for cell in both)])
    return ["## Writers against each other", "On the same prompts, from the same noise.", "\n".join(table_lines(head, rows))]


def _compared(values: Mapping[str, Any]) -> list[str]:
    """The networks behind the names."""
    writers = {way["name"]: way["writer"] for way in values["ways"] if way["writer"]}
    told = {"generator": values["generator"], **writers}
    rows = [[name, network["name"] or "in memory", network["fingerprint"][:16]] for name, network in told.items()]
    return table_lines(["", "folder or id", "fingerprint"], rows)


def _interval(values: tuple[float, float, float]) -> str:
    mean, low, high = values
    return f"{mean:.4g} ({interval(low, high, '{:.4g}'.format)})"


def _percent(values: tuple[float, float, float]) -> str:
    return "{:.0f} % ({:.0f} to {:.0f})".format(*(100 * v for v in values))


def _distance_table(lines: Sequence[Line], delta: float) -> list[str]:
    far = ["mean distance", "median / 90 % / 99 %", f"beyond {delta:g}"]
    head = ["", *far, "words", "cut", "broken off", "variety", "different", "unchanged"]
    rows = [
        [
            line.name,
            f"{line.distance:.3f}",
            " / ".join(f"{q:.3f}" for q in line.distance_quantiles),
            f"{100 * line.beyond:.1f} %",
            f"{line.words:.1f}",
            str(line.cut),
            str(line.broken_off),
            f"{line.varied:.3f}",
            f"{100 * line.different:.0f} %",
            f"{100 * line.unchanged:.0f} %",
        ]
        for line in lines
    ]
    return table_lines(head, rows)


def _left_out(problems: Sequence[str], shown: int = 10) -> list[str]:
    if not problems:
        return []
    more = [f"* and {len(problems) - shown} more"] if len(problems) > shown else []
    listed = [*(f"* {problem}" for problem in problems[:shown]), *more]
    return ["\n".join([f"{len(problems)} prompts that cannot be rewritten were left out:", "", *listed])]


def _promises(lines: Sequence[Line], found: Sequence[Found], embedding: Embedding) -> list[str]:
    told = [(line, one.drift) for line, one in zip(lines, found, strict=True) if line.promised and one.drift]
    if not told:
        return []
    head = ["", "alpha", "winners' mean distance", "as weighted", "winners beyond", "as weighted", "bound", "measured"]
    rows = [
        [
            line.name,
            f"{line.promised['alpha']:g}",
            *(f"{line.promised[name]:.3f}" for name in ("mean", "tilted_mean")),
            *(f"{100 * line.promised[name]:.1f} %" for name in ("beyond", "tilted_beyond", "bound")),
            f"{100 * line.beyond:.1f} %" if _comparable(drift, embedding) else f"- (trained by distances of {drift.embedding})",
        ]
        for line, drift in told
    ]
    remark = (
        "The first columns are of the winners in the training data, plain and as Sem-DPO's weights see them; the bound is "
        "exp(-alpha delta) / Z. It is on these data, not on the writer: nothing follows for a writer that does not fit them."
    )
    return ["## What the weights promise, and what was measured", "\n".join(table_lines(head, rows)), remark]


def _comparable(drift: Drift, embedding: Embedding) -> bool:
    """Whether a writer's data were measured as its rewrites are. Of a column in the data nobody knows."""
    return not drift.fingerprint or drift.fingerprint == embedding.fingerprint


def _examples(found: Sequence[Found]) -> list[list[str]]:
    """Of the first prompts a row each: the plain one, and what it became."""
    return [list(texts) for texts in zip(*(one.texts[:SHOWN] for one in found), strict=True)]
