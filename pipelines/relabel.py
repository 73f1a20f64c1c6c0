"""A preference data set judged again: beside the human's label, what each judge thinks of both pictures.

People are noisy, and a model trained on their choices learns the noise, too. What is done about it: pairs on which a judge
disagrees, or sees little difference, are left out, or the judge's own probability takes the place of the label. (SmPO, arXiv
2506.02698, makes soft labels from PickScore on a flatter scale; the scores that are written here allow for that, too.) The first
judge decides; the others are written down only.

Columns that are added for a judge J, where F and S stand for the data's first and second picture (0 and 1 in Pick-a-Pic,
``chosen`` and ``rejected`` elsewhere):

    J_F, J_S        the scores; empty where the picture cannot be read
    J_margin        how far the human's winner is ahead, negative where J prefers the other; empty for the human's ties
    J_conflict      whether J prefers the other
    J_probability   of the first picture to be preferred, as ``label`` says it; of judges that were trained on preferences
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.data.pairs import ImageSource, Progress, RowProblem, UnreadableImage
from diffalign.data.table import PairTable, Rows
from diffalign.errors import UserError
from pipelines.markdown import table_lines

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

    from diffalign.evaluate import WinRate
    from reward_models._cache import Cache
    from reward_models._judge import Scorer
    from reward_models._scoring import CacheLike

LABELS = ("human", "flip", "soft")
"""What the label becomes: it stays; turned round where the first judge disagrees; the first judge's probability."""
HUMAN = "human_label"
"""The column in which the human's label stays where another takes its place."""
ENDINGS = (".parquet", ".jsonl", ".ndjson", ".csv", ".tsv")
REPLICATES = 2_000
"""Of the bootstrap: a real data set has a hundred thousand prompts, for which ten thousand take minutes and change nothing."""
LISTED = 10  # of what cannot be used, in the text
_BATCHES_AT_ONCE = 16  # between two visits to the output; the networks wait for the disk only there
_ROW_GROUP = 256 * 2**20  # bytes of pictures


# ------------------------------------------------------------------------------------------------------------- the report


@dataclass(frozen=True)
class Agreement:
    """A judge and the human. ``quarters``: from the closest pairs to the clearest, (margin from, to, pairs, conflicts)."""

    judge: str
    judged: int  # pairs with both scores
    rate: WinRate | None  # of the human's winner over the loser by this judge, ties of the human's apart; None without any
    quarters: tuple[tuple[float, float, int, int], ...]


@dataclass(frozen=True)
class Relabelled:
    """What was found and written. ``unreadable`` and ``unusable`` are (place, reason)."""

    out: Path
    description: str
    pairs: int  # that could be used
    ties: int
    agreements: tuple[Agreement, ...]
    unreadable: tuple[tuple[str, str], ...]  # pictures; their pairs are written without scores
    unusable: tuple[tuple[str, str], ...]  # rows; not written
    dropped: dict[str, int]  # by reason
    changed: int  # labels

    @property
    def written(self) -> int:
        return self.pairs - sum(self.dropped.values())

    def to_text(self) -> str:
        """The report as a person reads it."""
        parts = [self.description, *self._lists(), "", *self._agreement(), "", *self._quarters(), "", self._last()]
        return "\n".join(parts)

    def _lists(self) -> Iterator[str]:
        for title, found in (("Pictures that cannot be read", self.unreadable), ("Rows that cannot be used", self.unusable)):
            if found:
                yield f"{title} ({len(found)}):"
                yield from (f"  {place}: {reason}" for place, reason in found[:LISTED])
                yield from [f"  ... and {len(found) - LISTED} more"] if len(found) > LISTED else []

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


def _agreement_row(a: Agreement) -> list[str]:
    if (r := a.rate) is None:
        return [a.judge, str(a.judged), "0", *["-"] * 4]
    decided = str(r.wins + r.ties + r.losses)
    return [a.judge, str(a.judged), decided, f"{r.rate:.1%}", f"{r.low:.1%} to {r.high:.1%}", str(r.losses), str(r.ties)]


