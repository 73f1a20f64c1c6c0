"""Which system makes the better pictures? Statistics over a table of scores, as frames, as Markdown and as a plot.

Pictures of two systems are paired by prompt and by their number among the pictures of that prompt. The prompt is the unit of
analysis: pictures of one prompt resemble each other, so every interval resamples whole prompts and every test counts a prompt
once (``diffalign.evaluate``). A judge for which lower scores are better is turned round before wins, preferences, strengths and
agreement are computed; means and differences stay in its own units.

Shapes: M = rows of the table, K = different (prompt, sample), S = systems, N = pairs, G = prompts, R = bootstrap replicates.
"""

from __future__ import annotations

import base64
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

import reward_models
from diffalign import evaluate as statistics
from diffalign.errors import UserError
from pipelines import markdown, outputs
from pipelines.markdown import count
from reward_models.base import JudgeError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

KEYS = ("system", "picture", "prompt_id", "prompt", "category", "sample", "seed")
"""Columns of a table that are not scores; ``seed`` may be absent."""
FEW_PROMPTS = 50
MANY_TIES = 0.05
"""A judge that ties on a larger share of pairs is named in the notes."""
MACRO = "(macro average)"
"""What rows of ``by_category`` are called that give every category the same weight."""
SMOOTHING = 1.0
"""Ties added between every two systems in the Bradley-Terry model: without them one that won all would be infinitely strong."""

