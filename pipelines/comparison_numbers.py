"""The frames of a comparison: means, win rates, categories, ranking, agreement of judges and the pairs themselves.

The prompt is the unit of analysis: pictures of one prompt resemble each other, so every interval resamples whole prompts and
every test counts a prompt once (``diffalign.evaluate``). ``Comparison`` documents the columns.

Shapes: K = different (prompt, sample), S = systems, N = pairs, G = prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diffalign import evaluate as statistics
from diffalign import multiple_comparisons
from pipelines.comparison_table import JudgeColumn, Pairs, ScoreRows

if TYPE_CHECKING:
    import pandas as pd

MACRO = "(macro average)"
"""Name of the rows of ``by_category`` that give every category the same weight."""

_CATEGORY_COLUMNS = (
    *("judge", "system", "category", "win_rate", "low", "high", "half_width", "wins", "ties", "losses"),
    *("sign_test_p", "p_holm", "difference", "pairs", "prompts", "excluded"),
)
_RANKING_COLUMNS = ("judge", "system", "rank", "rank_low", "rank_high", "first", "strength", "low", "high", "elo", "games")


def means(rows: ScoreRows, judges: Sequence[JudgeColumn], paired: Sequence[Pairs], boot: Mapping[str, Any]) -> pd.DataFrame:
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


def win_rates(rows: ScoreRows, judges: Sequence[JudgeColumn], paired: Sequence[Pairs], boot: Mapping[str, Any]) -> pd.DataFrame:
    return _frame([_win_row(rows, judge, pairs, boot) for judge in judges for pairs in paired])


def _win_row(rows: ScoreRows, judge: JudgeColumn, pairs: Pairs, boot: Mapping[str, Any]) -> dict[str, Any]:
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
        "wilcoxon_p": multiple_comparisons.signed_rank_test(b - a, prompts),
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


def _preference(judge: JudgeColumn, difference: np.ndarray) -> np.ndarray:
    """The probability [N] that the judge's own model gives to the system's picture; NaN where it defines none.

    P(b before a) = sigmoid(sharpness * (s_b - s_a)), as PickScore, HPSv2 and ImageReward were trained.
    """
    from scipy.special import expit

    return np.full(len(difference), np.nan) if judge.sharpness is None else expit(judge.sign * judge.sharpness * difference)


# ----------------------------------------------------------------------------------------------------------- categories


def by_category(rows: ScoreRows, judges: Sequence[JudgeColumn], paired: Sequence[Pairs], boot: Mapping[str, Any]) -> pd.DataFrame:
    return _frame([row for j in judges for p in paired for row in _category_rows(rows, j, p, boot)], _CATEGORY_COLUMNS)


def _category_rows(rows: ScoreRows, judge: JudgeColumn, pairs: Pairs, boot: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per category in order of appearance, and the macro average; nothing where no pair has a category."""
    categories = rows.categories_of(pairs)
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
    for row, corrected in zip(out, multiple_comparisons.holm([row["sign_test_p"] for row in out])):
        row["p_holm"] = corrected
    return [{"judge": judge.name, "system": pairs.system, **row} for row in ([*out, _macro(out)] if out else [])]


def _macro(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every category has the same weight, whatever its size; categories share no prompts."""
    judged = [row for row in rows if not math.isnan(row["win_rate"])]
    rate, low, high, difference = (
        np.array([row[k] for row in judged] or [np.nan]) for k in ("win_rate", "low", "high", "difference")
    )
    mean, low_end, high_end = multiple_comparisons.macro_average(rate, low, high)
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


# ------------------------------------------------------------------------------------------------ more than two systems


def ranking(rows: ScoreRows, judges: Sequence[JudgeColumn], paired: Sequence[Pairs], boot: Mapping[str, Any]) -> pd.DataFrame:
    """Bradley-Terry strengths and ranks by judge; no rows where there are only two systems."""
    return _frame([row for j in judges for row in _ranks(rows, j, boot)] if len(paired) > 1 else [], _RANKING_COLUMNS)


def _ranks(rows: ScoreRows, judge: JudgeColumn, boot: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Strengths of all systems from all their pairs, strongest first; intervals from the prompts drawn anew."""
    wins = _wins_by_prompt(rows, judge)  # [G, S, S]
    if len(wins) == 0:
        return []
    found = multiple_comparisons.rank_systems(wins, **boot)
    total = wins.sum(axis=0)
    return [
        {
            "judge": judge.name,
            "system": rows.systems[s],
            "rank": int(found.rank[s]),
            "rank_low": int(found.rank_low[s]),
            "rank_high": int(found.rank_high[s]),
            "first": float(found.first[s]),
            "strength": float(found.strength[s]),
            "low": float(found.low[s]),
            "high": float(found.high[s]),
            "elo": float(1000 + 400 / math.log(10) * found.strength[s]),
            "games": round((total[s] + total[:, s]).sum()),
        }
        for s in np.argsort(found.rank, kind="stable")
    ]


def _wins_by_prompt(rows: ScoreRows, judge: JudgeColumn) -> np.ndarray:
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


# ------------------------------------------------------------------------------- agreement of the judges, and the pairs


def correlations(rows: ScoreRows, judges: Sequence[JudgeColumn], paired: Sequence[Pairs]) -> pd.DataFrame:
    import pandas as pd

    a, b = np.concatenate([p.a for p in paired]), np.concatenate([p.b for p in paired])
    better = {judge.name: judge.sign * rows.scores[judge.name] for judge in judges}
    over = {"differences": {name: x[b] - x[a] for name, x in better.items()}, "scores": better}
    frames = {name: pd.DataFrame(x).corr(method="spearman", min_periods=3) for name, x in over.items()}
    return pd.concat(frames, names=["over", "judge"])


def pairs_frame(rows: ScoreRows, judges: Sequence[JudgeColumn], paired: Sequence[Pairs]) -> pd.DataFrame:
    import pandas as pd

    def frame(pairs: Pairs) -> pd.DataFrame:
        of = rows.columns
        values = {
            "system": [pairs.system] * len(pairs.a),
            **{key: of[key][pairs.a] for key in ("prompt_id", "sample", "prompt")},
            "category": rows.categories_of(pairs),
            "baseline_picture": of["picture"][pairs.a],
            "picture": of["picture"][pairs.b],
        }
        differences = {j.name: rows.scores[j.name][pairs.b] - rows.scores[j.name][pairs.a] for j in judges}
        return pd.DataFrame({**values, **differences}).infer_objects()

    return pd.concat([frame(pairs) for pairs in paired], ignore_index=True)


def _frame(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(list(rows), columns=None if columns is None else list(columns))