# --------------------------------------------------------------------------------------------------------------- requests


def check_request(
    table: PairTable,
    judges: Sequence[str],
    out: str | Path,
    *,
    data: str | Path | None = None,
    labels: str = "human",
    overwrite: bool = False,
) -> Path:
    """The output file, if what is asked can be done; asked before judges are loaded. ``data``: what the table was opened from.

    Raises:
        UserError: the output is there already, would become part of the data or cannot hold it; a column is there already.
    """
    out, place = Path(out).expanduser(), Path(data or "").expanduser()
    if out.suffix.lower() not in ENDINGS:
        raise UserError(f"--out {out}: the ending says how the data are written; it is one of {', '.join(ENDINGS)}.")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; it should be a file.")
    if data is not None and out.resolve() == place.resolve():
        raise UserError(f"--out {out} is the data that are read; name another file.")
    if data is not None and place.is_dir() and _is_parquet(out) and out.resolve().is_relative_to(place.resolve()):
        raise UserError(f"--out {out} lies in {place} and would be taken for a part of it from then on; name a file elsewhere.")
    if out.exists() and not overwrite:
        raise UserError(f"--out {out} exists. Name another file, or add --overwrite to replace it.")
    _check_columns(_Stored.of(table), judges, labels)
    if not _is_parquet(out) and _holds_pictures(table):
        raise UserError(f"--out {out}: the pictures are inside of {table.description}, but a list holds paths; use .parquet.")
    return out


def _is_parquet(out: Path) -> bool:
    return out.suffix.lower() == ".parquet"


def _check_columns(stored: _Stored, judges: Sequence[str], labels: str) -> None:
    present, where = stored.rows.columns, stored.rows.description
    if labels != "human" and HUMAN in present:
        raise UserError(f"{where} has a column {HUMAN} already: its labels are not the human's any more. Relabel the original.")
    for judge in judges:
        for column in (*stored.score_columns(judge), *(f"{judge}_{what}" for what in ("margin", "conflict", "probability"))):
            if column in present:
                raise UserError(
                    f"{where} has a column {column} already. Call the judge something else, as in --judges again={judge}."
                )


def _holds_pictures(table: PairTable) -> bool:
    for i in range(len(table)):
        try:
            return table[i].winner.data is not None
        except RowProblem:
            continue
    return False


def _check_wishes(judges: Mapping[str, Scorer], labels: str, drop_conflicts: bool, min_margin: float) -> None:
    if not judges:
        raise UserError("To judge data again needs at least one judge; got none.")
    first, judge = next(iter(judges.items()))
    if labels not in LABELS:
        raise UserError(f"labels is one of {', '.join(LABELS)}; got {labels!r}.")
    if labels == "flip" and drop_conflicts:
        raise UserError("Labels that conflict are either turned round (--labels flip) or dropped (--drop-conflicts); got both.")
    if not (math.isfinite(min_margin) and min_margin >= 0):
        raise UserError(f"The smallest margin is a number, at least 0; got {min_margin}.")
    if labels == "soft" and judge.sharpness is None:
        raise UserError(
            f"--labels soft: the labels are probabilities, and the judge {first!r} was not trained on preferences; its scores "
            f"have an order only. Use --labels flip, or name a judge such as pickscore or hps-v2.1 first."
        )


# ------------------------------------------------------------------------------------------------------------------- rows


@dataclass
class _Pair:
    """A row and its two pictures, in the order of the data."""

    cells: Mapping[str, Any]
    prompt: str
    human: float  # probability that the first picture is preferred
    sources: tuple[ImageSource, ImageSource]
    origin: str
    content: list[bytes | None] = field(default_factory=list)
    scores: dict[str, tuple[float, float]] = field(default_factory=dict)  # by judge; NaN where there is none

    @property
    def tie(self) -> bool:
        return self.human == 0.5

    def by_preference(self, judge: str) -> tuple[float, float]:
        """Scores of the human's winner and loser; of a tie, of the first and the second."""
        first, second = self.scores[judge]
        return (first, second) if self.human >= 0.5 else (second, first)