_NEEDED = ("system", "prompt_id", "sample")
_INDEX = "Unnamed: "  # what pandas calls the index that to_csv wrote
_DRAWS_AT_ONCE = 2_000_000


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
        """
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
        in_line = markdown.in_cell
        head = [f"# {in_line(markdown.title(self))}", "", in_line(markdown.headline(self)), ""]
        tables = [table.to_markdown() + "\n" for table in markdown.tables(self)]
        notes = ["## Notes", "", *(f"- {in_line(note)}" for note in self.notes)] if self.notes else []
        return "\n".join([*head, *tables, *notes]).rstrip() + "\n"

    def plot(self) -> Figure:
        """Win rates with intervals by judge, and below them by category where there are any."""
        from pipelines import comparison_plot

        return comparison_plot.draw(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pairs in types that JSON knows; numbers that are not finite are None."""
        frames = {name: getattr(self, name) for name in ("means", "win_rates", "by_category", "ranking")}
        return _plain(
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
            }
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
        table: one row per picture, with the columns ``KEYS`` (``system``, ``prompt_id`` and ``sample`` at least) and one
            column of numbers per judge. ``table.attrs["judges"]``, if there, says of each whether ``higher_is_better`` and its
            ``sharpness``; without it higher is better.
        baseline: a system; the first in the table if not given.
        judges: columns of scores; all if not given.
        by: column whose values part the prompts; rows in which it is empty are in no category.
        tie_tolerance: scores that differ by no more are a tie; one for all judges, or one for each that is named.

    Raises:
        UserError: the table cannot be compared: something is missing, double or unknown, or nothing pairs.
    """
    judged = _judges(table, judges, by, tie_tolerance)
    _check_settings(n_boot, level)
    rows = _read(table, judged, by)
    first = rows.systems[0] if baseline is None else _one_of(str(baseline), rows.systems, "system")
    paired = [_pair(rows, first, system) for system in rows.systems if system != first]
    boot = {"n_boot": n_boot, "seed": seed, "level": level}
    win_rates = _frame([_win_row(rows, judge, pairs, boot) for judge in judged for pairs in paired])
    by_category = _frame([row for j in judged for p in paired for row in _category_rows(rows, j, p, boot)], _CATEGORY_COLUMNS)
    return Comparison(
        baseline=first,
        systems=(first, *(pairs.system for pairs in paired)),
        judges=tuple(judge.name for judge in judged),
        level=level,
        means=_means(rows, judged, paired, boot),
        win_rates=win_rates,
        by_category=by_category,
        ranking=_frame([row for j in judged for row in _ranks(rows, j, boot)] if len(paired) > 1 else [], _RANKING_COLUMNS),
        correlations=_correlations(rows, judged, paired),
        pairs=_pairs_frame(rows, judged, paired),
        notes=tuple(_notes(rows, judged, paired, win_rates, by_category)),
        provenance=_provenance(table, rows, judged, paired, by, boot),
    )


# ------------------------------------------------------------------------------------------------------- reading the table


@dataclass(frozen=True)
class _Judge:
    name: str
    higher_is_better: bool
    sharpness: float | None
    tie_tolerance: float
    known: bool
    """The table says what the judge is; otherwise that higher is better is a guess."""

    @property
    def sign(self) -> float:
        return 1.0 if self.higher_is_better else -1.0


@dataclass(frozen=True)
class _Rows:
    """The table, checked."""

    systems: list[str]
    grid: np.ndarray  # [K, S] row of the table, -1 where a system has no such picture
    prompt: np.ndarray  # [M] number of the prompt; equal texts are one prompt
    category: np.ndarray  # [M] of str or None
    columns: Mapping[str, np.ndarray]  # [M] each
    scores: Mapping[str, np.ndarray]  # [M] each


@dataclass(frozen=True)
class _Pairs:
    """Rows [N] of the baseline's pictures and of a system's, in order of prompts and samples."""

    system: str
    baseline: str
    a: np.ndarray
    b: np.ndarray
    alone: int
    """Pictures of the system without partner."""
    baseline_alone: int


def _judges(table: pd.DataFrame, wanted: str | Sequence[str] | None, by: str | None, tie_tolerance: Any) -> list[_Judge]:
    from pandas.api import types

    twice = sorted({str(c) for c in table.columns[table.columns.duplicated()]})
    if twice:
        raise UserError(f"The table has more than one column called {', '.join(map(repr, twice))}.")
    others = {*KEYS, by}
    numbers = [c for c in table.columns if types.is_numeric_dtype(table[c]) and not types.is_bool_dtype(table[c])]
    there = [c for c in numbers if c not in others and not str(c).startswith(_INDEX)]
    if not there:
        raise UserError(
            f"The table holds no judge's scores. Its columns are {', '.join(map(str, table.columns))}; besides "
            f"{', '.join(KEYS)} there should be a column of numbers for each judge."
        )
    names = there if wanted is None else [wanted] if isinstance(wanted, str) else list(dict.fromkeys(wanted))
    if not names:
        raise UserError(f"No judges were named; the table has {', '.join(map(str, there))}.")
    for name in names:
        if name in table.columns and name not in numbers and name not in others:
            raise UserError(f"The column {name!r} holds {table[name].dtype} and no numbers, so it cannot be a judge's scores.")
        _one_of(name, there, "judge")
    try:
        reward_models.check_together(names)
    except JudgeError as error:
        raise UserError(str(error)) from error
    tolerances = tie_tolerance if isinstance(tie_tolerance, Mapping) else dict.fromkeys(names, tie_tolerance)
    for name, tolerance in tolerances.items():
        _one_of(name, names, "judge")
        if not tolerance >= 0:
            raise UserError(f"tie_tolerance must be zero or more; got {tolerance}.")
    return [_judge(name, table.attrs.get("judges", {}).get(name), float(tolerances.get(name, 0.0))) for name in names]


def _judge(name: str, facts: Mapping[str, Any] | None, tie_tolerance: float) -> _Judge:
    known = facts or {}
    return _Judge(
        name, bool(known.get("higher_is_better", True)), known.get("sharpness"), tie_tolerance, "higher_is_better" in known
    )


def _check_settings(n_boot: int, level: float) -> None:
    if n_boot < 1:
        raise UserError(f"n_boot, how many times prompts are drawn anew, must be at least 1; got {n_boot}.")
    if not 0 < level < 1:
        raise UserError(f"level must lie between 0 and 1, as 0.95 does; got {level}.")


def _one_of(name: str, known: Sequence[str], what: str) -> str:
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise UserError(f"The table has no {what} {name!r}.{hint} It has {', '.join(known)}.")
    return name


def _read(table: pd.DataFrame, judges: Sequence[_Judge], by: str | None) -> _Rows:
    missing = [c for c in _NEEDED if c not in table.columns]
    if missing:
        raise UserError(f"The table lacks the column {', '.join(missing)}; its columns are {', '.join(map(str, table.columns))}.")
    for column in _NEEDED:
        if table[column].isna().any():
            raise UserError(f"The column {column!r} is empty in {int(table[column].isna().sum())} rows; pictures pair by it.")
    if by is not None and by not in table.columns and by != "category":
        _one_of(by, [str(c) for c in table.columns], "column")
    systems = [str(s) for s in table["system"].unique()]
    if len(systems) < 2:
        raise UserError(f"The table holds {len(systems)} system{'' if systems else 's'}; a comparison needs two or more.")
    _refuse_doubles(table)
    # numbered in order, so that the order of the rows does not matter to the bootstrap
    key = table.groupby(["prompt_id", "sample"], sort=True).ngroup().to_numpy()
    grid = np.full((key.max() + 1, len(systems)), -1)
    grid[key, [systems.index(str(s)) for s in table["system"]]] = np.arange(len(table))
    columns = {c: _objects(table, c) for c in KEYS}
    return _Rows(
        systems=systems,
        grid=grid,
        prompt=_prompts(columns["prompt"], columns["prompt_id"]),
        category=np.array([None if c is None else str(c) for c in _objects(table, by)], dtype=object),
        columns=columns,
        scores={judge.name: table[judge.name].to_numpy(dtype=np.float64, na_value=np.nan) for judge in judges},
    )


def _refuse_doubles(table: pd.DataFrame) -> None:
    doubles = table.duplicated(list(_NEEDED))
    if doubles.any():
        system, prompt, sample = table.loc[doubles.to_numpy(), list(_NEEDED)].iloc[0]
        raise UserError(
            f"Two rows are the same picture: system {system!r}, prompt_id {prompt}, sample {sample} ({int(doubles.sum())} such "
            f"rows). Pictures of one prompt and system are told apart by their sample: 0, 1, 2 and so on."
        )


def _objects(table: pd.DataFrame, column: str | None) -> np.ndarray:
    """The values [M] of a column, None where there is none."""
    out = np.full(len(table), None, dtype=object)
    if column in table.columns:
        filled = table[column].notna().to_numpy()
        out[filled] = np.array([*table[column], None], dtype=object)[:-1][filled]
    return out


def _prompts(texts: np.ndarray, ids: np.ndarray) -> np.ndarray:
    seen: dict[Any, int] = {}
    return np.array([seen.setdefault(("text", text) if text else ("id", i), len(seen)) for text, i in zip(texts, ids)])


def _pair(rows: _Rows, baseline: str, system: str) -> _Pairs:
    """Raises UserError if no picture has a partner, or partners were made from different prompts."""
    a, b = (rows.grid[:, rows.systems.index(name)] for name in (baseline, system))
    both = (a >= 0) & (b >= 0)
    if not both.any():
        raise UserError(
            f"{baseline!r} and {system!r} have nothing in common: no picture of one has the prompt_id and the sample of "
            f"one of the other. {baseline!r} has {_example(rows, a)}, {system!r} has {_example(rows, b)}."
        )
    pairs = _Pairs(system, baseline, a[both], b[both], int((b >= 0).sum() - both.sum()), int((a >= 0).sum() - both.sum()))
    texts = rows.columns["prompt"]
    for i, j in zip(pairs.a, pairs.b):
        if texts[i] and texts[j] and texts[i] != texts[j]:
            raise UserError(
                f"prompt_id {rows.columns['prompt_id'][i]} is {texts[i]!r} in {baseline!r} and {texts[j]!r} in {system!r}; "
                "pictures can be paired only if both systems number the same prompts alike."
            )
    return pairs


def _example(rows: _Rows, of_system: np.ndarray) -> str:
    row = of_system[of_system >= 0][0]
    return f"prompt_id {rows.columns['prompt_id'][row]}, sample {rows.columns['sample'][row]}"


def _pair_categories(rows: _Rows, pairs: _Pairs) -> np.ndarray:
    a, b = rows.category[pairs.a], rows.category[pairs.b]
    return np.where(a == None, b, a)  # noqa: E711  element by element


# --------------------------------------------------------------------------------------------------------------- numbers


def _means(rows: _Rows, judges: Sequence[_Judge], paired: Sequence[_Pairs], boot: Mapping[str, Any]) -> pd.DataFrame:
    base = rows.grid[:, rows.systems.index(paired[0].baseline)]
    partnered = base[np.isin(base, np.concatenate([p.a for p in paired]))]
    used = {paired[0].baseline: partnered, **{p.system: p.b for p in paired}}
    out = []
    for system, chosen in used.items():
        for judge in judges:
            x = statistics.mean_with_interval(rows.scores[judge.name][chosen], groups=rows.prompt[chosen], **boot)
            out.append(
                {
                    "system": system,
                    "judge": judge.name,
                    "mean": x.mean,
                    "low": x.low,
                    "high": x.high,
                    "prompts": x.groups,
                    "pictures": x.n,
                    "excluded": x.excluded,
                }
            )
    return _frame(out)


def _win_row(rows: _Rows, judge: _Judge, pairs: _Pairs, boot: Mapping[str, Any]) -> dict[str, Any]:
    a, b, prompts = rows.scores[judge.name][pairs.a], rows.scores[judge.name][pairs.b], rows.prompt[pairs.a]
    won = statistics.win_rate(judge.sign * a, judge.sign * b, groups=prompts, tie_tolerance=judge.tie_tolerance, **boot)
    change = statistics.paired_difference(a, b, groups=prompts, **boot)
    preferred = statistics.mean_with_interval(_preference(judge, b - a), groups=prompts, **boot)
    both = ~np.isnan(a + b)
    return {
        "judge": judge.name,
        "system": pairs.system,
        "baseline": pairs.baseline,
        **_won(won),
        "sign_test_p": won.p_value if won.groups else np.nan,
        "baseline_mean": a[both].mean() if both.any() else np.nan,
        "system_mean": b[both].mean() if both.any() else np.nan,
        "difference": change.mean,
        "difference_low": change.low,
        "difference_high": change.high,
        "effect_size": statistics.effect_size(a, b, groups=prompts),
        "wilcoxon_p": _wilcoxon(b - a, prompts),
        "preference": preferred.mean,
        "preference_low": preferred.low,
        "preference_high": preferred.high,
        "pairs": won.wins + won.ties + won.losses,
        "prompts": won.groups,
        "excluded": won.excluded,
    }


def _won(won: statistics.WinRate) -> dict[str, Any]:
    return {
        "win_rate": won.rate,
        "low": won.low,
        "high": won.high,
        "half_width": 0.5 * (won.high - won.low),
        "wins": won.wins,
        "ties": won.ties,
        "losses": won.losses,
    }


def _preference(judge: _Judge, difference: np.ndarray) -> np.ndarray:
    """The probability [N] that the judge's own model gives to the system's picture; NaN where it defines none.

    P(b before a) = sigmoid(sharpness * (s_b - s_a)), as PickScore, HPSv2 and ImageReward were trained.
    """
    from scipy.special import expit

    return np.full(len(difference), np.nan) if judge.sharpness is None else expit(judge.sign * judge.sharpness * difference)


def _wilcoxon(difference: np.ndarray, prompts: np.ndarray) -> float:
    """Two-sided p value of Wilcoxon's signed ranks over the prompts' mean differences; NaN if there are none."""
    from scipy import stats

    keep = ~np.isnan(difference)
    if not keep.any():
        return np.nan
    _, codes = np.unique(prompts[keep], return_inverse=True)
    per_prompt = np.bincount(codes, weights=difference[keep]) / np.bincount(codes)
    return float(stats.wilcoxon(per_prompt).pvalue) if per_prompt.any() else 1.0


_CATEGORY_COLUMNS = (
    *("judge", "system", "category", "win_rate", "low", "high", "half_width", "wins", "ties", "losses"),
    *("sign_test_p", "p_holm", "difference", "pairs", "prompts", "excluded"),
)


def _category_rows(rows: _Rows, judge: _Judge, pairs: _Pairs, boot: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per category in order of appearance, and the macro average; nothing where no pair has a category."""
    categories = _pair_categories(rows, pairs)
    out = []
    for category in dict.fromkeys(c for c in categories if c is not None):
        a, b = pairs.a[categories == category], pairs.b[categories == category]
        x, y, prompts = judge.sign * rows.scores[judge.name][a], judge.sign * rows.scores[judge.name][b], rows.prompt[a]
        won = statistics.win_rate(x, y, groups=prompts, tie_tolerance=judge.tie_tolerance, **boot)
        both = ~np.isnan(y - x)
        out.append(
            {
                "category": category,
                **_won(won),
                "sign_test_p": won.p_value if won.groups else np.nan,
                "difference": judge.sign * (y - x)[both].mean() if both.any() else np.nan,
                "pairs": won.wins + won.ties + won.losses,
                "prompts": won.groups,
                "excluded": won.excluded,
            }
        )
    for row, corrected in zip(out, holm([row["sign_test_p"] for row in out])):
        row["p_holm"] = corrected
    return [{"judge": judge.name, "system": pairs.system, **row} for row in ([*out, _macro(out)] if out else [])]


