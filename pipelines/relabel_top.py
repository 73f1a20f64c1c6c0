"""The best pictures of a data set by a judge, as a data set of single pictures: experts to learn from.

Diffusion-DRO (arXiv 2510.18353) takes its experts so: every different picture of Pick-a-Pic is scored with its prompt by HPSv2 or
PickScore, and the 500 best are kept. What people preferred plays no part.

Columns: ``prompt``, ``image``, ``score`` (the deciding judge's), ``J_score`` of every judge J, and ``origin``, the place of the
picture in the data; the best first.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.data.pairs import Progress, RowProblem, UnreadableImage
from diffalign.data.table import PairTable, Shown
from diffalign.errors import UserError
from pipelines.relabel import check_output
from pipelines.relabel_files import PictureCell, TableWriter
from pipelines.relabel_report import problem_lines
from pipelines.relabel_scores import BATCHES_AT_ONCE, check_scorers, key, known, opened, parts, reason_without, score_shown

if TYPE_CHECKING:
    from reward_models._judge import Scorer
    from reward_models._scoring import CacheLike


@dataclass(frozen=True)
class Best:
    """The result of choosing the best pictures. ``unreadable`` and ``unusable`` are (place, reason)."""

    out: Path
    description: str
    judge: str
    asked: int
    written: int
    rows: int  # of the data
    different: int  # pictures with their prompts, those without a score among them
    unscored: int  # of them, by this judge
    scores: tuple[float, float]  # of the best and of the last that is written
    unreadable: tuple[tuple[str, str], ...]
    unusable: tuple[tuple[str, str], ...]

    def to_text(self) -> str:
        """The report as a person reads it."""
        found = f"{self.description}: {self.rows} rows, {self.different} different pictures with their prompts"
        without = f", {self.unscored} of them without a score by {self.judge}" if self.unscored else ""
        fewer = f" ({self.asked} were asked for)" if self.written < self.asked else ""
        best, last = self.scores
        wrote = f"{self.out}: the {self.written} best by {self.judge}{fewer}, from {best:.6g} to {last:.6g}"
        return "\n".join([found + without, *problem_lines(self.unreadable, self.unusable), "", wrote])


def check_top(
    table: PairTable,
    judges: Sequence[str],
    out: str | Path,
    k: int,
    *,
    by: str | None = None,
    data: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Check a request before judges are loaded; returns the output file. ``data`` is what the table was opened from.

    Raises:
        UserError: as ``relabel.check_request`` does, and for a judge that is not asked for.
    """
    if not judges:
        raise UserError("To find the best pictures needs at least one judge; got none.")
    if k < 1:
        raise UserError(f"--top {k}: the number of pictures to keep is at least 1.")
    if by is not None and by not in judges:
        raise UserError(f"--by {by}: --judges asks for {', '.join(judges)}; the judge that decides is one of them.")
    return check_output(table, out, data=data, overwrite=overwrite)