@dataclass(frozen=True)
class _Stored:
    """A table of pairs as it is stored, which ``PairTable`` keeps to itself: every column, and the pictures in their order."""

    table: PairTable
    rows: Rows
    names: Mapping[str, str]
    images: tuple[str, str]  # roles
    label: str  # role

    @classmethod
    def of(cls, table: PairTable) -> _Stored:
        return cls(table, table._rows, table._names, table._layout.IMAGES, table._layout.LABELS[0])

    @property
    def pictures(self) -> tuple[str, str]:
        """The columns that hold them."""
        return self.names[self.images[0]], self.names[self.images[1]]

    @property
    def labels(self) -> tuple[str, str | None]:
        """The columns for the probability of the first picture and, where it is stored too, of the second."""
        return self.names.get(self.label, self.label), self.names.get("label_1")

    def score_columns(self, judge: str) -> tuple[str, str]:
        first, second = (f"{judge}_{role.rpartition('_')[2]}" for role in self.images)
        return first, second

    def pair(self, index: int) -> _Pair:
        """Raises ``RowProblem``."""
        where = self.table._kept[index]
        cells = self.rows.row(where, self.rows.columns)
        roles = {role: cells.get(name) for role, name in self.names.items()}
        pair = self.table._pair(roles, self.rows.origin(where))
        human = self.table._layout.probability(roles)
        sources = (pair.winner, pair.loser) if human >= 0.5 else (pair.loser, pair.winner)
        return _Pair(cells, pair.prompt, human, sources, pair.origin)