def _macro(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every category has the same weight, whatever its size.

    Categories share no prompts, so the squared distances from each rate to the ends of its interval add up (Zou and Donner 2008,
    the method of variance estimates recovery).
    """
    judged = [row for row in rows if not math.isnan(row["win_rate"])]
    rate, low, high, difference = (
        np.array([row[k] for row in judged] or [np.nan]) for k in ("win_rate", "low", "high", "difference")
    )
    mean, n = float(rate.mean()), len(rate)
    low_end = mean - float(np.sqrt(np.sum((rate - low) ** 2))) / n
    high_end = mean + float(np.sqrt(np.sum((high - rate) ** 2))) / n
    return {
        "category": MACRO,
        "win_rate": mean,
        "low": low_end,
        "high": high_end,
        "half_width": 0.5 * (high_end - low_end),
        "sign_test_p": np.nan,
        "p_holm": np.nan,
        "difference": float(difference.mean()),
        **{k: sum(row[k] for row in rows) for k in ("wins", "ties", "losses", "pairs", "prompts", "excluded")},
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p value corrected for the number of tests (Holm 1979): from the smallest on, times how many are left, never falling.

    NaN is no test.
    """
    out = [math.nan] * len(p_values)
    order = sorted((k for k, p in enumerate(p_values) if not math.isnan(p)), key=lambda k: p_values[k])
    largest = 0.0
    for place, k in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p_values[k]))
        out[k] = largest
    return out


