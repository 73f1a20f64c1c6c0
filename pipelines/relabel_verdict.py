"""Decisions from the scores of a pair: whether it stays, its label, and the columns that are added to its row.

Columns that are added for a judge J, where F and S stand for the data's first and second picture (0 and 1 in Pick-a-Pic,
``chosen`` and ``rejected`` elsewhere):

    J_F, J_S        the scores; empty where the picture cannot be read
    J_margin        score of the human's winner minus the loser's, negative where J prefers the loser; empty for the human's ties
    J_conflict      whether J prefers the human's loser
    J_lower_is_better   true in every row, only for judges whose lower scores are better; readers of the scores negate them
    J_probability   probability that the first picture is preferred, as ``label`` has it; for judges whose scores give one
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diffalign.data.table import LOWER, PairTable, StoredPair
from diffalign.errors import UserError
from pipelines.relabel_scores import known
from reward_models.base import JudgeError

if TYPE_CHECKING:
    from reward_models._judge import Scorer

LABELS = ("human", "flip", "soft")
"""Kinds of labels: the human's; reversed where the first judge disagrees; the first judge's probability."""
HUMAN = "human_label"
"""The column that keeps the human's label where another one replaces it."""


@dataclass
class JudgedPair:
    """A row, the files of its two pictures and what judges gave them, in the order of the data."""

    stored: StoredPair
    content: list[bytes | None]  # None where there is no such file
    scores: dict[str, tuple[float, float]] = field(default_factory=dict)  # by judge; NaN where there is none

    @property
    def prompt(self) -> str:
        return self.stored.pair.prompt

    @property
    def human(self) -> float:
        """The probability that the first picture is preferred."""
        return self.stored.probability

    @property
    def tie(self) -> bool:
        return self.human == 0.5

    def by_preference(self, judge: str) -> tuple[float, float]:
        """Scores of the human's winner and loser; of a tie, of the first and the second."""
        first, second = self.scores[judge]
        return (first, second) if self.human >= 0.5 else (second, first)


def check_columns(table: PairTable, judges: Iterable[str], labels: str) -> None:
    """Raises ``UserError`` where a column that would be added is there already."""
    present, where = table.rows.columns, table.rows.description
    if labels != "human" and HUMAN in present:
        raise UserError(f"{where} has a column {HUMAN} already: its labels are not the human's any more. Relabel the original.")
    for judge in judges:
        for column in (
            *table.score_columns(judge),
            *(f"{judge}_{what}" for what in ("margin", "conflict", "probability", LOWER)),
        ):
            if column in present:
                raise UserError(
                    f"{where} has a column {column} already. Call the judge something else, as in --judges again={judge}."
                )


def _check_probabilities(judge: Scorer) -> None:
    """Raises ``UserError``, saying why, where scores of ``judge`` give no probability."""
    try:
        judge.check_preference()
    except JudgeError as error:
        raise UserError(
            f"--labels soft: the labels are probabilities, and {error}. Use --labels flip, or name a judge such as pickscore or "
            f"hps-v2.1 first."
        ) from error


@dataclass(frozen=True)
class Verdict:
    """The requested treatment of pairs, decided by the first judge.

    Raises ``UserError`` for wishes that make no sense together.
    """

    table: PairTable
    judges: Mapping[str, Scorer]
    labels: str
    drop_conflicts: bool
    min_margin: float

    def __post_init__(self) -> None:
        if not self.judges:
            raise UserError("To judge data again needs at least one judge; got none.")
        if self.labels not in LABELS:
            raise UserError(f"labels is one of {', '.join(LABELS)}; got {self.labels!r}.")
        if self.labels == "flip" and self.drop_conflicts:
            raise UserError(
                "Labels that conflict are either turned round (--labels flip) or dropped (--drop-conflicts); got both."
            )
        if not (math.isfinite(self.min_margin) and self.min_margin >= 0):
            raise UserError(f"The smallest margin is a number, at least 0; got {self.min_margin}.")
        if self.labels == "soft":
            _check_probabilities(self.judges[self.first])

    @property
    def first(self) -> str:
        return next(iter(self.judges))

    def margin(self, judge: str, pair: JudgedPair) -> float:
        """Score of the human's winner (of the first picture, in a tie) minus the other's; NaN where a score is."""
        winner, loser = pair.by_preference(judge)
        ahead = 0.0 if winner == loser else winner - loser  # equal infinities are no difference
        return ahead if self.judges[judge].info.higher_is_better else -ahead

    def probability(self, judge: str, pair: JudgedPair) -> float:
        """Probability that the first picture is preferred; NaN where a score is."""
        import torch

        first, second = torch.tensor(pair.scores[judge], dtype=torch.float64)
        return float(self.judges[judge].preference(first, second))

    def reason_to_drop(self, pair: JudgedPair) -> str | None:
        margin = self.margin(self.first, pair)
        if self.drop_conflicts and not pair.tie and margin < 0:
            return "conflicts"
        if self.min_margin and math.isnan(margin):
            return "not judged"
        return "too close" if abs(margin) < self.min_margin else None

    def label(self, pair: JudgedPair) -> float:
        """The label to write; the human's where the first judge has no opinion."""
        if self.labels == "soft":
            chance = self.probability(self.first, pair)
            return pair.human if math.isnan(chance) else chance
        turned = self.labels == "flip" and self.margin(self.first, pair) < 0
        return 1.0 - pair.human if turned else pair.human

    def scored(self, pair: JudgedPair) -> dict[str, Any]:
        """The cells that judges add."""
        cells: dict[str, Any] = {}
        for name, judge in self.judges.items():
            margin = None if pair.tie else known(self.margin(name, pair))
            cells |= zip(self.table.score_columns(name), map(known, pair.scores[name]), strict=True)
            cells |= {f"{name}_margin": margin, f"{name}_conflict": None if margin is None else margin < 0}
            if not judge.info.higher_is_better:
                cells[f"{name}_{LOWER}"] = True
            if judge.sharpness is not None:
                cells[f"{name}_probability"] = known(self.probability(name, pair))
        return cells

    def labelled(self, human: float, label: float) -> dict[str, float]:
        """The cells that change with the label, as far as labels may change at all."""
        if self.labels == "human":
            return {}
        return {HUMAN: human, **dict(zip(self.table.label_columns, (label, 1.0 - label)))}

    def columns(self) -> dict[str, str]:
        """The columns that are added or replaced, and what they hold: "score", "flag" or "probability"."""
        added = {}
        for name, judge in self.judges.items():
            first, second = self.table.score_columns(name)
            added |= {first: "score", second: "score", f"{name}_margin": "score", f"{name}_conflict": "flag"}
            added |= {f"{name}_probability": "probability"} if judge.sharpness is not None else {}
            added |= {} if judge.info.higher_is_better else {f"{name}_{LOWER}": "flag"}
        if self.labels != "human":
            added |= dict.fromkeys((HUMAN, *self.table.label_columns), "probability")
        return added

    def provenance(self) -> dict[str, Any]:
        """Record of the judges and settings behind the numbers, for whoever finds the file in a year."""
        wishes = {"labels": self.labels, "drop_conflicts": self.drop_conflicts, "min_margin": self.min_margin}
        judges = {name: judge.provenance() for name, judge in self.judges.items()}
        return {"relabelled": self.table.fingerprint, **wishes, "judges": judges}
