"""Reading and checking a table of scores, and pairing its pictures: the input of every number of a comparison.

Pictures of two systems are paired by ``prompt_id`` and ``sample``, their number among the pictures of that prompt; in tables of
``scoring`` these are equal where the pictures' seeds, names or order say that they belong together (``counterparts``).

Shapes: M = rows of the table, K = different (prompt, sample), S = systems, N = pairs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import reward_models
from diffalign.errors import UserError, did_you_mean
from reward_models.base import JudgeError

if TYPE_CHECKING:
    import pandas as pd

KEYS = ("system", "picture", "prompt_id", "prompt", "category", "sample", "seed")
"""Columns of a table that are not scores; ``seed`` may be absent."""

_NEEDED = ("system", "prompt_id", "sample")
_INDEX = "Unnamed: "  # what pandas calls the index that to_csv wrote


@dataclass(frozen=True)
class JudgeColumn:
    """A judge whose scores are a column of the table, and how that column is to be read."""

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
class ScoreRows:
    """The checked table as arrays."""

    systems: list[str]
    grid: np.ndarray  # [K, S] row of the table, -1 where a system has no such picture
    prompt: np.ndarray  # [M] number of the prompt; equal texts are one prompt
    category: np.ndarray  # [M] of str or None
    columns: Mapping[str, np.ndarray]  # [M] each, those of ``KEYS``
    scores: Mapping[str, np.ndarray]  # [M] each

    def categories_of(self, pairs: Pairs) -> np.ndarray:
        """Category of each pair [N], taken from whichever of its pictures has one."""
        a, b = self.category[pairs.a], self.category[pairs.b]
        return np.where(a == None, b, a)  # noqa: E711  element by element


@dataclass(frozen=True)
class Pairs:
    """Rows [N] of the baseline's pictures and of a system's, in order of prompts and samples."""

    system: str
    baseline: str
    a: np.ndarray
    b: np.ndarray
    alone: int
    """Pictures of the system without partner."""
    baseline_alone: int


def judges_of(table: pd.DataFrame, wanted: str | Sequence[str] | None, by: str | None, tie_tolerance: Any) -> list[JudgeColumn]:
    """The judges that are ``wanted``, or all. Raises ``UserError`` where the table has no such scores."""
    from pandas.api import types

    if not hasattr(table, "columns"):
        what = f"{table!r}" if isinstance(table, (str, os.PathLike)) else f"a {type(table).__name__}"
        raise UserError(f"What is compared is a table of scores, as scoring.read_table(FILE) or score_table give it; got {what}.")
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
        one_of(name, there, "judge")
    try:
        reward_models.check_together(names)
    except JudgeError as error:
        raise UserError(str(error)) from error
    tolerances = tie_tolerance if isinstance(tie_tolerance, Mapping) else dict.fromkeys(names, tie_tolerance)
    for name, tolerance in tolerances.items():
        one_of(name, names, "judge")
        if not tolerance >= 0:
            raise UserError(f"tie_tolerance must be zero or more; got {tolerance}.")
    return [_judge(name, table.attrs.get("judges", {}).get(name), float(tolerances.get(name, 0.0))) for name in names]


def _judge(name: str, facts: Mapping[str, Any] | None, tie_tolerance: float) -> JudgeColumn:
    known = facts or {}
    return JudgeColumn(
        name, bool(known.get("higher_is_better", True)), known.get("sharpness"), tie_tolerance, "higher_is_better" in known
    )


def one_of(name: str, known: Sequence[str], what: str) -> str:
    """The name, if it is known. Raises ``UserError`` that names the nearest ones."""
    if name not in known:
        raise UserError(
            f"The table has no {what} {name!r}.{did_you_mean(str(name), known, n=3, cutoff=0.5)} It has {', '.join(known)}."
        )
    return name


def read(table: pd.DataFrame, judges: Sequence[JudgeColumn], by: str | None) -> ScoreRows:
    """The table as arrays. Raises ``UserError`` for two rows of the same picture, or fewer than two systems."""
    missing = [c for c in _NEEDED if c not in table.columns]
    if missing:
        raise UserError(f"The table lacks the column {', '.join(missing)}; its columns are {', '.join(map(str, table.columns))}.")
    for column in _NEEDED:
        if table[column].isna().any():
            raise UserError(f"The column {column!r} is empty in {int(table[column].isna().sum())} rows; pictures pair by it.")
    if by is not None and by not in table.columns and by != "category":
        one_of(by, [str(c) for c in table.columns], "column")
    systems = [str(s) for s in table["system"].unique()]
    if len(systems) < 2:
        raise UserError(f"The table holds {len(systems)} system{'' if systems else 's'}; a comparison needs two or more.")
    _refuse_doubles(table)
    # numbered in order, so that the order of the rows does not matter to the bootstrap
    key = table.groupby(["prompt_id", "sample"], sort=True).ngroup().to_numpy()
    grid = np.full((key.max() + 1, len(systems)), -1)
    grid[key, [systems.index(str(s)) for s in table["system"]]] = np.arange(len(table))
    columns = {c: _objects(table, c) for c in KEYS}
    return ScoreRows(
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


def pair_up(rows: ScoreRows, baseline: str, system: str) -> Pairs:
    """Pictures with a partner.

    Raises:
        UserError: no picture has one, or partners were made from different prompts.
    """
    a, b = (rows.grid[:, rows.systems.index(name)] for name in (baseline, system))
    both = (a >= 0) & (b >= 0)
    if not both.any():
        raise UserError(
            f"{baseline!r} and {system!r} have nothing in common: no picture of one has the prompt_id and the sample of "
            f"one of the other. {baseline!r} has {_example(rows, a)}, {system!r} has {_example(rows, b)}."
        )
    pairs = Pairs(system, baseline, a[both], b[both], int((b >= 0).sum() - both.sum()), int((a >= 0).sum() - both.sum()))
    texts = rows.columns["prompt"]
    for i, j in zip(pairs.a, pairs.b):
        if texts[i] and texts[j] and texts[i] != texts[j]:
            raise UserError(
                f"prompt_id {rows.columns['prompt_id'][i]} is {texts[i]!r} in {baseline!r} and {texts[j]!r} in {system!r}; "
                "pictures can be paired only if both systems number the same prompts alike."
            )
    return pairs


def _example(rows: ScoreRows, of_system: np.ndarray) -> str:
    row = of_system[of_system >= 0][0]
    without = "" if rows.columns["prompt"][row] else " (without a prompt)"
    return f"prompt_id {rows.columns['prompt_id'][row]}, sample {rows.columns['sample'][row]}{without}"
