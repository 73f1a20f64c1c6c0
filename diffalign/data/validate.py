"""Reading a data set of pairs or of single pictures to the last byte and saying what is in it."""

from __future__ import annotations

import hashlib
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from diffalign.data.ahead import default_workers, map_ahead
from diffalign.data.pairs import PreferencePair, Progress, RowProblem, UnreadableImage
from diffalign.data.sheet import contact_sheet
from diffalign.data.table import Kind, PairTable, check_table

__all__ = ["DataReport", "Problem", "check", "contact_sheet"]

LISTED = 10  # problems of one kind listed in the text; ``to_dict`` has all
SIZES_LISTED = 8
SMALL = 64
"""Pixels; a picture with a shorter side is enlarged by every model, and has little to show."""
LONG = 4
"""How many times as long as wide a picture may be; of a longer one, cutting a square leaves less than a quarter."""


@dataclass(frozen=True)
class Problem:
    """A row that cannot be used, or a picture that should be looked at."""

    origin: str
    side: str | None  # "winner", "loser" or "picture" where one is at fault
    reason: str


@dataclass(frozen=True)
class DataReport:
    """What ``check`` found. Places are file and row."""

    description: str
    fingerprint: str
    kind: Kind
    pairs: int  # rows looked at, usable or not; of single pictures, their number
    left_out: dict[str, int]  # rows left out when the data set was opened, by reason
    ties: int
    labels: dict[str, int]  # how often each label occurs, in bins of 0.05 if there are many
    weights: tuple[float, float]  # smallest and largest
    scored: int  # rows with a judge's scores
    scores: tuple[float, float] | None  # smallest and largest
    unique_prompts: int
    empty_captions: tuple[str, ...]
    unique_images: int
    sizes: dict[str, int]  # "width x height" -> pictures (each side of each pair counts), most frequent first
    smallest_side: int
    duplicate_pairs: tuple[tuple[str, str], ...]  # (place, place of the first): same prompt and pictures, not the other preferred
    contradictions: tuple[tuple[str, str], ...]  # same prompt and pictures, the other one preferred; or wanted and unwanted
    repeated_images: int  # pictures that occur in more than one place
    identical_sides: tuple[str, ...]  # of pairs: winner and loser are the same file
    unreadable: tuple[Problem, ...]  # pictures
    bad_rows: tuple[Problem, ...]  # everything else: labels, weights, missing files
    small: tuple[Problem, ...]  # pictures with a side below ``SMALL``; usable, like those that follow
    long: tuple[Problem, ...]  # pictures more than ``LONG`` times as long as wide, or as wide as long

    @property
    def unusable(self) -> int:
        """Rows that cannot be used."""
        return len({p.origin for p in (*self.unreadable, *self.bad_rows)})

    @property
    def usable(self) -> int:
        return self.pairs - self.unusable

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"usable": self.usable, "unusable": self.unusable}

    def to_text(self) -> str:
        """The report as a person reads it."""
        lines = [self.description, "", *self._counts(), ""]
        for title, found in self._problems().items():
            if found:
                lines.append(f"{title} ({len(found)}):")
                lines += [textwrap.indent(item, "  ") for item in found[:LISTED]]
                lines += [f"  ... and {len(found) - LISTED} more"] if len(found) > LISTED else []
        if not any(self._problems().values()):
            lines.append("No problems found.")
        return "\n".join(lines)

    def _counts(self) -> list[str]:
        sizes = [f"{size}: {n}" for size, n in list(self.sizes.items())[:SIZES_LISTED]]
        more = [f"{len(self.sizes) - SIZES_LISTED} other sizes"] if len(self.sizes) > SIZES_LISTED else []
        left = ", ".join(f"{n} {why}" for why, n in self.left_out.items() if n)
        found = {
            self.kind: f"{self.pairs} ({self.usable} usable)",
            "left out": left or "none",
            **({"ties": f"{self.ties} ({self.ties / max(self.pairs, 1):.1%})"} if self.kind == "pairs" else {}),
            "labels": ", ".join(f"{label}: {n}" for label, n in self.labels.items()),
            "weights": _range(self.weights),
            **({"scores": f"{_range(self.scores)}, of {self.scored} {self.kind}"} if self.scores else {}),
            "prompts": f"{self.unique_prompts} different, {len(self.empty_captions)} empty",
            "images": f"{self.unique_images} different, {self.repeated_images} of them in more than one place",
            "sizes": ", ".join([*sizes, *more]) + f" (smallest side {self.smallest_side})",
            "fingerprint": self.fingerprint[:16],
        }
        return [f"{name:<12} {value}" for name, value in found.items()]

    def _problems(self) -> dict[str, list[str]]:
        def problem(p: Problem) -> str:
            return f"{p.origin}{f' ({p.side})' if p.side else ''}: {p.reason}"

        other = "the other picture preferred" if self.kind == "pairs" else "wanted in one place, unwanted in the other"
        return {
            "Unreadable images": [problem(p) for p in self.unreadable],
            "Rows that cannot be used": [problem(p) for p in self.bad_rows],
            "Empty captions": list(self.empty_captions),
            "Winner and loser are the same picture": list(self.identical_sides),
            f"Duplicate {self.kind}": [f"{place} repeats {first}" for place, first in self.duplicate_pairs],
            f"Contradictions ({other})": [f"{place} against {first}" for place, first in self.contradictions],
            f"Pictures with a side below {SMALL} pixels": [problem(p) for p in self.small],
            f"Pictures with proportions beyond {LONG}:1": [problem(p) for p in self.long],
        }