# ---------------------------------------------------------------------------------------------------------------- judging


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
    """Judge every pair and write the data with the judges' columns; what these are, the module says.

    Args:
        table: the pairs, from ``open_pairs``.
        judges: by the names that their columns begin with; the first decides.
        out: ``.parquet`` with the pictures inside, or a list with paths, ``.jsonl``, ``.csv`` or ``.tsv``; whole or not at all.
        labels: one of ``LABELS``.
        drop_conflicts: leave out pairs of which the first judge prefers the picture that the human did not.
        min_margin: leave out pairs whose pictures the first judge sees closer together than this, and those it cannot judge.
        cache: where scores are remembered; True for the user's own. What an interrupted run had done is found there.

    Raises:
        UserError: a request that cannot be met (see ``check_request``), a prompt that a judge cannot judge by, no pair left.
    """
    out = check_request(table, list(judges), out, labels=labels, overwrite=overwrite)
    _check_wishes(judges, labels, drop_conflicts, min_margin)
    work = _Work(_Stored.of(table), judges, _Verdict(judges, labels, drop_conflicts, min_margin))
    pairs = max(_BATCHES_AT_ONCE * batch_size // 2, 1)
    with _opened(cache) as known, _Writer(out, work) as writer:
        for start in range(0, len(table), pairs):
            numbers = range(start, min(start + pairs, len(table)))
            judged = work.judge(numbers, _share(progress, numbers, len(table)), batch_size=batch_size, cache=known)
            writer.write(list(work.rows(judged)))
            if progress is not None:
                progress("judging", numbers.stop, len(table))  # also where there was nothing new to score
        if work.written == 0:
            raise UserError(f"No pair of {len(table)} is left: {work.why_none()}. Nothing was written.")
    return work.report(out)


def _share(progress: Progress | None, numbers: range, total: int) -> Callable[[int, int], None] | bool:
    """What ``score`` reports to: its pictures, as a share of these pairs."""
    if progress is None:
        return False
    return lambda done, of: progress("judging", numbers.start + len(numbers) * done // of, total)


@contextmanager
def _opened(cache: CacheLike) -> Iterator[Cache | None]:
    """The cache, opened once for all parts."""
    from reward_models._cache import Cache
    from reward_models.base import JudgeError

    try:
        known = Cache.of(cache)
    except JudgeError as error:
        raise UserError(f"--cache: {error}.") from error
    try:
        yield known
    finally:
        if known is not None and known is not cache:
            known.close()


@dataclass(frozen=True)
class _Verdict:
    """What follows from the scores of a pair."""

    judges: Mapping[str, Scorer]
    labels: str
    drop_conflicts: bool
    min_margin: float

    @property
    def first(self) -> str:
        return next(iter(self.judges))

    def margin(self, judge: str, pair: _Pair) -> float:
        """How far the human's winner is ahead; of a tie, the first picture. NaN where a score is."""
        winner, loser = pair.by_preference(judge)
        ahead = 0.0 if winner == loser else winner - loser  # equal infinities are no difference
        return ahead if self.judges[judge].info.higher_is_better else -ahead

    def probability(self, judge: str, pair: _Pair) -> float:
        """Of the first picture to be preferred; NaN where a score is."""
        import torch

        first, second = torch.tensor(pair.scores[judge], dtype=torch.float64)
        return float(self.judges[judge].preference(first, second))

    def reason_to_drop(self, pair: _Pair) -> str | None:
        margin = self.margin(self.first, pair)
        if self.drop_conflicts and not pair.tie and margin < 0:
            return "conflicts"
        if self.min_margin and math.isnan(margin):
            return "not judged"
        return "too close" if abs(margin) < self.min_margin else None

    def label(self, pair: _Pair) -> float:
        """What takes the place of the human's label, which stays where the first judge has nothing to say."""
        if self.labels == "soft":
            chance = self.probability(self.first, pair)
            return pair.human if math.isnan(chance) else chance
        turned = self.labels == "flip" and self.margin(self.first, pair) < 0
        return 1.0 - pair.human if turned else pair.human


class _Work:
    """Judging, part by part, and the tally of it."""

    def __init__(self, stored: _Stored, judges: Mapping[str, Scorer], verdict: _Verdict) -> None:
        self.stored, self.judges, self.verdict = stored, judges, verdict
        self.written = 0
        self._scores: dict[bytes, tuple[float, ...]] = {}
        """Of each judge, by picture and prompt."""
        self._unreadable: list[tuple[str, str]] = []
        self._unusable: list[tuple[str, str]] = []
        self._dropped = {"conflicts": 0, "too close": 0, "not judged": 0}
        self._prompts: list[str] = []
        self._ties: list[bool] = []
        self._by_preference: dict[str, list[tuple[float, float]]] = {name: [] for name in judges}
        self._changed = 0

    def judge(self, numbers: range, progress: Callable[[int, int], None] | bool, **how: Any) -> list[_Pair]:
        """These pairs with their scores; a picture that has been seen with its prompt is not judged again."""
        pairs = [pair for number in numbers if (pair := self._read(number)) is not None]
        shown = {_key(c, pair.prompt): (c, pair.prompt) for pair in pairs for c in pair.content if c is not None}
        new = {key: both for key, both in shown.items() if key not in self._scores}
        if new:
            self._scores.update(zip(new, self._score(list(new.values()), progress, **how), strict=True))
        for pair in pairs:
            sides = [self._of_side(pair, side) for side in (0, 1)]
            pair.scores = dict(zip(self.judges, zip(*sides, strict=True), strict=True))
        return pairs

    def _read(self, number: int) -> _Pair | None:
        try:
            pair = self.stored.pair(number)
        except RowProblem as problem:
            place = f"{problem.origin} ({problem.side})" if problem.side else problem.origin
            self._unusable.append((place, problem.reason))
            return None
        pair.content = [self._content(pair, side) for side in (0, 1)]
        return pair

    def _content(self, pair: _Pair, side: int) -> bytes | None:
        try:
            return pair.sources[side].read_bytes()
        except UnreadableImage as error:
            self._tell(pair, side, str(error))
            return None

    def _tell(self, pair: _Pair, side: int, reason: str) -> None:
        self._unreadable.append((f"{pair.origin} ({self.stored.pictures[side]})", reason))

    def _score(self, shown: Sequence[tuple[bytes, str]], progress: Any, **how: Any) -> list[tuple[float, ...]]:
        import reward_models
        from reward_models._pictures import UnreadablePictureWarning
        from reward_models.base import JudgeError

        pictures, prompts = map(list, zip(*shown, strict=True))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UnreadablePictureWarning)  # the report names them by their place in the data
                scores = reward_models.score(self.judges, pictures, prompts, progress=progress, **how)
        except JudgeError as error:
            raise UserError(f"{self.stored.rows.description} cannot be judged: {error}.") from error
        return list(zip(*(scores[name].tolist() for name in self.judges), strict=True))

    def _of_side(self, pair: _Pair, side: int) -> tuple[float, ...]:
        """Of each judge; NaN, and a line in the report, where the picture cannot be read."""
        content = pair.content[side]
        scores = (math.nan,) * len(self.judges) if content is None else self._scores[_key(content, pair.prompt)]
        if content is not None and all(map(math.isnan, scores)):
            try:
                pair.sources[side].open()
                self._tell(pair, side, "no judge gives it a score")
            except UnreadableImage as error:
                self._tell(pair, side, str(error))
        return scores

    # ----------------------------------------------------------------------------------------------------------------- rows

    def rows(self, pairs: Sequence[_Pair]) -> Iterator[dict[str, Any]]:
        """As they are written, pictures as ``_Picture``; those that are dropped are counted only."""
        for pair in pairs:
            self._prompts.append(pair.prompt)
            self._ties.append(pair.tie)
            for name, sides in self._by_preference.items():
                sides.append(pair.by_preference(name))
            if (reason := self.verdict.reason_to_drop(pair)) is not None:
                self._dropped[reason] += 1
                continue
            self.written += 1
            pictures = map(_Picture, pair.sources, pair.content)
            yield {
                **pair.cells,
                **dict(zip(self.stored.pictures, pictures, strict=True)),
                **self._judged(pair),
                **self._label(pair),
            }

    def _judged(self, pair: _Pair) -> dict[str, Any]:
        cells: dict[str, Any] = {}
        for name, judge in self.judges.items():
            margin = None if pair.tie else _known(self.verdict.margin(name, pair))
            cells |= zip(self.stored.score_columns(name), map(_known, pair.scores[name]), strict=True)
            cells |= {f"{name}_margin": margin, f"{name}_conflict": None if margin is None else margin < 0}
            if judge.sharpness is not None:
                cells[f"{name}_probability"] = _known(self.verdict.probability(name, pair))
        return cells

    def _label(self, pair: _Pair) -> dict[str, float]:
        if self.verdict.labels == "human":
            return {}
        label = self.verdict.label(pair)
        self._changed += label != pair.human
        first, second = self.stored.labels
        return {HUMAN: pair.human, first: label} | ({second: 1.0 - label} if second else {})

    def columns(self) -> dict[str, str]:
        """The columns that are added or replaced, and what they hold: "score", "flag" or "probability"."""
        added = {}
        for name, judge in self.judges.items():
            first, second = self.stored.score_columns(name)
            added |= {first: "score", second: "score", f"{name}_margin": "score", f"{name}_conflict": "flag"}
            added |= {f"{name}_probability": "probability"} if judge.sharpness is not None else {}
        if self.verdict.labels != "human":
            added |= {column: "probability" for column in (HUMAN, *self.stored.labels) if column is not None}
        return added

    # --------------------------------------------------------------------------------------------------------------- report

    def why_none(self) -> str:
        told = [f"{n} {reason}" for reason, n in self._dropped.items() if n]
        return ", ".join(told + ([f"{len(self._unusable)} cannot be used"] if self._unusable else []))

    def report(self, out: Path) -> Relabelled:
        return Relabelled(
            out=out,
            description=self.stored.table.description,
            pairs=len(self._prompts),
            ties=sum(self._ties),
            agreements=tuple(self._agreement(name) for name in self.judges),
            unreadable=tuple(self._unreadable),
            unusable=tuple(self._unusable),
            dropped=dict(self._dropped),
            changed=self._changed,
        )

    def _agreement(self, name: str) -> Agreement:
        import numpy as np

        from diffalign.evaluate import win_rate

        sign = 1.0 if self.judges[name].info.higher_is_better else -1.0
        sides = sign * np.array(self._by_preference[name])
        decided = ~np.array(self._ties)
        judged = ~np.isnan(sides).any(axis=1)
        winner, loser = sides[decided & judged].T
        if len(winner) == 0:
            return Agreement(name, int(judged.sum()), None, ())
        prompts = [prompt for prompt, counts in zip(self._prompts, decided & judged, strict=True) if counts]
        return Agreement(
            name, int(judged.sum()), win_rate(loser, winner, groups=prompts, n_boot=REPLICATES), _quarters(winner - loser)
        )


def _quarters(margins: NDArray) -> tuple[tuple[float, float, int, int], ...]:
    """As many pairs in each as margins that are equal allow."""
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


def _key(content: bytes, prompt: str) -> bytes:
    return hashlib.blake2b(hashlib.sha256(content).digest() + prompt.encode(), digest_size=16).digest()


def _known(value: float) -> float | None:
    """As many digits as single precision has; None for NaN."""
    return None if math.isnan(value) else float(f"{value:.9g}")


# ---------------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class _Picture:
    """A cell: where the picture is, and its bytes; None if they cannot be had."""

    source: ImageSource
    content: bytes | None


class _Writer:
    """Writes beside the output and renames at the end, so that there is never half of it."""

    def __init__(self, out: Path, work: _Work) -> None:
        self._out, self._aside = out, out.with_name(f".{out.name}.{os.getpid()}.partial")
        self._form = _Parquet(work) if _is_parquet(out) else _Listing(out, work)

    def __enter__(self) -> _Writer:
        with self._told():
            self._out.parent.mkdir(parents=True, exist_ok=True)
            self._form.open(self._aside)
        return self

    def write(self, rows: list[dict[str, Any]]) -> None:
        with self._told():
            self._form.write(rows)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with self._told():
                self._form.close()
                if kind is None:
                    os.replace(self._aside, self._out)
        finally:
            self._aside.unlink(missing_ok=True)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self._out} could not be written: {error.strerror or error}.") from error


