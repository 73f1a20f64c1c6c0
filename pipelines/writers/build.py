"""Preferences between rewrites, made: a writer proposes, a generator draws, judges choose, and what is far apart becomes a pair.

For each prompt: some candidates, drawn from the same noise, judged against the prompt; the best and the worst, if they are far
enough apart, are a pair. What was drawn and judged is kept beside the pairs, one line for each prompt (``OUT.candidates.jsonl``):
a run that was cut off goes on from there, and other pairs (another gap, a cap on drift) can be made without drawing again.

With ``torchrun`` or ``accelerate launch`` each process takes its share of the prompts, and the first one makes the pairs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.errors import UserError
from diffalign.written_aside import write_file
from pipelines import outputs
from pipelines.progress import Progress
from pipelines.prompts import Prompt
from pipelines.rewrite_pairs import RewritePair, write_rewrites
from pipelines.semantics import Embedding, distance
from pipelines.writers.fitting import fitting
from pipelines.writers.journal import Lines
from pipelines.writers.sampling import BrokenOff, Decoding, candidates
from pipelines.writers.studio import Studio, standardised
from pipelines.writers.writer import Writer


@dataclass(frozen=True)
class Proposing:
    """How candidates are found: ``count`` for each prompt, shared out among the ``decodings``."""

    count: int = 8
    decodings: tuple[Decoding, ...] = (Decoding("sample"), Decoding("diverse-beam"))
    seed: int = 0  # random seed of the samples
    with_prompt: bool = False  # the prompt itself is a candidate, too

    def __post_init__(self) -> None:
        if self.count < 2:
            raise UserError(f"A pair takes two candidates at least; got {self.count}.")
        if not 1 <= len(self.decodings) <= self.count:
            raise UserError(f"{self.count} candidates cannot be shared out among {len(self.decodings)} ways of looking for them.")

    @property
    def max_rewrite_tokens(self) -> int:
        """The most tokens of any candidate."""
        return max(decoding.max_rewrite_tokens for decoding in self.decodings)

    def propose(self, writer: Writer, prompts: Sequence[str]) -> list[Proposed]:
        """Candidates for each prompt. Rewrites that the writer had not ended are left out: they would teach it not to end."""
        found: list[dict[str, str]] = [{p: "prompt"} if self.with_prompt else {} for p in prompts]
        broken = [0] * len(prompts)
        for k, decoding in enumerate(self.decodings):
            n = self.count // len(self.decodings) + (k < self.count % len(self.decodings))
            drawn = candidates(writer, prompts, n, decoding, seed=self.seed)
            for row, (texts, known) in enumerate(zip(drawn, found, strict=True)):
                whole = [text for text in texts if not isinstance(text, BrokenOff)]
                broken[row] += len(texts) - len(whole)
                known |= {text: decoding.how for text in whole if text not in known}
        return [Proposed(list(known.items()), n) for known, n in zip(found, broken, strict=True)]


@dataclass(frozen=True)
class Proposed:
    """What was found for one prompt, before it is judged."""

    candidates: list[tuple[str, str]]  # (text, way), all different, in the order they were found
    broken_off: int  # found, and left out because they had not ended at ``max_rewrite_tokens``


@dataclass(frozen=True)
class Pairing:
    """Which candidates become a pair."""

    min_gap: float = 1.0  # between best and worst, in usual differences of two rewrites of a prompt (``studio.standardised``)
    max_distance: float | None = None  # candidates further from their prompt cannot be chosen (they may be rejected)


@dataclass(frozen=True)
class Candidates:
    """What was found for one prompt."""

    prompt: str
    texts: tuple[str, ...]
    ways: tuple[str, ...]
    distances: tuple[float, ...]
    scores: Mapping[str, tuple[float, ...]]  # of each judge
    broken_off: int = 0  # others, that had not ended and are none

    @staticmethod
    def of(values: Mapping[str, Any]) -> Candidates:
        """As they were read from a line."""
        columns = {name: tuple(values[name]) for name in ("texts", "ways", "distances")}
        scores = {name: tuple(v) for name, v in values["scores"].items()}
        return Candidates(values["prompt"], **columns, scores=scores, broken_off=values["broken_off"])


@dataclass(frozen=True)
class Built:
    """What a build came to."""

    pairs: int
    prompts: int
    too_close: int  # prompts whose best and worst were not far enough apart
    too_few: int  # prompts with less than two candidates that differ (or none near enough to be chosen)
    drifted: float  # share of winners further than ``far`` from their prompt
    winner_distance: float  # mean
    loser_distance: float
    far: float
    broken_off: int  # candidates that had not ended at ``max_rewrite_tokens``
    unwritable: tuple[str, ...]  # prompts that the writer cannot take: where each stands, and why
    path: Path = field(compare=False)

    def to_text(self) -> str:
        """A few lines for the terminal."""
        lines = [
            f"{self.path}: {self.pairs} pairs from {self.prompts} prompts",
            f"left out: {self.too_close} prompts whose candidates are too close, {self.too_few} with too few",
            f"mean distance from the prompt: winners {self.winner_distance:.3f}, losers {self.loser_distance:.3f}; "
            f"{100 * self.drifted:.0f} % of the winners are further than {self.far:g}",
        ]
        if self.broken_off:
            lines.append(f"{self.broken_off} candidates had not ended at max_rewrite_tokens and were left out")
        return "\n".join([*lines, *unwritable_lines(self.unwritable)])


def unwritable_lines(problems: Sequence[str]) -> list[str]:
    """A line of how many, and the first few."""
    if not problems:
        return []
    return [f"{len(problems)} prompts that cannot be rewritten were left out:", *(f"  {problem}" for problem in problems[:5])]


def build(
    prompts: Sequence[str | Prompt],
    writer: Writer,
    studio: Studio,
    embedding: Embedding,
    out: str | Path,
    *,
    proposing: Proposing = Proposing(),
    pairing: Pairing = Pairing(),
    far: float = 0.1,
    chunk: int = 8,
    overwrite: bool = False,
    share: tuple[int, int] = (0, 1),
    wait: Callable[[], None] = lambda: None,
    progress: Progress | None = None,
) -> Built | None:
    """Make pairs of prompts, each different one once, into ``out`` (.jsonl or .parquet).

    Prompts that the writer cannot take are left out, counted and named.

    Args:
        far: a distance beyond which a winner counts as drifted, in the summary.
        chunk: prompts that are proposed for, drawn and judged together; what is lost when a run is cut off.
        share: (r, n): this process takes every n-th of the prompts that are left, from the r-th on; the first makes the pairs
            when all have come to ``wait``, the others return None.

    Raises:
        UserError: ``out`` is there (unless ``overwrite``), candidates beside it are of another build, a judge fails, or no
            prompt or pair is left.
    """
    path = Path(out).expanduser()
    check_out(path, overwrite)
    fit = fitting(prompts, [writer], proposing.max_rewrite_tokens)
    asked = fit.prompts
    journal = Journal(path, _purpose(writer, studio, embedding, proposing), overwrite and share[0] == 0)
    if overwrite:
        wait()  # until the first process has dropped what is of another build
    known = journal.read()
    wait()  # before any writes: all have to see the same prompts done, or they would share out different ones
    mine = [prompt for prompt in asked if prompt not in known][share[0] :: share[1]]
    with journal.part(share[0]) as add:
        for low in range(0, len(mine), chunk):
            for found in _found(mine[low : low + chunk], writer, studio, embedding, proposing):
                add(found)
            if progress is not None:
                progress("building", min(low + chunk, len(mine)), len(mine))
    wait()
    if share[0]:
        return None
    known = journal.read()
    kept = [known[prompt] for prompt in asked]
    journal.gather([*kept, *(one for prompt, one in known.items() if prompt not in set(asked))])
    made_by = {"generator": _name_of(studio.pipe), "writer": writer.name or "writer"}
    return pair_up(kept, path, pairing, far, made_by, fit.problems)


def check_out(path: Path, overwrite: bool) -> None:
    """Raises UserError for a file that is there, or one of another kind."""
    if path.suffix.lower() not in (".jsonl", ".parquet"):
        raise UserError(f"{path} ends in {path.suffix or 'nothing'}; pairs are written as .jsonl or .parquet.")
    outputs.check_file(path, overwrite)


def _found(
    prompts: Sequence[str], writer: Writer, studio: Studio, embedding: Embedding, proposing: Proposing
) -> Iterator[Candidates]:
    """Candidates of some prompts, judged."""
    proposed = proposing.propose(writer, prompts)
    rows = [(prompt, text) for prompt, found in zip(prompts, proposed, strict=True) for text, _ in found.candidates]
    asked, texts = [p for p, _ in rows], [t for _, t in rows]
    distances = distance(embedding, asked, texts).tolist() if rows else []
    scores = studio.scores(asked, texts) if rows else {name: np.zeros(0) for name in studio.judges}
    at = 0
    for prompt, found in zip(prompts, proposed, strict=True):
        n = len(found.candidates)
        span = slice(at, at + n)
        at += n
        own = {name: tuple(float(v) for v in values[span]) for name, values in scores.items()}
        ways = tuple(way for _, way in found.candidates)
        yield Candidates(prompt, tuple(texts[span]), ways, tuple(distances[span]), own, found.broken_off)


def _purpose(writer: Writer, studio: Studio, embedding: Embedding, proposing: Proposing) -> str:
    """A short name for everything that candidates and scores depend on."""
    parts = [writer.fingerprint(), *studio.identity(), embedding.fingerprint, asdict(proposing)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _name_of(pipe: Any) -> str:
    from pipelines.tiny import shipped

    name = str(getattr(pipe, "name_or_path", "") or type(pipe).__name__)
    return shipped.NAME if Path(name) == shipped.CHECKPOINT else name


# ---------------------------------------------------------------------------------------------------------------- pairs


def pair_up(
    found: Sequence[Candidates],
    path: Path,
    pairing: Pairing,
    far: float,
    provenance: Mapping[str, Any],
    unwritable: Sequence[str] = (),
) -> Built:
    """Best against worst of every prompt, written to ``path``.

    Raises:
        UserError: no pair is left.
    """
    names = list(found[0].scores)
    overall = standardised({name: [c.scores[name] for c in found] for name in names})
    rows, too_few, too_close, broken = [], 0, 0, sum(one.broken_off for one in found)
    for one, totals in zip(found, overall, strict=True):
        allowed = [k for k, d in enumerate(one.distances) if pairing.max_distance is None or d <= pairing.max_distance]
        if len(one.texts) < 2 or not allowed:
            too_few += 1
            continue
        best, worst = max(allowed, key=lambda k: totals[k]), int(np.argmin(totals))
        if best == worst or totals[best] - totals[worst] < pairing.min_gap:
            too_close += 1
            continue
        rows.append(_pair(one, best, worst, totals, provenance))
    if not rows:
        raise UserError(
            f"No pair is left of {len(found)} prompts: {too_close} with candidates closer than min_gap {pairing.min_gap:g}, "
            f"{too_few} with too few. Lower --min-gap, ask for more candidates, or raise their temperature."
            + (f" {broken} candidates had not ended: raise --max-rewrite-tokens, or train the writer first." if broken else "")
        )
    write_rewrites(rows, path)
    winners = np.array([row.distance for row in rows])
    losers = np.array([row.provenance["rejected_distance"] for row in rows])
    drifted = float((winners > far).mean())
    return Built(
        pairs=len(rows),
        prompts=len(found),
        too_close=too_close,
        too_few=too_few,
        drifted=drifted,
        winner_distance=float(winners.mean()),
        loser_distance=float(losers.mean()),
        far=far,
        broken_off=broken,
        unwritable=tuple(unwritable),
        path=path,
    )


def _pair(one: Candidates, best: int, worst: int, totals: np.ndarray, provenance: Mapping[str, Any]) -> RewritePair:
    sides = (("chosen", best), ("rejected", worst))
    own = {f"{side}_{name}": values[k] for name, values in one.scores.items() for side, k in sides}
    more = {"rejected_distance": one.distances[worst], "chosen_way": one.ways[best], "rejected_way": one.ways[worst]}
    return RewritePair(
        prompt=one.prompt,
        chosen=one.texts[best],
        rejected=one.texts[worst],
        distance=one.distances[best],
        chosen_score=float(totals[best]),
        rejected_score=float(totals[worst]),
        provenance={**own, **more, "candidates": len(one.texts), **provenance},
    )


# -------------------------------------------------------------------------------------------------------------- journal


class Journal:
    """What was found so far: ``OUT.candidates.jsonl``, and a part of each process while it works.

    Raises:
        UserError: it is of another build.
    """

    def __init__(self, out: Path, purpose: str, anew: bool) -> None:
        self._whole, self._purpose = out.with_name(f"{out.stem}.candidates.jsonl"), purpose
        if anew and self._foreign():
            for lines in self._files():
                lines.path.unlink()

    def _files(self) -> list[Lines]:
        parts = sorted(self._whole.parent.glob(f"{self._whole.name}.part-*"))
        return [Lines(path, self._purpose) for path in (self._whole, *parts) if path.exists()]

    def _foreign(self) -> Path | None:
        """A file of another build."""
        return next((lines.path for lines in self._files() if lines.foreign()), None)

    def read(self) -> dict[str, Candidates]:
        """By prompt, of all processes."""
        if (other := self._foreign()) is not None:
            raise UserError(
                f"{other} is what is left of a build with another writer, generator, judges or settings. Start that as it was "
                "started to go on with it, or add --overwrite to drop it."
            )
        found = [Candidates.of(values) for lines in self._files() for values in lines.read()]
        return {one.prompt: one for one in found}

    @contextmanager
    def part(self, rank: int) -> Iterator[Callable[[Candidates], None]]:
        """A process's own file, open for adding."""
        with Lines(self._whole.with_name(f"{self._whole.name}.part-{rank}"), self._purpose).adding() as add:
            yield lambda found: add(vars(found))

    def gather(self, found: Sequence[Candidates]) -> None:
        """All in one file; the parts go."""
        lines = [json.dumps({"purpose": self._purpose}), *(json.dumps(vars(one), ensure_ascii=False) for one in found)]
        write_file(self._whole, "".join(f"{line}\n" for line in lines))
        for path in self._whole.parent.glob(f"{self._whole.name}.part-*"):
            path.unlink()