def _range(of: tuple[float, float]) -> str:
    low, high = of
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


@dataclass
class _Tally:
    """What is counted while reading. Holds a few dozen bytes per picture and pair, never pixels."""

    labels: Counter[float] = field(default_factory=Counter)
    weights: list[float] = field(default_factory=lambda: [float("inf"), float("-inf")])
    scored: int = 0
    scores: list[float] = field(default_factory=lambda: [float("inf"), float("-inf")])
    prompts: set[bytes] = field(default_factory=set)
    empty: list[str] = field(default_factory=list)
    images: Counter[bytes] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    seen: dict[bytes, str] = field(default_factory=dict)  # prompt, pictures and their label -> first place
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    contradictions: list[tuple[str, str]] = field(default_factory=list)
    identical: list[str] = field(default_factory=list)
    unreadable: list[Problem] = field(default_factory=list)
    bad_rows: list[Problem] = field(default_factory=list)
    small: list[Problem] = field(default_factory=list)
    long: list[Problem] = field(default_factory=list)


@dataclass(frozen=True)
class _Seen:
    """One pair after reading: per side digest and size, or the reason why not."""

    pair: PreferencePair
    digests: dict[str, bytes]
    sizes: dict[str, tuple[int, int]]
    faults: tuple[Problem, ...]


def check(table: PairTable, *, progress: Progress | None = None, workers: int | None = None) -> DataReport:
    """Read every row and decode every picture; nothing that is wrong with a row stops it.

    Raises ``UserError`` for what is no opened table.
    """
    check_table(table)
    tally = _Tally()
    threads = default_workers() if workers is None else workers
    for done, outcome in enumerate(map_ahead(_look, _rows(table), threads), 1):
        if isinstance(outcome, RowProblem):
            kind = tally.unreadable if outcome.side else tally.bad_rows
            kind.append(Problem(outcome.origin, outcome.side, outcome.reason))
        else:
            _count(tally, outcome)
        if progress:
            progress("reading", done, len(table))
    return _report(table, tally)


def _rows(table: PairTable) -> Iterator[PreferencePair | RowProblem]:
    for index in range(len(table)):
        try:
            yield table[index]
        except RowProblem as problem:
            yield problem


def _look(pair: PreferencePair | RowProblem) -> _Seen | RowProblem:
    if isinstance(pair, RowProblem):
        return pair
    digests, sizes, faults = {}, {}, []
    for side in pair.sides:
        try:
            source = pair.side(side).held()
            sizes[side] = source.open().size
            digests[side] = bytes.fromhex(source.digest())[:16]
        except UnreadableImage as error:
            faults.append(Problem(pair.origin, side, str(error)))
    return _Seen(pair, digests, sizes, tuple(faults))