def write_best(
    table: PairTable,
    judges: Mapping[str, Scorer],
    out: str | Path,
    k: int,
    *,
    by: str | None = None,
    batch_size: int = 16,
    cache: CacheLike = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Best:
    """Judge every different picture with its prompt, whatever its label, and write the ``k`` best, the best first.

    Args:
        table: the data, from ``open_pairs``: pairs, of which both pictures count, or single pictures.
        judges: by the names that their columns begin with.
        out: ``.parquet`` with the pictures inside, or a list with paths, ``.jsonl``, ``.csv`` or ``.tsv``; whole or not at all.
        k: how many. Those that lie inside the data are held in memory.
        by: the judge that decides; the first if None.
        cache: where scores are remembered; True for the user's own. What an interrupted run had done is found there.

    Raises:
        UserError: a request that cannot be met (see ``check_top``), a prompt that a judge cannot judge by, nothing with a score.
    """
    check_scorers(judges)
    out = check_top(table, list(judges), out, k, by=by, overwrite=overwrite)
    by = by or next(iter(judges))
    search = _Search(table, judges, by, k)
    rows = max(BATCHES_AT_ONCE * batch_size // len(set(table.image_columns)), 1)
    with opened(cache) as remembered:
        for numbers, share in parts(len(table.rows), rows, progress):
            search.judge(numbers, share, batch_size=batch_size, cache=remembered)
    best = search.best()
    if not best:
        problems = [f"{place}: {reason}" for place, reason in (*search.unreadable, *search.unusable)]
        first = f" (the first of {len(problems)} problems: {problems[0]})" if problems else ""
        raise UserError(f"No picture of {table.rows.description} has a score by {by}{first}. Nothing was written.")
    facts = {"best": k, "by": by, "of": table.fingerprint, "judges": {name: judge.provenance() for name, judge in judges.items()}}
    with TableWriter(out, None, _columns(judges), lambda: facts) as writer:
        for candidate in best:
            writer.write([_row(candidate, judges, by)])
    scores = [candidate.by_judge(judges, by) for candidate in (best[0], best[-1])]
    return search.report(out, len(best), (scores[0], scores[1]))


def _columns(judges: Mapping[str, Scorer]) -> dict[str, str]:
    scores = dict.fromkeys((f"{name}_score" for name in judges), "score")
    return {"prompt": "text", "image": "picture", "score": "score", **scores, "origin": "text"}


@dataclass(frozen=True)
class _Candidate:
    shown: Shown
    scores: tuple[float, ...]  # of each judge

    @property
    def place(self) -> str:
        return f"{self.shown.origin} ({self.shown.column})"

    def by_judge(self, judges: Mapping[str, Scorer], by: str) -> float:
        return self.scores[list(judges).index(by)]


def _row(candidate: _Candidate, judges: Mapping[str, Scorer], by: str) -> dict[str, Any]:
    shown = candidate.shown
    cells = {f"{name}_score": known(score) for name, score in zip(judges, candidate.scores, strict=True)}
    picture = PictureCell(shown.image, shown.image.read_bytes())
    score = known(candidate.by_judge(judges, by))
    return {"prompt": shown.prompt, "image": picture, "score": score, **cells, "origin": candidate.place}


@dataclass
class _Search:
    """Part by part through all rows; holds the best so far."""

    table: PairTable
    judges: Mapping[str, Scorer]
    by: str
    k: int
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    unusable: list[tuple[str, str]] = field(default_factory=list)
    _seen: set[bytes] = field(default_factory=set)
    _unscored: int = 0
    _taken: int = 0
    _heap: list[tuple[float, int, _Candidate]] = field(default_factory=list)
    """The worst first: how good, and minus the number of the candidate, so that of equals the first is kept."""

    def judge(self, numbers: range, progress: Any, **how: Any) -> None:
        """Look at these rows; a picture that has been seen with its prompt is not judged again."""
        new = list(self._new(numbers))
        contents = [(content, shown.prompt) for shown, content in new]
        scored = score_shown(self.judges, contents, self.table.rows.description, progress, **how)
        for (shown, _), scores in zip(new, scored, strict=True):
            self._take(_Candidate(shown, scores))

    def _new(self, numbers: range) -> Iterator[tuple[Shown, bytes]]:
        for shown in (shown for number in numbers for shown in self.table.shown(number)):
            if isinstance(shown, RowProblem):
                self.unusable.append((f"{shown.origin} ({shown.side})" if shown.side else shown.origin, shown.reason))
                continue
            try:
                content = shown.image.read_bytes()
            except UnreadableImage as error:
                self.unreadable.append((f"{shown.origin} ({shown.column})", str(error)))
                continue
            if (seen := key(content, shown.prompt)) not in self._seen:
                self._seen.add(seen)
                yield shown, content

    def _take(self, candidate: _Candidate) -> None:
        score = candidate.by_judge(self.judges, self.by)
        if all(map(math.isnan, candidate.scores)):
            self.unreadable.append((candidate.place, reason_without(candidate.shown.image)))
        if not math.isfinite(score):
            self._unscored += 1
            return
        self._taken += 1
        good = score if self.judges[self.by].info.higher_is_better else -score
        heapq.heappush(self._heap, (good, -self._taken, candidate))
        if len(self._heap) > self.k:
            heapq.heappop(self._heap)

    def best(self) -> list[_Candidate]:
        """The best first."""
        return [candidate for _, _, candidate in sorted(self._heap, key=lambda entry: entry[:2], reverse=True)]

    def report(self, out: Path, written: int, scores: tuple[float, float]) -> Best:
        return Best(
            out=out,
            description=self.table.rows.description,
            judge=self.by,
            asked=self.k,
            written=written,
            rows=len(self.table.rows),
            different=len(self._seen),
            unscored=self._unscored,
            scores=scores,
            unreadable=tuple(self.unreadable),
            unusable=tuple(self.unusable),
        )
