"""The report of a relabelling: how often each judge agrees with people, what was written, what was not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.relabel_verdict import HUMAN
from pipelines.text_tables import table_lines

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diffalign.evaluate import WinRate

REPLICATES = 2_000
"""Bootstrap replicates: for the hundred thousand prompts of a real data set, ten thousand take minutes and change nothing."""
LISTED = 10  # of what cannot be used, in the text


@dataclass(frozen=True)
class JudgeAgreement:
    """How often a judge agrees with the human.

    ``quarters``: (margin from, to, pairs, conflicts) of each quarter of the pairs, the closest pairs first.
    """

    judge: str
    judged: int  # pairs with both scores
    rate: WinRate | None  # of the human's winner over the loser by this judge, ties of the human's apart; None without any
    quarters: tuple[tuple[float, float, int, int], ...]


@dataclass(frozen=True)
class Relabelled:
    """The result of a relabelling. ``unreadable`` and ``unusable`` are (place, reason)."""

    out: Path
    description: str
    pairs: int  # that could be used
    ties: int
    agreements: tuple[JudgeAgreement, ...]
    unreadable: tuple[tuple[str, str], ...]  # pictures; their pairs are written without scores
    unusable: tuple[tuple[str, str], ...]  # rows; not written
    dropped: dict[str, int]  # by reason
    changed: int  # labels

    @property
    def written(self) -> int:
        return self.pairs - sum(self.dropped.values())

    def to_text(self) -> str:
        """The report as a person reads it."""
        parts = [
            self.description,
            *problem_lines(self.unreadable, self.unusable),
            "",
            *self._agreement(),
            "",
            *self._quarters(),
            "",
            self._last(),
        ]
        return "\n".join(parts)

    def _agreement(self) -> list[str]:
        headings = ["judge", "judged", "human decided", "agrees", "95 % interval", "conflicts", "judge's ties"]
        return table_lines(headings, [_agreement_row(a) for a in self.agreements])

    def _quarters(self) -> list[str]:
        rows = [
            [a.judge, f"{low:.4g} to {high:.4g}", str(pairs), str(conflicts), f"{conflicts / pairs:.1%}"]
            for a in self.agreements
            for low, high, pairs, conflicts in a.quarters
        ]
        return table_lines(["judge", "apart by", "pairs", "conflicts", "share"], rows) if rows else []

    def _last(self) -> str:
        why = ", ".join(f"{n} {reason}" for reason, n in self.dropped.items() if n)
        changed = f", {self.changed} labels changed (the human's are in {HUMAN})" if self.changed else ""
        return f"{self.out}: {self.written} of {self.pairs} pairs{f' (dropped: {why})' if why else ''}{changed}"


def problem_lines(unreadable: Sequence[tuple[str, str]], unusable: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Lines about the pictures and rows that could not be judged; both arguments are (place, reason)."""
    for title, found in (("Pictures that cannot be read", unreadable), ("Rows that cannot be used", unusable)):
        if found:
            yield f"{title} ({len(found)}):"
            yield from (f"  {place}: {reason}" for place, reason in found[:LISTED])
            yield from [f"  ... and {len(found) - LISTED} more"] if len(found) > LISTED else []


def _agreement_row(a: JudgeAgreement) -> list[str]:
    if (r := a.rate) is None:
        return [a.judge, str(a.judged), "0", *["-"] * 4]
    decided = str(r.wins + r.ties + r.losses)
    return [a.judge, str(a.judged), decided, f"{r.rate:.1%}", f"{r.low:.1%} to {r.high:.1%}", str(r.losses), str(r.ties)]


def agreement(judge: str, scores: NDArray, ties: Sequence[bool], prompts: Sequence[str]) -> JudgeAgreement:
    """Agreement over N pairs: ``scores`` [N, 2] of the human's winner and loser, higher is better; NaN where there is none."""
    import numpy as np

    from diffalign.evaluate import win_rate

    judged = ~np.isnan(scores).any(axis=1)
    counts = ~np.array(ties) & judged
    winner, loser = scores[counts].T
    if len(winner) == 0:
        return JudgeAgreement(judge, int(judged.sum()), None, ())
    groups = [prompt for prompt, counted in zip(prompts, counts, strict=True) if counted]
    rate = win_rate(loser, winner, groups=groups, n_boot=REPLICATES)
    return JudgeAgreement(judge, int(judged.sum()), rate, _quarters(winner - loser))


def _quarters(margins: NDArray) -> tuple[tuple[float, float, int, int], ...]:
    """Quarters of the pairs by margin, as equal in size as equal margins allow."""
    import numpy as np

    apart = np.abs(margins)
    edges = np.quantile(apart, [0.25, 0.5, 0.75])
    place = np.searchsorted(edges, apart, side="left")
    found = []
    for quarter in range(4):
        of, conflicts = apart[place == quarter], margins[place == quarter] < 0
        if len(of):
            found.append((float(of.min()), float(of.max()), len(of), int(conflicts.sum())))
    return tuple(found)
