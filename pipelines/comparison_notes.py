"""Notes on a comparison: what its reader should know before believing the numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.comparison_numbers import MACRO
from pipelines.comparison_table import JudgeColumn, Pairs, ScoreRows
from pipelines.counterparts import name_of
from pipelines.text_tables import count

if TYPE_CHECKING:
    import pandas as pd

FEW_PROMPTS = 50
MANY_TIES = 0.05
"""A judge that ties on a larger share of pairs is named in the notes."""


def notes_on(
    rows: ScoreRows, judges: Sequence[JudgeColumn], paired: Sequence[Pairs], win_rates: pd.DataFrame, by_category: pd.DataFrame
) -> list[str]:
    """All notes on a comparison, a sentence or two each."""
    return [
        *_notes_on_pairing(rows, paired),
        *(note for row in win_rates.to_dict("records") for note in _notes_on_scores(row)),
        *_notes_on_judges(judges),
        *_notes_on_categories(rows, paired, by_category),
    ]


def rough(prompts: int) -> str:
    """A warning about intervals over few prompts; empty where there are enough."""
    return f"below {FEW_PROMPTS} the intervals are rough" if prompts < FEW_PROMPTS else ""


def _notes_on_pairing(rows: ScoreRows, paired: Sequence[Pairs]) -> list[str]:
    notes = []
    for p in paired:
        prompts = len(set(rows.prompt[p.a]))
        if few := rough(prompts):
            notes.append(f"{p.system}: {count(prompts, 'prompt')} in common with {p.baseline}; {few}.")
        if p.alone or p.baseline_alone:
            notes.append(
                f"{p.system}: {count(p.alone, 'picture')} without partner in {p.baseline}, and {p.baseline_alone} of "
                f"{p.baseline} without partner in {p.system}, are left out; {count(len(p.a), 'pair')} remain."
            )
        by_order = _paired_by_order(rows, p)
        if by_order:
            notes.append(
                f"{p.system}: {by_order} of {count(len(p.a), 'pair')} share neither seed nor name; they are paired by their "
                "order, in which numbers in names count as numbers."
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


def _paired_by_order(rows: ScoreRows, p: Pairs) -> int:
    """Pairs that the prompt alone does not make, as there are several pictures of it or it is not known, nor seed or name."""
    system, picture, seed, text = (rows.columns[key] for key in ("system", "picture", "seed", "prompt"))
    of_prompt = Counter(zip(system, rows.prompt))

    def single(i: int) -> bool:
        return bool(text[i]) and of_prompt[system[i], rows.prompt[i]] == 1

    def akin(i: int, j: int) -> bool:
        names = name_of(picture[i]), name_of(picture[j])
        return None in names or names[0] == names[1] or (seed[i] is not None and seed[i] == seed[j])

    return sum(not (single(i) and single(j)) and not akin(i, j) for i, j in zip(p.a, p.b))


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


def _notes_on_judges(judges: Sequence[JudgeColumn]) -> list[str]:
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


def _notes_on_categories(rows: ScoreRows, paired: Sequence[Pairs], by_category: pd.DataFrame) -> list[str]:
    if by_category.empty:
        return []
    notes = []
    for p in paired:
        without = sum(c is None for c in rows.categories_of(p))
        if without:
            notes.append(f"{p.system}: {count(without, 'pair')} without a category, in the totals only.")
    some = by_category[(by_category["judge"] == by_category["judge"].iloc[0]) & (by_category["category"] != MACRO)]
    few = sorted(set(some.loc[some["prompts"] < FEW_PROMPTS, "category"]))
    if few:
        of = some["category"].nunique()
        notes.append(f"{len(few)} of {of} categories have fewer than {FEW_PROMPTS} prompts; their intervals are rough.")
    return notes