class _Parquet:
    """Pictures as bytes; the other columns keep the types that they have."""

    def __init__(self, work: _Work) -> None:
        import pyarrow as pa

        types = {"score": pa.float32(), "flag": pa.bool_(), "probability": pa.float64()}
        wanted = _types(work.stored) | dict.fromkeys(work.stored.pictures, pa.binary())
        wanted |= {column: types[what] for column, what in work.columns().items()}
        self._schema = pa.schema(list(wanted.items()), metadata={"diffalign": json.dumps(_provenance(work))})
        self._pictures = set(work.stored.pictures)
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0

    def open(self, path: Path) -> None:
        import pyarrow.parquet as pq

        plain = [name for name in self._schema.names if name not in self._pictures]
        self._file = pq.ParquetWriter(path, self._schema, use_dictionary=plain, write_statistics=plain)

    def write(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            cells = {name: cell.content if isinstance(cell, _Picture) else cell for name, cell in row.items()}
            self._rows.append(cells)
            self._bytes += sum(len(cells[name] or b"") for name in self._pictures)
        if self._bytes >= _ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        arrays = [
            _array(name, [row.get(name) for row in self._rows], self._schema.field(name).type) for name in self._schema.names
        ]
        self._file.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        self._rows, self._bytes = [], 0

    def close(self) -> None:
        if self._rows:
            self._flush()
        self._file.close()


def _array(name: str, values: list[Any], kind: pa.DataType) -> pa.Array:
    import pyarrow as pa

    try:
        return pa.array([_text(v) for v in values] if pa.types.is_string(kind) else values, kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise UserError(f"The column {name} holds values of several types: {error}.") from error


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _types(stored: _Stored) -> dict[str, pa.DataType]:
    """Arrow's types of all columns: as the storage states them, else by what is in them; of mixed columns, text."""
    import pyarrow as pa

    known = {field.name: field.type for schema in _schemas(stored.rows) for field in schema}
    types = {}
    for name in stored.rows.columns:
        kind = known.get(name)
        if kind is None and name not in stored.pictures:
            try:
                kind = pa.array(stored.rows.column(name)).type
            except (pa.ArrowInvalid, pa.ArrowTypeError):
                kind = pa.string()
        types[name] = pa.string() if kind is None or pa.types.is_null(kind) else kind
    return types


def _schemas(rows: Rows) -> list[pa.Schema]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from diffalign.data.readers._dataset import DatasetRows
    from diffalign.data.readers.arrow import ArrowRows
    from diffalign.data.readers.parquet import ParquetRows

    if isinstance(rows, DatasetRows):
        return [rows._dataset.features.arrow_schema]
    if isinstance(rows, ParquetRows):
        shards = [pq.read_schema(file) for file in rows._files]
    elif isinstance(rows, ArrowRows):
        shards = [table.schema for table in rows._tables]
    else:
        return []
    return [pa.unify_schemas(shards, promote_options="permissive")]


def _provenance(work: _Work) -> dict[str, Any]:
    """What the numbers come from, for whoever finds the file in a year."""
    table, verdict = work.stored.table, work.verdict
    wishes = {"labels": verdict.labels, "drop_conflicts": verdict.drop_conflicts, "min_margin": verdict.min_margin}
    judges = {name: judge.provenance() for name, judge in work.judges.items()}
    return {"relabelled": table.fingerprint, **wishes, "judges": judges}


class _Listing:
    """One row a line; pictures below the list's folder by their path from there, others by their whole path."""

    def __init__(self, out: Path, work: _Work) -> None:
        self._ending, self._folder = out.suffix.lower(), out.absolute().parent
        self._columns = list(dict.fromkeys([*work.stored.rows.columns, *work.columns()]))

    def open(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8", newline="")
        if self._ending in (".csv", ".tsv"):
            self._table = csv.writer(self._file, delimiter={".csv": ",", ".tsv": "\t"}[self._ending], lineterminator="\n")
            self._table.writerow(self._columns)

    def write(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            cells = {name: self._cell(row.get(name)) for name in self._columns}
            if self._ending in (".csv", ".tsv"):
                self._table.writerow([_field(cell) for cell in cells.values()])
            else:
                self._file.write(json.dumps(cells, ensure_ascii=False, default=str) + "\n")

    def _cell(self, cell: Any) -> Any:
        if not isinstance(cell, _Picture):
            return None if isinstance(cell, float) and math.isnan(cell) else cell
        if cell.source.path is None:
            raise UserError("A picture is inside of the data, and a list holds paths only; write .parquet.")
        path = cell.source.path.absolute()
        return path.relative_to(self._folder).as_posix() if path.is_relative_to(self._folder) else str(path)

    def close(self) -> None:
        self._file.close()


def _field(cell: Any) -> Any:
    return {None: "", True: "true", False: "false"}[cell] if cell is None or isinstance(cell, bool) else cell
