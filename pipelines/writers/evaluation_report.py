"""The report of an evaluation of prompt writers, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.semantics import Embedding
from pipelines.text_tables import interval, table_lines
from pipelines.writers.drift import Drift

if TYPE_CHECKING:
    from pipelines.writers.evaluation import ContenderResult, ContenderRun

SHOWN = 12
"""Number of prompts whose rewrites and pictures are shown."""


def report(
    results: Sequence[ContenderResult], values: Mapping[str, Any], runs: Sequence[ContenderRun], embedding: Embedding
) -> str:
    """The Markdown of scores, drift, its bound, and some rewrites to read.

    Args:
        values: the content of ``evaluation.json``.
    """
    parts = [
        f"# Prompt writers on {values['prompts']} held-out prompts",
        "Scores are for the prompt that was typed. In brackets: 95 % interval over prompts; wins are against the plain prompt.",
        *(f"Note: {note}" for note in values["notes"]),
        *_left_out(values["left out"]),
        _score_table(results),
        *_against_each_other(results),
        "## How far rewrites went",
        "\n".join(_distance_table(results, values["delta"])),
        *_predicted_drift(results, runs, embedding),
        "## Pictures\n\n![Plain prompts and rewrites, from the same noise](side_by_side.png)",
        "## Rewrites",
        "\n".join(table_lines([run.name for run in runs], _examples(runs))),
        "## What was compared",
        "\n".join(_compared(values)),
    ]
    return "\n\n".join(parts) + "\n"


def _score_table(results: Sequence[ContenderResult]) -> str:
    names, parts = list(results[0].judges), list(results[0].parts)
    head = ["", *(h for name in names for h in (name, f"{name} wins")), *parts]
    rows = []
    for result in results:
        cells = [result.name]
        for name in names:
            cells += [_interval(result.judges[name]), _percent(result.wins[name]) if result.wins else "-"]
        rows.append([*cells, *(f"{result.parts[name]:.3f}" for name in parts)])
    return "\n".join(table_lines(head, rows))


def _against_each_other(results: Sequence[ContenderResult]) -> list[str]:
    """The table of each writer against those before it; nothing where there is only one."""
    plain, *writers = results
    pairs = [(one.name, other, result) for one in writers for other, result in one.against.items() if other != plain.name]
    if not pairs:
        return []
    head = ["", *(h for name in plain.judges for h in (f"{name} wins", f"{name} difference"))]
    rows = []
    for name, other, result in pairs:
        cells = [(_percent(result.wins[judge]), _interval(result.differences[judge])) for judge in plain.judges]
        rows.append([f"{name} against {other}", *(cell for both in cells for cell in both)])
    return ["## Writers against each other", "On the same prompts, from the same noise.", "\n".join(table_lines(head, rows))]


def _compared(values: Mapping[str, Any]) -> list[str]:
    """The table of the networks behind the names."""
    writers = {way["name"]: way["writer"] for way in values["ways"] if way["writer"]}
    networks = {"generator": values["generator"], **writers}
    rows = [[name, network["name"] or "in memory", network["fingerprint"][:16]] for name, network in networks.items()]
    return table_lines(["", "folder or id", "fingerprint"], rows)


def _interval(values: tuple[float, float, float]) -> str:
    mean, low, high = values
    return f"{mean:.4g} ({interval(low, high, '{:.4g}'.format)})"


def _percent(values: tuple[float, float, float]) -> str:
    return "{:.0f} % ({:.0f} to {:.0f})".format(*(100 * v for v in values))


def _distance_table(results: Sequence[ContenderResult], delta: float) -> list[str]:
    far = ["mean distance", "median / 90 % / 99 %", f"beyond {delta:g}"]
    head = ["", *far, "words", "cut", "truncated", "diversity", "different", "unchanged"]
    rows = [
        [
            result.name,
            f"{result.distance:.3f}",
            " / ".join(f"{q:.3f}" for q in result.distance_quantiles),
            f"{100 * result.beyond:.1f} %",
            f"{result.words:.1f}",
            str(result.cut),
            str(result.truncated),
            f"{result.diversity:.3f}",
            f"{100 * result.different:.0f} %",
            f"{100 * result.unchanged:.0f} %",
        ]
        for result in results
    ]
    return table_lines(head, rows)


def _left_out(problems: Sequence[str], shown: int = 10) -> list[str]:
    if not problems:
        return []
    more = [f"* and {len(problems) - shown} more"] if len(problems) > shown else []
    listed = [*(f"* {problem}" for problem in problems[:shown]), *more]
    return ["\n".join([f"{len(problems)} prompts that cannot be rewritten were left out:", "", *listed])]


def _predicted_drift(results: Sequence[ContenderResult], runs: Sequence[ContenderRun], embedding: Embedding) -> list[str]:
    known = [(result, run.drift) for result, run in zip(results, runs, strict=True) if result.predicted_drift and run.drift]
    if not known:
        return []
    head = ["", "alpha", "winners' mean distance", "as weighted", "winners beyond", "as weighted", "bound", "measured"]
    rows = [
        [
            result.name,
            f"{result.predicted_drift['alpha']:g}",
            *(f"{result.predicted_drift[name]:.3f}" for name in ("mean", "tilted_mean")),
            *(f"{100 * result.predicted_drift[name]:.1f} %" for name in ("beyond", "tilted_beyond", "bound")),
            f"{100 * result.beyond:.1f} %" if _comparable(drift, embedding) else f"- (trained by distances of {drift.embedding})",
        ]
        for result, drift in known
    ]
    remark = (
        "The first columns are of the winners in the training data, plain and as Sem-DPO's weights see them; the bound is "
        "exp(-alpha delta) / Z. It is on these data, not on the writer: nothing follows for a writer that does not fit them."
    )
    return ["## Predicted and measured drift", "\n".join(table_lines(head, rows)), remark]


def _comparable(drift: Drift, embedding: Embedding) -> bool:
    """Whether the distances of a writer's training data are in the embedding that its rewrites are measured in.

    Where they were a column of the data, the embedding is not known, and they count as comparable.
    """
    return not drift.fingerprint or drift.fingerprint == embedding.fingerprint


def _examples(runs: Sequence[ContenderRun]) -> list[list[str]]:
    """A row for each of the first prompts: the plain prompt and its rewrites."""
    return [list(texts) for texts in zip(*(run.texts[:SHOWN] for run in runs), strict=True)]
