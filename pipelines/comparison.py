"""Comparison of systems by a table of scores: statistics as frames, as Markdown and as a plot.

Pictures of two systems are paired by ``prompt_id`` and ``sample`` (``counterparts`` assigns these). The prompt is the unit
of analysis: pictures of one prompt resemble each other, so every interval resamples whole prompts and every test counts a prompt
once (``diffalign.evaluate``). Scores of a judge for which lower is better change sign before wins, preferences, strengths and
agreement are computed; means and differences stay in its own units.

``comparison_table`` reads and pairs the table, ``comparison_numbers`` computes the frames, ``comparison_notes`` collects
warnings; ``markdown`` and ``comparison_plot`` present the result.

Shapes: N = pairs.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from diffalign import evaluate as statistics
from diffalign.errors import UserError
from pipelines import comparison_numbers as numbers
from pipelines import markdown, outputs
from pipelines.comparison_notes import notes_on
from pipelines.comparison_table import JudgeColumn, Pairs, ScoreRows, judges_of, one_of, pair_up, read
from pipelines.text_tables import in_cell

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Systems against a baseline.

    ``means``: one row per system and judge; ``mean``, its interval ``low`` to ``high``, ``prompts``, ``pictures``, ``excluded``.
    A system's pictures without partner do not enter.

    ``win_rates``: one row per judge and system. ``win_rate`` = P(win) + P(tie) / 2 with its interval and ``half_width``;
    ``wins``, ``ties`` and ``losses`` count pairs; ``sign_test_p``. ``difference`` = system - baseline in the judge's units,
    with its interval, ``effect_size`` d_z and ``wilcoxon_p`` (signed ranks of the prompts' mean differences).
    ``preference``, with its interval: the mean over pairs of the probability that the judge itself gives to the system's
    picture, sigmoid(sharpness * difference); NaN where a judge defines none.

    ``by_category``: one row per judge, system and category, and one named ``MACRO``; ``p_holm`` is the sign test's p
    corrected for the number of categories of that judge and system (Holm 1979).

    ``ranking``: with more than two systems, one row per judge and system: the Bradley-Terry ``strength`` with its interval,
    ``elo``, ``rank``, the interval of ranks, and ``first``, the share of replicates in which it ranks first, alone or not.

    ``correlations``: Spearman's, judge by judge; ``.loc["differences"]`` over the pairs of all systems, ``.loc["scores"]``
    over all pictures. The first is the one to read: scores of different prompts also differ because prompts do.

    ``pairs``: one row per pair, each judge's column holding system - baseline.
    """

    baseline: str
    systems: tuple[str, ...]
    judges: tuple[str, ...]
    level: float
    means: pd.DataFrame
    win_rates: pd.DataFrame
    by_category: pd.DataFrame
    ranking: pd.DataFrame
    correlations: pd.DataFrame
    pairs: pd.DataFrame
    notes: tuple[str, ...]
    provenance: Mapping[str, Any]

    @property
    def summary(self) -> pd.DataFrame:
        """Mean score of each system (rows) by each judge (columns)."""
        wide = self.means.pivot(index="system", columns="judge", values="mean")
        return wide.loc[list(self.systems), list(self.judges)]

    def disagreements(self, n: int = 12) -> pd.DataFrame:
        """The ``n`` pairs on which two judges disagree most, one row each: one prefers the system, the other the baseline.

        Differences are divided by their standard deviation over all pairs, so that judges can be laid beside each other, but
        their mean is not taken off: the sign has to stay the verdict. ``gap`` is the distance between the two judges named.
        Raises ``UserError`` for fewer than one.
        """
        if n < 1:
            raise UserError(f"disagreements are counted from 1; got n={n}.")
        scaled = np.stack([self._sign(j) * _scaled(self.pairs[j].to_numpy()) for j in self.judges], axis=1)  # [N, judges]
        highest, lowest = np.where(np.isnan(scaled), -np.inf, scaled), np.where(np.isnan(scaled), np.inf, scaled)
        most, least, row = highest.argmax(axis=1), lowest.argmin(axis=1), np.arange(len(scaled))
        up, down = highest[row, most], lowest[row, least]
        found = np.flatnonzero((up > 0) & (down < 0))
        found = found[np.argsort(-(up - down)[found], kind="stable")][:n]
        out = self.pairs.drop(columns=list(self.judges)).iloc[found].reset_index(drop=True)
        values, names = self.pairs[list(self.judges)].to_numpy(), np.array(self.judges, dtype=object)
        for word, which, z in (("for", most, up), ("against", least, down)):
            out[f"judge_{word}"] = names[which[found]]
            out[f"difference_{word}"] = values[found, which[found]]
            out[f"z_{word}"] = z[found]
        out["gap"] = (up - down)[found]
        return out

    def to_markdown(self) -> str:
        """The report as text; what it rests on is in ``provenance``."""
        head = [f"# {in_cell(markdown.title(self))}", "", in_cell(markdown.headline(self)), ""]
        tables = [table.to_markdown() + "\n" for table in markdown.tables(self)]
        notes = ["## Notes", "", *(f"- {in_cell(note)}" for note in self.notes)] if self.notes else []
        return "\n".join([*head, *tables, *notes]).rstrip() + "\n"

    def plot(self) -> Figure:
        """Win rates with intervals by judge, and below them by category where there are any."""
        from pipelines import comparison_plot

        return comparison_plot.draw(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pairs in types that JSON knows; numbers that are not finite are None."""
        frames = {name: getattr(self, name) for name in ("means", "win_rates", "by_category", "ranking")}
        return outputs.json_plain(
            {
                "baseline": self.baseline,
                "systems": self.systems,
                "judges": self.judges,
                "level": self.level,
                "summary": self.summary.to_dict("index"),
                **{name: frame.to_dict("records") for name, frame in frames.items()},
                "correlations": {over: self.correlations.loc[over].to_dict("index") for over in ("differences", "scores")},
                "notes": self.notes,
                "provenance": self.provenance,
            },
            other=str,
        )

    def __str__(self) -> str:
        return self.to_markdown()

    def __repr__(self) -> str:
        return f"<Comparison: {markdown.title(self)}, by {', '.join(self.judges)}>"

    def _repr_html_(self) -> str:
        from pipelines import comparison_plot

        png = base64.b64encode(comparison_plot.as_png(self.plot())).decode()
        tables = "".join(table.to_html() for table in markdown.tables(self))
        notes = "<h3>Notes</h3><ul>" + "".join(f"<li>{escape(note)}</li>" for note in self.notes) + "</ul>" if self.notes else ""
        head = f"<h2>{escape(markdown.title(self))}</h2><p>{escape(markdown.headline(self))}</p>"
        return f'{head}<img alt="win rates" src="data:image/png;base64,{png}">{tables}{notes}'

    def label(self, judge: str) -> str:
        """The judge's name, with a warning where lower scores win."""
        return judge if self._sign(judge) > 0 else f"{judge} (lower is better)"

    def _sign(self, judge: str) -> float:
        return 1.0 if self.provenance["judges"][judge]["higher_is_better"] else -1.0


def compare(
    table: pd.DataFrame,
    baseline: str | None = None,
    judges: str | Sequence[str] | None = None,
    by: str | None = "category",
    tie_tolerance: float | Mapping[str, float] = 0.0,
    n_boot: int = statistics.REPLICATES,
    seed: int = 0,
    level: float = 0.95,
) -> Comparison:
    """Every system in the table against one of them.

    Args:
        table: one row per picture, with the columns ``comparison_table.KEYS`` (``system``, ``prompt_id`` and ``sample`` at
            least) and one column of numbers per judge. ``table.attrs["judges"]``, if there, says of each whether
            ``higher_is_better`` and its ``sharpness``; without it higher is better.
        baseline: a system; the first in the table if not given.
        judges: columns of scores; all if not given.
        by: column whose values part the prompts; rows in which it is empty are in no category.
        tie_tolerance: scores that differ by no more are a tie; one for all judges, or one for each that is named.

    Raises:
        UserError: the table cannot be compared: something is missing, double or unknown, or nothing pairs.
    """
    judged = judges_of(table, judges, by, tie_tolerance)
    _check_settings(n_boot, level)
    rows = read(table, judged, by)
    first = rows.systems[0] if baseline is None else one_of(str(baseline), rows.systems, "system")
    paired = [pair_up(rows, first, system) for system in rows.systems if system != first]
    boot = {"n_boot": n_boot, "seed": seed, "level": level}
    win_rates = numbers.win_rates(rows, judged, paired, boot)
    by_category = numbers.by_category(rows, judged, paired, boot)
    return Comparison(
        baseline=first,
        systems=(first, *(pairs.system for pairs in paired)),
        judges=tuple(judge.name for judge in judged),
        level=level,
        means=numbers.means(rows, judged, paired, boot),
        win_rates=win_rates,
        by_category=by_category,
        ranking=numbers.ranking(rows, judged, paired, boot),
        correlations=numbers.correlations(rows, judged, paired),
        pairs=numbers.pairs_frame(rows, judged, paired),
        notes=tuple(notes_on(rows, judged, paired, win_rates, by_category)),
        provenance=_provenance(table, rows, judged, paired, by, boot),
    )


def _check_settings(n_boot: int, level: float) -> None:
    if n_boot < 1:
        raise UserError(f"n_boot, how many times prompts are drawn anew, must be at least 1; got {n_boot}.")
    if not 0 < level < 1:
        raise UserError(f"level must lie between 0 and 1, as 0.95 does; got {level}.")


def _provenance(
    table: pd.DataFrame,
    rows: ScoreRows,
    judges: Sequence[JudgeColumn],
    paired: Sequence[Pairs],
    by: str | None,
    boot: Mapping[str, Any],
) -> dict[str, Any]:
    """Record of the data and settings behind the numbers, with the facts that the table holds about each judge."""
    from importlib import metadata

    known = table.attrs.get("judges", {})
    return {
        "baseline": paired[0].baseline,
        "pictures": {name: int((rows.grid[:, s] >= 0).sum()) for s, name in enumerate(rows.systems)},
        "pairs": {p.system: len(p.a) for p in paired},
        "prompts": {p.system: len(set(rows.prompt[p.a])) for p in paired},
        "by": by,
        **boot,
        "judges": {
            j.name: {
                **known.get(j.name, {}),
                "higher_is_better": j.higher_is_better,
                "sharpness": j.sharpness,
                "tie_tolerance": j.tie_tolerance,
            }
            for j in judges
        },
        "versions": {**outputs.versions(), "pandas": metadata.version("pandas")},
        "table": {key: value for key, value in table.attrs.items() if key != "judges"},
    }


def _scaled(difference: np.ndarray) -> np.ndarray:
    """Differences [N] over their standard deviation; NaN where one is not finite, or all are equal."""
    finite = np.where(np.isfinite(difference), difference, np.nan)
    spread = np.nanstd(finite) if np.isfinite(finite).any() else 0.0
    return finite / spread if spread > 0 else np.full(len(finite), np.nan)