def _count(tally: _Tally, seen: _Seen) -> None:
    pair = seen.pair
    tally.labels[pair.label] += 1
    tally.weights = [min(tally.weights[0], pair.weight), max(tally.weights[1], pair.weight)]
    if pair.scores is not None:
        tally.scored += 1
        tally.scores = [min(tally.scores[0], *pair.scores), max(tally.scores[1], *pair.scores)]
    prompt = hashlib.sha256(pair.prompt.encode()).digest()[:16]
    tally.prompts.add(prompt)
    if not pair.prompt:
        tally.empty.append(pair.origin)
    tally.images.update(seen.digests.values())
    tally.sizes.update(seen.sizes.values())
    tally.unreadable.extend(seen.faults)
    _measure(tally, seen)
    if seen.faults:
        return
    digests = list(seen.digests.values())
    if not pair.single and digests[0] == digests[1]:
        tally.identical.append(pair.origin)
    _compare(tally, prompt + b"".join(sorted(digests)), _said(pair, digests), pair.origin)


_SAID = (b"yes", b"no", b"tie")


def _said(pair: PreferencePair, digests: Sequence[bytes]) -> bytes:
    """What a row says of its pictures, whichever of them comes first in it: one of ``_SAID``."""
    if pair.label == 0.5:
        return b"tie"
    return b"yes" if (pair.label > 0.5 if pair.single else digests[0] <= digests[1]) else b"no"


def _compare(tally: _Tally, pictures: bytes, said: bytes, origin: str) -> None:
    """Count a row against those that came before it; how many are found does not depend on the order of the rows."""
    before = {each: tally.seen[pictures + each] for each in _SAID if pictures + each in tally.seen}
    against = {b"yes": b"no", b"no": b"yes"}.get(said)
    if said in before:
        tally.duplicates.append((origin, before[said]))
    elif against in before:
        tally.contradictions.append((origin, before[against]))
    elif before:  # one of the two is a tie
        tally.duplicates.append((origin, next(iter(before.values()))))
    tally.seen.setdefault(pictures + said, origin)


def _measure(tally: _Tally, seen: _Seen) -> None:
    for side, (width, height) in seen.sizes.items():
        found = Problem(seen.pair.origin, side, f"{width} x {height}")
        if min(width, height) < SMALL:
            tally.small.append(found)
        if max(width, height) > LONG * min(width, height):
            tally.long.append(found)


def _report(table: PairTable, tally: _Tally) -> DataReport:
    return DataReport(
        description=table.description,
        fingerprint=table.fingerprint,
        kind=table.kind,
        pairs=len(table),
        left_out=table.left_out,
        ties=tally.labels[0.5] if table.kind == "pairs" else 0,
        labels=_histogram(tally.labels),
        weights=tuple(tally.weights) if tally.labels else (1.0, 1.0),
        scored=tally.scored,
        scores=tuple(tally.scores) if tally.scored else None,
        unique_prompts=len(tally.prompts),
        empty_captions=tuple(tally.empty),
        unique_images=len(tally.images),
        sizes={f"{w} x {h}": n for (w, h), n in tally.sizes.most_common()},
        smallest_side=min((min(size) for size in tally.sizes), default=0),
        duplicate_pairs=tuple(tally.duplicates),
        contradictions=tuple(tally.contradictions),
        repeated_images=sum(n > 1 for n in tally.images.values()),
        identical_sides=tuple(tally.identical),
        unreadable=tuple(tally.unreadable),
        bad_rows=tuple(tally.bad_rows),
        small=tuple(tally.small),
        long=tuple(tally.long),
    )


def _histogram(labels: Counter[float]) -> dict[str, int]:
    """Counts by label, or by bin of width 0.05 if there are more than ten different ones."""
    if len(labels) <= 10:
        return {f"{label:g}": n for label, n in sorted(labels.items())}
    bins = Counter({min(int(label * 20), 19): 0 for label in labels})
    for label, n in labels.items():
        bins[min(int(label * 20), 19)] += n
    return {f"{b / 20:.2f}-{(b + 1) / 20:.2f}": n for b, n in sorted(bins.items())}