# ------------------------------------------------------------------------------------------------- more than two systems


_RANKING_COLUMNS = ("judge", "system", "rank", "rank_low", "rank_high", "first", "strength", "low", "high", "elo", "games")


def _ranks(rows: _Rows, judge: _Judge, boot: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Strengths of all systems from all their pairs, strongest first; intervals from the prompts drawn anew."""
    wins = _wins_by_prompt(rows, judge)  # [G, S, S]
    if len(wins) == 0:
        return []
    strength = bradley_terry(wins.sum(axis=0))
    drawn = bradley_terry(_redrawn(wins, boot["n_boot"], boot["seed"]))  # [R, S]
    ranks = 1 + (drawn[:, None, :] > drawn[:, :, None] + 1e-9).sum(axis=2)  # equal strengths share the better rank
    own = 1 + (strength[None, :] > strength[:, None] + 1e-9).sum(axis=1)
    ends = [0.5 - 0.5 * boot["level"], 0.5 + 0.5 * boot["level"]]
    low, high = np.quantile(drawn, ends, axis=0)
    rank_low, rank_high = np.quantile(ranks, ends, axis=0, method="inverted_cdf")
    total = wins.sum(axis=0)
    return [
        {
            "judge": judge.name,
            "system": rows.systems[s],
            "rank": int(own[s]),
            "rank_low": int(rank_low[s]),
            "rank_high": int(rank_high[s]),
            "first": float((ranks[:, s] == 1).mean()),
            "strength": float(strength[s]),
            "low": float(low[s]),
            "high": float(high[s]),
            "elo": float(1000 + 400 / math.log(10) * strength[s]),
            "games": round((total[s] + total[:, s]).sum()),
        }
        for s in np.argsort(own, kind="stable")
    ]


def _wins_by_prompt(rows: _Rows, judge: _Judge) -> np.ndarray:
    """How often system i beat system j on each prompt, ties half, [G, S, S]; prompts without a game are left out."""
    there = rows.grid >= 0
    score = np.where(there, judge.sign * rows.scores[judge.name][rows.grid], np.nan)  # [K, S]
    ahead = score[:, :, None] - score[:, None, :]  # [K, S, S] NaN where one is absent
    outcome = np.where(np.abs(ahead) <= judge.tie_tolerance, 0.0, np.sign(ahead))
    played = ~np.isnan(ahead) & ~np.eye(len(rows.systems), dtype=bool)
    won = np.where(played, 0.5 * (1.0 + outcome), 0.0)
    prompt = rows.prompt[rows.grid[np.arange(len(there)), there.argmax(axis=1)]]
    keep = played.any(axis=(1, 2))
    _, codes = np.unique(prompt[keep], return_inverse=True)
    out = np.zeros((codes.max() + 1 if len(codes) else 0, *won.shape[1:]))
    np.add.at(out, codes, won[keep])
    return out


def _redrawn(wins: np.ndarray, n_boot: int, seed: int) -> np.ndarray:
    """Sums [R, S, S] over G prompts drawn with replacement."""
    rng, size = np.random.default_rng(seed), len(wins)
    flat, out = wins.reshape(size, -1), np.empty((n_boot, *wins.shape[1:]))
    at_once = max(1, _DRAWS_AT_ONCE // size)
    for start in range(0, n_boot, at_once):
        many = min(at_once, n_boot - start)
        drawn = rng.integers(size, size=(many, size)) + size * np.arange(many)[:, None]
        times = np.bincount(drawn.ravel(), minlength=many * size).reshape(many, size).astype(np.float64)
        out[start : start + many] = (times @ flat).reshape(many, *wins.shape[1:])
    return out


def bradley_terry(wins: np.ndarray) -> np.ndarray:
    """Strengths [..., S] with mean zero that make the outcomes ``wins`` [..., S, S] likeliest, i over j.

    P(i beats j) = sigmoid(s_i - s_j) (Bradley and Terry 1952), with ``SMOOTHING`` ties added between every two; Newton's
    method, its steps kept below one.
    """
    from scipy.special import expit

    systems = wins.shape[-1]
    wins = wins + 0.5 * SMOOTHING * (1.0 - np.eye(systems))
    games = wins + np.swapaxes(wins, -1, -2)
    strength = np.zeros(wins.shape[:-1])
    for _ in range(200):
        chance = expit(strength[..., :, None] - strength[..., None, :])
        gradient = (wins - games * chance).sum(axis=-1)
        weight = games * chance * (1.0 - chance)
        # the likelihood does not change when all strengths grow alike; the constant fixes their mean
        curvature = weight.sum(axis=-1)[..., None] * np.eye(systems) - weight + 1.0 / systems
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        strength = strength + step / np.maximum(1.0, np.abs(step).max(axis=-1, keepdims=True))
        if np.abs(step).max() < 1e-9:
            break
    return strength - strength.mean(axis=-1, keepdims=True)


# ------------------------------------------------------------------------------------------------- agreement of the judges


def _correlations(rows: _Rows, judges: Sequence[_Judge], paired: Sequence[_Pairs]) -> pd.DataFrame:
    import pandas as pd

    a, b = np.concatenate([p.a for p in paired]), np.concatenate([p.b for p in paired])
    better = {judge.name: judge.sign * rows.scores[judge.name] for judge in judges}
    over = {"differences": {name: x[b] - x[a] for name, x in better.items()}, "scores": better}
    frames = {name: pd.DataFrame(x).corr(method="spearman", min_periods=3) for name, x in over.items()}
    return pd.concat(frames, names=["over", "judge"])


def _scaled(difference: np.ndarray) -> np.ndarray:
    """Differences [N] over their standard deviation; NaN where one is not finite, or all are equal."""
    finite = np.where(np.isfinite(difference), difference, np.nan)
    spread = np.nanstd(finite) if np.isfinite(finite).any() else 0.0
    return finite / spread if spread > 0 else np.full(len(finite), np.nan)


def _pairs_frame(rows: _Rows, judges: Sequence[_Judge], paired: Sequence[_Pairs]) -> pd.DataFrame:
    import pandas as pd

    def frame(pairs: _Pairs) -> pd.DataFrame:
        of = rows.columns
        values = {
            "system": [pairs.system] * len(pairs.a),
            **{key: of[key][pairs.a] for key in ("prompt_id", "sample", "prompt")},
            "category": _pair_categories(rows, pairs),
            "baseline_picture": of["picture"][pairs.a],
            "picture": of["picture"][pairs.b],
        }
        differences = {j.name: rows.scores[j.name][pairs.b] - rows.scores[j.name][pairs.a] for j in judges}
        return pd.DataFrame({**values, **differences}).infer_objects()

    return pd.concat([frame(pairs) for pairs in paired], ignore_index=True)


# ----------------------------------------------------------------------------------------------------------------- notes


def _notes(
    rows: _Rows, judges: Sequence[_Judge], paired: Sequence[_Pairs], win_rates: pd.DataFrame, by_category: pd.DataFrame
) -> list[str]:
    """What a reader should know before believing the numbers."""
    return [
        *_notes_on_pairing(rows, paired),
        *(note for row in win_rates.to_dict("records") for note in _notes_on_scores(row)),
        *_notes_on_judges(judges),
        *_notes_on_categories(rows, paired, by_category),
    ]


def _notes_on_pairing(rows: _Rows, paired: Sequence[_Pairs]) -> list[str]:
    notes = []
    for p in paired:
        prompts = len(set(rows.prompt[p.a]))
        if prompts < FEW_PROMPTS:
            notes.append(
                f"{p.system}: {count(prompts, 'prompt')} in common with {p.baseline}; below {FEW_PROMPTS} the intervals "
                "are rough."
            )
        if p.alone or p.baseline_alone:
            notes.append(
                f"{p.system}: {count(p.alone, 'picture')} without partner in {p.baseline}, and {p.baseline_alone} of "
                f"{p.baseline} without partner in {p.system}, are left out; {count(len(p.a), 'pair')} remain."
            )
        seeds = [(rows.columns["seed"][i], rows.columns["seed"][j]) for i, j in zip(p.a, p.b)]
        different = sum(x is not None and y is not None and x != y for x, y in seeds)
        if different:
            notes.append(
                f"{p.system}: {different} of {count(len(p.a), 'pair')} come from different seeds; those share the prompt, "
                "not the noise, and the intervals are wider for it."
            )
    if len({tuple(p.a) for p in paired}) > 1:
        notes.append(
            f"Not all systems share the same pictures with {paired[0].baseline}; their means are over different prompts "
            "and only the differences can be laid beside each other."
        )
    return notes


def _notes_on_scores(row: Mapping[str, Any]) -> list[str]:
    notes, who = [], f"{row['judge']}, {row['system']}"
    if row["excluded"]:
        notes.append(f"{who}: {count(row['excluded'], 'pair')} left out, a score being not a number (NaN).")
    if row["pairs"] and row["ties"] > MANY_TIES * row["pairs"]:
        notes.append(
            f"{who}: {row['ties']} of {count(row['pairs'], 'pair')} are ties, each counted as half a win: "
            "a judge that tells few pictures apart, scores kept in few digits, or equal pictures."
        )
    return notes


def _notes_on_judges(judges: Sequence[_Judge]) -> list[str]:
    lower = [judge.name for judge in judges if not judge.higher_is_better]
    unknown = [judge.name for judge in judges if not judge.known]
    notes = []
    if lower:
        notes.append(f"{', '.join(lower)}: lower scores are better and count as wins; differences are in the judge's own units.")
    if unknown:
        notes.append(f"{', '.join(unknown)}: the table does not say which way is better; higher scores are taken to be.")
    if any(judge.tie_tolerance for judge in judges):
        told = ", ".join(f"{judge.tie_tolerance:g} ({judge.name})" for judge in judges if judge.tie_tolerance)
        notes.append(f"Scores that differ by no more than this count as ties: {told}.")
    return notes


def _notes_on_categories(rows: _Rows, paired: Sequence[_Pairs], by_category: pd.DataFrame) -> list[str]:
    if by_category.empty:
        return []
    notes = []
    for p in paired:
        without = sum(c is None for c in _pair_categories(rows, p))
        if without:
            notes.append(f"{p.system}: {count(without, 'pair')} without a category, in the totals only.")
    some = by_category[(by_category["judge"] == by_category["judge"].iloc[0]) & (by_category["category"] != MACRO)]
    few = sorted(set(some.loc[some["prompts"] < FEW_PROMPTS, "category"]))
    if few:
        of = some["category"].nunique()
        notes.append(f"{len(few)} of {of} categories have fewer than {FEW_PROMPTS} prompts; their intervals are rough.")
    return notes


def _provenance(
    table: pd.DataFrame, rows: _Rows, judges: Sequence[_Judge], paired: Sequence[_Pairs], by: str | None, boot: Mapping[str, Any]
) -> dict[str, Any]:
    """What the numbers rest on; facts that the table holds about a judge are carried over."""
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


def _frame(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(list(rows), columns=None if columns is None else list(columns))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
