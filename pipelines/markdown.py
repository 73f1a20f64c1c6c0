"""A comparison in words: its title, its headline and its tables, which are shown as Markdown and as HTML with the same cells."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipelines.text_tables import Table, count, interval, p_value, percent

if TYPE_CHECKING:
    from pipelines.comparison import Comparison


def title(c: Comparison) -> str:
    """The systems and the baseline."""
    return f"{', '.join(c.systems[1:])} against {c.baseline}"


def headline(c: Comparison) -> str:
    """The numbers of pairs and prompts, and the settings of the bootstrap."""
    known = c.provenance
    sizes = [f"{s}: {count(known['pairs'][s], 'pair')} of {count(known['prompts'][s], 'prompt')}" for s in c.systems[1:]]
    return (
        f"{'; '.join(sizes)}. Intervals are {_level(c)} bootstraps over prompts ({known['n_boot']} replicates, seed "
        f"{known['seed']}); ± is half their width."
    )


def _level(c: Comparison) -> str:
    return f"{100 * c.level:g} %"


def tables(c: Comparison) -> list[Table]:
    """All tables of a comparison, the win rates first."""
    return [_wins_table(c), _scores_table(c), _means_table(c), *_category_tables(c), *_ranking_table(c), *_agreement_tables(c)]


def _wins_table(c: Comparison) -> Table:
    probable = c.win_rates["preference"].notna().any()
    headings = ["judge", "system", "win rate", f"interval ({_level(c)})", "won / tied / lost", "sign test p"]
    rows = []
    for r in c.win_rates.to_dict("records"):
        cells = [c.label(r["judge"]), r["system"], _rate(r), interval(r["low"], r["high"], percent)]
        cells += [f"{r['wins']} / {r['ties']} / {r['losses']}", _p(r["sign_test_p"])]
        rows.append(cells + ([_preferred(r)] if probable else []))
    remark = "A tie counts as half a win. The sign test counts each prompt once; its p values are not corrected for the rows."
    if probable:
        headings.append("judge's own preference")
        remark += (
            " Last column: the mean probability with which a judge's own model prefers the system's picture, where it states one."
        )
    return Table("Win rates", headings, rows, remark)


def _rate(row: Mapping[str, Any]) -> str:
    """The win rate as a percentage, with the half-width of its interval in percentage points."""
    return percent(math.nan) if math.isnan(row["win_rate"]) else f"{percent(row['win_rate'])} ± {100 * row['half_width']:.1f}"


def _preferred(row: Mapping[str, Any]) -> str:
    if math.isnan(row["preference"]):
        return ""
    half = 50 * (row["preference_high"] - row["preference_low"])
    return f"{percent(row['preference'])} ± {'-' if math.isnan(half) else f'{half:.1f}'}"


def _p(p: float) -> str:
    return "" if math.isnan(p) else p_value(p)


def _scores_table(c: Comparison) -> Table:
    rows = [
        [
            c.label(r["judge"]),
            r["system"],
            _estimate(r["difference"], r["difference_low"], r["difference_high"]),
            "" if math.isnan(r["effect_size"]) else f"{r['effect_size']:.2f}",
            _p(r["wilcoxon_p"]),
        ]
        for r in c.win_rates.to_dict("records")
    ]
    headings = ("judge", "system", f"system - {c.baseline} ({_level(c)})", "d_z", "Wilcoxon p")
    remark = "d_z: mean difference over its standard deviation; Wilcoxon's test is that of signed ranks; both over prompts."
    return Table("Paired differences of scores", headings, rows, remark)


def _means_table(c: Comparison) -> Table:
    at = {(r["system"], r["judge"]): _estimate(r["mean"], r["low"], r["high"]) for r in c.means.to_dict("records")}
    rows = [[system, *(at[system, judge] for judge in c.judges)] for system in c.systems]
    return Table("Mean scores", ("system", *(c.label(judge) for judge in c.judges)), rows)


def _estimate(mean: float, low: float, high: float) -> str:
    """A number and its interval, with two digits of what is uncertain."""
    if math.isnan(mean):
        return "not judged"
    if math.isnan(low) or math.isnan(high):
        return f"{mean:.5g} (-)"
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"{mean:g}"
    half = 0.5 * (high - low) or abs(mean) / 1000
    decimals = min(12, max(0, 1 - math.floor(math.log10(half)))) if half > 0 else 0
    return f"{mean:.{decimals}f} ({low:.{decimals}f} to {high:.{decimals}f})"


def _category_tables(c: Comparison) -> list[Table]:
    """A table per system with a column for each judge: twelve categories by six judges have to fit a page."""
    tables = []
    for system in c.systems[1:]:
        some = c.by_category[c.by_category["system"] == system]
        if some.empty:
            continue
        at = {(r["category"], r["judge"]): r for r in some.to_dict("records")}
        rows = []
        for category in some["category"].unique():
            across = [at[category, judge] for judge in c.judges]
            p = [f", p {_p(r['p_holm'])}" if _p(r["p_holm"]) else "" for r in across]
            prompts = max(r["prompts"] for r in across)
            rows.append([category, str(prompts), *(_rate(r) + told for r, told in zip(across, p))])
        remark = (
            "p: sign test, corrected for the number of categories by Holm's method, each judge for itself. "
            "The macro average gives every category the same weight."
        )
        headings = ("category", "prompts", *(c.label(judge) for judge in c.judges))
        tables.append(Table(f"Win rates of {system} by {c.provenance['by']}", headings, rows, remark))
    return tables


def _ranking_table(c: Comparison) -> list[Table]:
    rows = [
        [
            c.label(r["judge"]),
            str(r["rank"]),
            r["system"],
            f"{r['strength']:.2f} ({interval(r['low'], r['high'], '{:.2f}'.format)})",
            f"{r['elo']:.0f}",
            f"{r['rank_low']} to {r['rank_high']}",
            percent(r["first"]),
        ]
        for r in c.ranking.to_dict("records")
    ]
    level = f"({_level(c)})"
    headings = ("judge", "rank", "system", f"strength {level}", "Elo", f"ranks {level}", "ranked first")
    remark = (
        "Bradley-Terry strengths from the pairs of all systems, in log-odds with mean 0; one tie is added between every two. "
        "Ranks and intervals: prompts drawn anew."
    )
    return [Table("Ranking", headings, rows, remark)] if rows else []


def _agreement_tables(c: Comparison) -> list[Table]:
    if len(c.judges) < 2:
        return []
    remarks = {
        "differences": "Over pairs: do two judges see the same pictures gain?",
        "scores": "Over all pictures of all prompts: judges that merely find the same prompts easy agree here too.",
    }
    tables = []
    for over, remark in remarks.items():
        frame = c.correlations.loc[over]
        cells = [[a, *("" if math.isnan(x) else f"{x:.2f}" for x in frame.loc[a])] for a in c.judges]
        tables.append(Table(f"Agreement of judges: Spearman's correlation of {over}", ("judge", *c.judges), cells, remark))
    return tables
