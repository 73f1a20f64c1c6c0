"""Relabelling of a preference data set: each judge's scores of both pictures beside the human's label.

People's choices are noisy, and a model trained on them learns the noise, too. Against that, pairs on which a judge disagrees, or
sees little difference, are left out, or the judge's own probability replaces the label. (SmPO, arXiv
2506.02698, makes soft labels from PickScore on a flatter scale; the scores that are written here allow for that, too.) The first
judge decides; the scores of the others are only written.

``relabel_verdict`` derives labels and columns from the scores, ``relabel_files`` writes them, ``relabel_report`` reports on them;
``relabel_top`` writes the best pictures instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.data.pairs import Progress, RowProblem, UnreadableImage
from diffalign.data.table import PairTable, StoredPair
from diffalign.errors import UserError
from pipelines.relabel_files import ENDINGS, PictureCell, TableWriter, is_parquet
from pipelines.relabel_report import JudgeAgreement, Relabelled, agreement
from pipelines.relabel_scores import BATCHES_AT_ONCE, check_scorers, key, opened, parts, reason_without, score_shown
from pipelines.relabel_verdict import JudgedPair, Verdict, check_columns

if TYPE_CHECKING:
    from reward_models._judge import Scorer
    from reward_models._scoring import CacheLike


def check_request(
    table: PairTable,
    judges: Sequence[str],
    out: str | Path,
    *,
    data: str | Path | None = None,
    labels: str = "human",
    overwrite: bool = False,
) -> Path:
    """Check a request before judges are loaded; returns the output file. ``data`` is what the table was opened from.

    Raises:
        UserError: the output is there already, would become part of the data or cannot hold it; a column is there already;
            there are no pairs.
    """
    if table.kind == "pictures":
        raise UserError(
            f"{table.description}: a single picture has no other one to be preferred to, so there is nothing to relabel. "
            "What is possible: --top K writes the K best of them by a judge, with their scores; with a large K, all of them."
        )
    check_columns(table, judges, labels)
    return check_output(table, out, data=data, overwrite=overwrite)


def check_output(table: PairTable, out: str | Path, *, data: str | Path | None, overwrite: bool) -> Path:
    """The output file, if it can be written. Raises ``UserError``."""
    out, place = Path(out).expanduser(), Path(data or "").expanduser()
    if out.suffix.lower() not in ENDINGS:
        raise UserError(f"--out {out}: the ending says how the data are written; it is one of {', '.join(ENDINGS)}.")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; it should be a file.")
    if data is not None and out.resolve() == place.resolve():
        raise UserError(f"--out {out} is the data that are read; name another file.")
    if data is not None and place.is_dir() and is_parquet(out) and out.resolve().is_relative_to(place.resolve()):
        raise UserError(f"--out {out} lies in {place} and would be taken for a part of it from then on; name a file elsewhere.")
    if out.exists() and not overwrite:
        raise UserError(f"--out {out} exists. Name another file, or add --overwrite to replace it.")
    if not is_parquet(out) and _holds_pictures(table):
        raise UserError(f"--out {out}: the pictures are inside of {table.description}, but a list holds paths; use .parquet.")
    return out


def _holds_pictures(table: PairTable) -> bool:
    for i in range(len(table)):
        try:
            return table[i].winner.data is not None
        except RowProblem:
            continue
    return False


def relabel(
    table: PairTable,
    judges: Mapping[str, Scorer],
    out: str | Path,
    *,
    labels: str = "human",
    drop_conflicts: bool = False,
    min_margin: float = 0.0,
    batch_size: int = 16,
    cache: CacheLike = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Relabelled:
    """Judge every pair and write the data with the judges' columns; what these are, ``relabel_verdict`` says.

    Args:
        table: the pairs, from ``open_pairs``.
        judges: by the names that their columns begin with; the first decides.
        out: ``.parquet`` with the pictures inside, or a list with paths, ``.jsonl``, ``.csv`` or ``.tsv``; whole or not at all.
        labels: one of ``relabel_verdict.LABELS``.
        drop_conflicts: leave out pairs of which the first judge prefers the picture that the human did not.
        min_margin: leave out pairs whose pictures the first judge sees closer together than this, and those it cannot judge.
        cache: where scores are remembered; True for the user's own. What an interrupted run had done is found there.

    Raises:
        UserError: a request that cannot be met (see ``check_request``), a prompt that a judge cannot judge by, no pair left.
    """
    check_scorers(judges)
    out = check_request(table, list(judges), out, labels=labels, overwrite=overwrite)
    verdict = Verdict(table, judges, labels, drop_conflicts, min_margin)
    work = _Work(verdict)
    pairs = max(BATCHES_AT_ONCE * batch_size // 2, 1)
    with opened(cache) as known, TableWriter(out, table, verdict.columns(), verdict.provenance) as writer:
        for numbers, share in parts(len(table), pairs, progress):
            judged = work.judge(numbers, share, batch_size=batch_size, cache=known)
            writer.write(list(work.rows(judged)))
        if work.written == 0:
            raise UserError(f"No pair of {len(table)} is left: {work.why_none()}. Nothing was written.")
    return work.report(out)


class _Work:
    """Judging, part by part, and the tally of it."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict, self.table, self.judges = verdict, verdict.table, verdict.judges
        self.written = 0
        self._scores: dict[bytes, tuple[float, ...]] = {}
        """Scores of each judge, by the key of picture and prompt."""
        self._unreadable: list[tuple[str, str]] = []
        self._unusable: list[tuple[str, str]] = []
        self._dropped = {"conflicts": 0, "too close": 0, "not judged": 0}
        self._prompts: list[str] = []
        self._ties: list[bool] = []
        self._by_preference: dict[str, list[tuple[float, float]]] = {name: [] for name in self.judges}
        self._changed = 0

    def judge(self, numbers: range, progress: Callable[[int, int], None] | bool, **how: Any) -> list[JudgedPair]:
        """These pairs with their scores; a picture that has been seen with its prompt is not judged again."""
        pairs = [pair for number in numbers if (pair := self._read(number)) is not None]
        shown = {key(c, pair.prompt): (c, pair.prompt) for pair in pairs for c in pair.content if c is not None}
        new = {seen: both for seen, both in shown.items() if seen not in self._scores}
        scores = score_shown(self.judges, list(new.values()), self.table.rows.description, progress, **how)
        self._scores.update(zip(new, scores, strict=True))
        for pair in pairs:
            sides = [self._of_side(pair, side) for side in (0, 1)]
            pair.scores = dict(zip(self.judges, zip(*sides, strict=True), strict=True))
        return pairs

    def _read(self, number: int) -> JudgedPair | None:
        try:
            stored = self.table.stored(number)
        except RowProblem as problem:
            place = f"{problem.origin} ({problem.side})" if problem.side else problem.origin
            self._unusable.append((place, problem.reason))
            return None
        return JudgedPair(stored, [self._content(stored, side) for side in (0, 1)])

    def _content(self, stored: StoredPair, side: int) -> bytes | None:
        try:
            return stored.images[side].read_bytes()
        except UnreadableImage as error:
            self._tell(stored, side, str(error))
            return None

    def _tell(self, stored: StoredPair, side: int, reason: str) -> None:
        self._unreadable.append((f"{stored.pair.origin} ({self.table.image_columns[side]})", reason))

    def _of_side(self, pair: JudgedPair, side: int) -> tuple[float, ...]:
        """Scores of a picture by each judge; NaN, and a line in the report, where it cannot be read."""
        content = pair.content[side]
        scores = (math.nan,) * len(self.judges) if content is None else self._scores[key(content, pair.prompt)]
        if content is not None and all(map(math.isnan, scores)):
            self._tell(pair.stored, side, reason_without(pair.stored.images[side]))
        return scores

    # ----------------------------------------------------------------------------------------------------------------- rows

    def rows(self, pairs: Sequence[JudgedPair]) -> Iterator[dict[str, Any]]:
        """The rows to write, with pictures as ``PictureCell``; dropped pairs are only counted."""
        for pair in pairs:
            self._prompts.append(pair.prompt)
            self._ties.append(pair.tie)
            for name, sides in self._by_preference.items():
                sides.append(pair.by_preference(name))
            if (reason := self.verdict.reason_to_drop(pair)) is not None:
                self._dropped[reason] += 1
                continue
            self.written += 1
            pictures = map(PictureCell, pair.stored.images, pair.content)
            label = self.verdict.label(pair)
            self._changed += label != pair.human
            yield {
                **pair.stored.cells,
                **dict(zip(self.table.image_columns, pictures, strict=True)),
                **self.verdict.scored(pair),
                **self.verdict.labelled(pair.human, label),
            }

    # --------------------------------------------------------------------------------------------------------------- report

    def why_none(self) -> str:
        told = [f"{n} {reason}" for reason, n in self._dropped.items() if n]
        return ", ".join(told + ([f"{len(self._unusable)} cannot be used"] if self._unusable else []))

    def report(self, out: Path) -> Relabelled:
        return Relabelled(
            out=out,
            description=self.table.description,
            pairs=len(self._prompts),
            ties=sum(self._ties),
            agreements=tuple(self._agreement(name) for name in self.judges),
            unreadable=tuple(self._unreadable),
            unusable=tuple(self._unusable),
            dropped=dict(self._dropped),
            changed=self._changed,
        )

    def _agreement(self, name: str) -> JudgeAgreement:
        import numpy as np

        sign = 1.0 if self.judges[name].info.higher_is_better else -1.0
        return agreement(name, sign * np.array(self._by_preference[name]), self._ties, self._prompts)
